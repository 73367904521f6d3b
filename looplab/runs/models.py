"""Load a saved model: every tensor must come from its file, and code in its folder is not run.

transformers fills missing tensors with random numbers and warns; here a missing tensor is an error. A looped model
loads with the classes of `modeling_looped`, not with the copy of them beside its weights
(tests/model/test_remote_code.py checks that the two are equal). Another model loads if transformers knows its class;
its own code runs only with --trust-remote-code.
"""

from collections.abc import Iterator, Sequence
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
from modeling_looped import LoopedForCausalLM  # this import registers the looped classes
from modeling_looped.depth_looped import too_many_loops
from modeling_looped.frozen_looped import FrozenLooped

from .digests import sha256_of
from .folder import Run


def load_model(
    folder: str | Path,
    remedy: str,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM saved at `folder`, in evaluation mode, and its tokenizer.

    Args:
        folder: a folder, or a name on the Hub.
        remedy: end of the message if the folder is damaged: what the user can do.
        trust_remote_code: run Python code in the folder if neither this package nor transformers knows the model.
        device: the accelerator if there is one, unless given.

    Raises:
        ValueError: a file is missing or damaged, the weights do not fit the configuration, or the model needs its own
            code and `trust_remote_code` is False.
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
            GenerationConfig.from_pretrained(folder)  # transformers ignores a file that it cannot read
        # Even for a stock tokenizer, AutoTokenizer reads the model's config first.
        return model.to(device), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def loops_to_try(model: PreTrainedModel, loops: Sequence[int]) -> list[int]:
    """Those of `loops` that the model may run; some models have a largest count."""
    most = None if isinstance(model, FrozenLooped) else model.config.max_num_loops
    return [count for count in loops if most is None or count <= most]


def check_loops(model: PreTrainedModel, folder: Path, *loops: int | None) -> None:
    """Check that `model` is a looped model and may run each loop count of `loops`; None is its own loop count.

    Raises:
        ValueError: it is another model, or its `max_num_loops` is smaller.
    """
    if not isinstance(model, LoopedForCausalLM):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a looped model: name a run of train.py.")
    asked, most = max((count for count in loops if count is not None), default=1), model.config.max_num_loops
    if most is not None and asked > most:
        raise ValueError(f"{folder}: {too_many_loops(asked, most)}")


def check_whole(report: dict, may_lack: str | None = None) -> None:
    """Check that every tensor of the model came from its file, and every tensor of the file went into the model.

    Args:
        report: the second result of `from_pretrained(output_loading_info=True)`.
        may_lack: tensors with this text in their names may be missing.

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
    """Within the block, turn any exception into a ValueError that blames the files in `folder`.

    Args:
        leave: exceptions that stay as they are.

    Raises:
        ValueError: one sentence with the folder, the reason, and `remedy`.
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
    """Within the block, transformers logs no warning and shows no progress bar: `check_whole` raises instead."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_run_model(
    run: Run, *loops: int | None, frozen: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The saved model and tokenizer of a finished run, see `load_model`.

    Args:
        loops: loop counts that it is going to run; None is its own loop count.
        frozen: a frozen model that is looped will do, too. It runs any loop count, and its weights are not the run's:
            their digest is not kept.

    Raises:
        ValueError: there is no model yet, it is damaged or not a looped model, or it may not run so many loops.
    """
    if not frozen:
        run.weights  # noqa: B018 (keeps the digest now: a training may replace the weights during a measurement)
    model, tokenizer = load_model(run.model_folder(), run.again)
    if not (frozen and isinstance(model, FrozenLooped)):
        check_loops(model, run.model_folder(), *loops)
    return model, tokenizer


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of a looped model, counted in three ways.

    all               every parameter; a tied matrix counts once
    one_vocabulary    without the output embedding if it is a matrix of its own, as if the embeddings were tied
    layers            without embeddings and without a table of positions: layers, norms and the loop connection
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
    """SHA-256 of model.safetensors; `Run.weights` if the weights are in several files. Rows and samples note it."""
    path = run.model_folder() / "model.safetensors"
    return sha256_of(path) if path.is_file() else run.weights
