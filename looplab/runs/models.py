"""A saved model, loaded whole, by this package's classes, and without running code that lies in its folder.

transformers would fill missing tensors with random numbers and warn; here that is refused. Looped models load by the
classes of `modeling_looped`, which are registered when it is imported, not by the copy of them beside the weights
(tests/model/test_remote_code.py holds the two equal). Other models load if transformers knows them; code of their own
runs only where the user asked for it by --trust-remote-code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, logging

from looplab.mistakes import sentence
from modeling_looped import LoopedForCausalLM  # which registers all classes of ours
from modeling_looped.depth_looped import too_many_loops

from .digests import sha256_of
from .folder import AGAIN, Run


def load_model(
    folder: str | Path,
    remedy: str,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM saved at `folder`, in evaluation mode, and its tokenizer.

    Args:
        folder: or its name on the Hub.
        remedy: what to do where the folder is damaged.
        trust_remote_code: run the folder's own code, of a model that neither this package nor transformers knows.
        device: by default the accelerator, if there is one.

    Raises:
        ValueError: a file is missing or damaged, weights and configuration do not fit, or the model needs code of its
            own and `trust_remote_code` is False.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    with quietly(), blaming(folder, remedy):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_whole says more
        )
        check_whole(report)
        if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
            GenerationConfig.from_pretrained(folder)  # transformers passes over one that it cannot read
        # The tokenizer needs no code of ours, but AutoTokenizer reads the model's config first.
        return model.to(device), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def check_loops(model: PreTrainedModel, folder: Path, *loops: int | None) -> None:
    """What is to be run at `loops` is a looped model, and may loop so often.

    Raises:
        ValueError: it is another model, or may not.
    """
    if not isinstance(model, LoopedForCausalLM):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a looped model: name a run of train.py.")
    asked, most = max((count for count in loops if count is not None), default=1), model.config.max_num_loops
    if most is not None and asked > most:
        raise ValueError(f"{folder}: {too_many_loops(asked, most)}")


def check_whole(report: dict, may_lack: str | None = None) -> None:
    """Every tensor of the model came from its file, and none of the file was left.

    Args:
        report: what `from_pretrained(output_loading_info=True)` says.
        may_lack: part of the names of tensors that may be missing.

    Raises:
        ValueError: with the names of the tensors.
    """
    missing = [name for name in report["missing_keys"] if may_lack is None or may_lack not in name]
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    for what, names in (
        ("lacks", missing),
        ("has too much", report["unexpected_keys"]),
        ("has in another shape", mismatched),
    ):
        if names:
            raise ValueError(
                f"its weights do not fit its config.json: the file {what} {', '.join(sorted(names)[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )


@contextmanager
def blaming(folder: str | Path, remedy: str, leave: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What fails inside is the fault of the files in `folder`: they may be wrong in more ways than can be listed.

    Args:
        leave: errors that say enough by themselves.

    Raises:
        ValueError: one sentence with the folder, what failed, and `remedy`.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged ({error}); {remedy}") from error
    except (*leave, MemoryError, torch.OutOfMemoryError):  # lack of memory is not the folder's fault
        raise
    except Exception as error:
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"the model in {folder} needs Python code of its own, which is not run unasked: read it, and if you "
                "trust it use a command that has --trust-remote-code."
            ) from error
        said = (sentence(error) or f"{type(error).__name__} {error}").rstrip(".")
        raise ValueError(f"{folder} cannot be loaded: {said}; {remedy}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """transformers says nothing meanwhile: what it warns about is an error here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_run_model(run: Run, *loops: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The saved model of a finished run, see `load_model`, which is to run `loops`; None is its own count.

    Raises:
        ValueError: there is no model yet, it is damaged or no looped model, or it cannot run so many loops.
    """
    run.weights  # noqa: B018 (of the model as it is now: a training may replace it while it is measured)
    model, tokenizer = load_model(run.model_folder(), AGAIN)
    check_loops(model, run.model_folder(), *loops)
    return model, tokenizer


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of a looped model in three accountings.

    all               every one; a tied matrix counts once
    one_vocabulary    without the output embedding where it is a matrix of its own: as if embeddings were tied
    layers            without both, and without a table of positions: layers, norms and what is between loops
    """
    embedding, unembedding = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    everything = model.num_parameters()
    one_vocabulary = everything - (0 if unembedding is embedding else unembedding.numel())
    positions = sum(parameter.numel() for parameter in model.base_model.positions.parameters())
    return {
        "all": everything,
        "one_vocabulary": one_vocabulary,
        "layers": one_vocabulary - embedding.numel() - positions,
    }


def weights_digest(run: Run) -> str:
    """SHA-256 of the file of the weights, by which rows and samples know them; of shards, that of `Run.weights`."""
    path = run.model_folder() / "model.safetensors"
    return sha256_of(path) if path.is_file() else run.weights
