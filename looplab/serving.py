"""An OpenAI-compatible server of a saved model: `transformers serve`, which does not find remote code by itself.

That server looks the class named in config.json up in the transformers module. `serve` puts ours there
and hands over; everything else, options, endpoints and streaming, is its own. It loads this package's code rather than
the copy saved in the folder.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers.cli.serving import model_manager
from transformers.cli.transformers import app
from transformers.utils.import_utils import is_serve_available

from modeling_looped import FrozenLoopedForCausalLM, LoopedForCausalLM


def serve(model: str, options: Sequence[str] = ()) -> None:
    """Serve `model` until interrupted. Loops are those of its generation config, or of its configuration.

    Args:
        model: a folder with a looped model and its tokenizer, or its name on the Hub; requests name it the same way.
        options: of `transformers serve`, such as ["--port", "8000"].

    Raises:
        ValueError: the server's packages are not installed, or `model` is a path without a model.
    """
    if not is_serve_available():
        raise ValueError("serving needs fastapi, uvicorn and openai: pip install 'looped-transformers[serve]'.")
    is_path = Path(model).is_absolute() or model.startswith(".") or Path(model).exists()
    if is_path and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} has no config.json: name a folder that save_pretrained wrote, such as RUN/model.")
    for model_class in (LoopedForCausalLM, FrozenLoopedForCausalLM):
        setattr(model_manager.transformers, model_class.__name__, model_class)
    app(["serve", model, *options], prog_name="transformers")
