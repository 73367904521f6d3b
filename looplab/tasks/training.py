"""`TaskTraining`, a task in training as train.py works with it, its `State`, and the part of a recipe it reads."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
from looplab.tasks.stages import Stages
from modeling_looped import LoopedForCausalLM


class TrainingRecipe(Protocol):
    """The part of a recipe that a task may read: its own two sections, and these fields."""

    model: dict
    data: Data
    curriculum: Curriculum
    init_from: str | None
    batch_size: int
    seed: int
    eval_loops: list[int]


@dataclass
class State:
    """The state of a run beside weights, optimizers and random states; a checkpoint keeps it in state.json.

    gate: the last held-out check. On hops it is hop count -> accuracy in [0, 1], on sequence grade -> share of right
    answers; on text and molecules it is loop count -> nats per token.
    """

    stage: int = 0  # deepest hop count, or highest grade, in training; 0 if the task has no stages
    stage_start: int = 0  # updates before the stage
    step: int = 0  # updates made
    tokens: int = 0  # input tokens of all ranks, without padding between molecules
    seconds: float = 0.0  # time in the training loop, over all resumes
    learnable_depth: int = 0  # deepest hop count, or highest grade, that passed the held-out check
    gate: dict[str, float] = field(default_factory=dict)
    finished: bool = False


class Part(Protocol):
    """What a process keeps beside tensors. Its states are plain: dicts, lists, numbers, strings and tensors."""

    def state_dict(self) -> dict:
        """What this process keeps."""
        ...

    def load_state_dicts(self, states: Sequence[dict]) -> None:
        """Go on. states: what each process of the run kept, which may be more or fewer than there are now."""
        ...


class TaskTraining(ABC):
    """A task in training. Legend: b batch rows of this rank, T tokens, K positions with labels.

    Args:
        recipe: of the run.
        splits: the data, of `recipe.data.load()`.
        depth: draws the loop count of a batch.
        accelerator: divides batches and measurements among ranks.
        kept_tokenizer: folder of the tokenizer that a resumed run began with; None for a new run.

    Attributes:
        tokenizer: is saved with the model.
        batches: step -> batch, a dict of `num_loops` (int) and tensors: input_ids (b, T), shift_labels (b, K), ...
        logits_to_keep: K, counted from the end of a batch row; 0 if every token has a label.
        generation: fields of the model's generation_config.json.
        padding: what makes batches padded, such as a field of the recipe; None if they are not.

    Raises:
        ValueError: data and recipe do not fit together.
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
        """Set `batches` to those of the stage in `state`; a task without stages has nothing to do."""

    def most_loops(self) -> Mapping[str, int]:
        """Field of the recipe -> the most loops that it may ask for, beside those of `depth`."""
        return {}

    def parts(self) -> Mapping[str, Part]:
        """Name -> what a checkpoint keeps of this process beside the state."""
        return {}

    def is_through(self, state: State) -> bool:
        """Whether the run ends now, although budget remains."""
        return False

    def schedule_step(self, state: State) -> int:
        """Updates since the schedule of the learning rates began, which may restart with a stage."""
        return state.step

    def sizes(self, batch: dict) -> tuple[int, int]:
        """(labels, input tokens) of a batch, over all ranks."""
        world = self.accelerator.num_processes
        return batch["shift_labels"].numel() * world, batch["input_ids"].numel() * world

    def rows_of(self, step: int) -> list[int]:
        """Numbers of the rows of the split train that the batch of update `step`, counted from 0, is made of, over all
        ranks; [] where they are not known."""
        return []

    def describe(self, batch: dict, state: State) -> dict:
        """Further fields of a training record of metrics.jsonl, beside loss and loops."""
        return {}

    @abstractmethod
    def check(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """Make the held-out check, note the result in `state.gate`, and return the record of metrics.jsonl."""

    def advance(self, state: State) -> bool:
        """Begin a new stage if the last check was passed. Returns whether the optimizer has to restart."""
        return False

    def progress(self, state: State) -> dict:
        """Values for the progress bar, beside the loss."""
        return {}

    @abstractmethod
    def summary(self, model: LoopedForCausalLM, state: State, num_loops: int) -> dict:
        """The fields of summary.json that belong to the task, after the last update."""

    @abstractmethod
    def headline(self, summary: dict) -> str:
        """The result of the run in one line."""


class StagedTraining(TaskTraining):
    """A task whose harder rows are added when easier ones are learnt.

    Attributes:
        stages: of the run.
    """

    stages: Stages

    def first_state(self) -> State:
        return State(stage=self.stages.start)

    def is_through(self, state: State) -> bool:
        return self.stages.is_through(state)

    def schedule_step(self, state: State) -> int:
        return self.stages.schedule_step(state)

    def advance(self, state: State) -> bool:
        """Note a passed stage and begin the next one; after the last one, the run may end."""
        if not self.stages.advance(state):
            return False
        self.begin(state)
        return self.stages.curriculum.restart_optimizer

    def progress(self, state: State) -> dict:
        return {"stage": state.stage, "gate": state.gate.get(str(state.stage))}


def load_tokenizer(field_name: str, folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises ValueError, with the recipe's field, if there is none."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise ValueError(f"{field_name}: there is no tokenizer in the folder {folder!r}.")
    with blaming(folder, f"name another folder in {field_name}."):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
