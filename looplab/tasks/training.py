"""What train.py asks of a task while it trains: `TaskTraining`, with a `State`, made from a `TrainingRecipe`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_builders import DepthSampler
from looplab.runs.models import blaming
from looplab.tasks.data import Curriculum, Data
from modeling_looped import LoopedForCausalLM


class TrainingRecipe(Protocol):
    """What a task may read of a recipe: its own two sections, and these fields."""

    data: Data
    curriculum: Curriculum
    init_from: str | None
    batch_size: int
    seed: int
    eval_loops: list[int]


@dataclass
class State:
    """What a run knows beside weights, optimizers and random states; a checkpoint's state.json holds these fields.

    `gate` is the last held-out check: of hops, hop count -> share of right answers in [0, 1]; of text and molecules,
    loop count -> nats per token.
    """

    stage: int = 0  # deepest hop count in training; 0 where the task has no stages
    stage_start: int = 0  # updates made when the stage began
    step: int = 0  # updates made
    tokens: int = 0  # input tokens of all ranks, without padding between molecules
    seconds: float = 0.0  # in the training loop, over all resumes
    learnable_depth: int = 0  # deepest hop count that passed the held-out check
    gate: dict[str, float] = field(default_factory=dict)
    finished: bool = False


class TaskTraining(ABC):
    """One task in training. Legend: b batch rows of this rank, T tokens of each, K labels of each.

    Args:
        recipe: what is trained, and on what.
        splits: the data of `recipe.data.load()`.
        depth: draws the loop count of a batch.
        accelerator: shares batches and measurements among ranks.
        kept_tokenizer: folder of the tokenizer that a run which goes on began with; None for a new run.

    Attributes:
        tokenizer: it is saved with the model.
        batches: step -> batch, a dict of `num_loops` (int) and tensors, batch rows first: input_ids (b, T),
            shift_labels (b, K), ...
        logits_to_keep: K, the last tokens of a batch row; 0 where every token has a label.
        generation: fields of the model's generation_config.json.
        padding: what pads the batch rows, None if nothing does.

    Raises:
        ValueError: data and recipe do not fit.
    """

    logits_to_keep: int
    generation: Mapping[str, object]
    padding: str | None = None
    tokenizer: PreTrainedTokenizerBase
    batches: torch.utils.data.Dataset

    @abstractmethod
    def __init__(
        self,
        recipe: TrainingRecipe,
        splits: DatasetDict,
        depth: DepthSampler,
        accelerator: Accelerator,
        kept_tokenizer: Path | None,
    ): ...

    def first_state(self) -> State:
        """The state before the first update."""
        return State()

    def begin(self, state: State) -> None:  # noqa: B027 (a task may have no stages)
        """Make `batches` those of the stage of `state`; without stages they are the same throughout."""

    def is_through(self, state: State) -> bool:
        """Whether the run ends here, whatever budget remains."""
        return False

    def schedule_step(self, state: State) -> int:
        """Updates since the schedule of the learning rates began: with the run, or with the stage."""
        return state.step

    def sizes(self, batch: dict) -> tuple[int, int]:
        """Labels and input tokens of a batch, of all ranks together."""
        world = self.accelerator.num_processes
        return batch["shift_labels"].numel() * world, batch["input_ids"].numel() * world

    def describe(self, batch: dict, state: State) -> dict:
        """What a training row of metrics.jsonl says beside loss and loops."""
        return {}

    @abstractmethod
    def check(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """Measure the held-out rows, note the result in `state.gate`, and return the row of metrics.jsonl."""

    def advance(self, state: State) -> bool:
        """Whether the check let a new stage begin whose optimizer starts afresh."""
        return False

    def progress(self, state: State) -> dict:
        """What the progress bar shows beside the loss."""
        return {}

    @abstractmethod
    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """What summary.json says of the task after the last update."""

    @abstractmethod
    def headline(self, summary: dict) -> str:
        """What the summary comes to, in one line."""


def load_tokenizer(field_name: str, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; ValueError, naming the recipe's field, if there is none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ValueError(f"{field_name}: there is no tokenizer in the folder {folder!r}.")
    with blaming(folder, f"name another folder in {field_name}."):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
