"""What a task is: one object with a method for every verb that may be asked of it.

    verb                       method                       a task without it
    train.py                   training                     every task has it
    looped eval                evaluate, then show          is not evaluated
    looped table, plot         table, plot                  ...
    looped halting, lens, ask  halting, lens, ask
    looped memory              measure                      the value of a model in other KV memories
    looped quantize            blocks                       rows of tokens to calibrate and measure on
    looped bench --run         prompts or time_halting      drafts, or halting, on a trained run
    looped publish             card; data_licence           a page of the Hub
    looped demo                demo_part                    a tab of the page with the loop slider

A task has the verbs whose methods its class defines, with the options that are keyword arguments there: no list
elsewhere says so. `registry.task_for` refuses the others. Methods import what they need when they are called, so that
the command line and tables stay quick: nothing here imports torch.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from looplab.mistakes import Whole
from looplab.runs.folder import NUMBER, RecordFile, Run

from .data import Curriculum, Data

if TYPE_CHECKING:
    import torch
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .card import Card
    from .training import TaskTraining

# Verb of `looped` -> methods, of which a task that has the verb has one.
METHODS = {
    "eval": ("evaluate",),
    "table": ("table",),
    "plot": ("plot",),
    "halting": ("halting",),
    "lens": ("lens",),
    "ask": ("ask",),
    "memory": ("measure",),
    "quantize": ("blocks",),
    "bench": ("prompts", "time_halting"),
    "publish": ("card",),
    "demo": ("demo_part",),
}

# Files that are measured alike on every task that can be.
MEMORY = RecordFile(
    "memory.jsonl",
    "memory",
    {"kv_sharing": str, "chunk": int, "kv_bytes": int, "interval": [NUMBER], "trained": bool},
)
QUANTIZATION = RecordFile(
    "quantization.json", "quantize", {"perplexity": {"before": NUMBER, "after": NUMBER}, "bytes": {}, "linears": {}}
)


@dataclass(frozen=True)
class Figure:
    """A picture of one run, figures/NAME.png.

    Args:
        caption: what it shows, on the card.
        verb: the verb that draws it.
        of_snapshots: the verb also draws it of a snapshot, as NAME_step-N.png.
    """

    caption: str
    verb: str = "plot"
    of_snapshots: bool = False


@dataclass(frozen=True)
class Argument:
    """An option of a verb that the command line has because a task takes it.

    Args:
        help: what it does.
        metavar: what stands for its value in the help.
        type: the range of a number; None for a name.
    """

    help: str
    metavar: str
    type: Whole | None = None


@dataclass(frozen=True)
class Drafting:
    """How texts are begun and continued where `looped bench` times drafts.

    Args:
        texts: how many.
        prompt: tokens that each begins with.
        drawn: arguments of `generate` that say how a token is drawn.
        ends: a text may end before the last token that is asked for.
    """

    texts: int
    prompt: int
    drawn: Mapping[str, float]
    ends: bool


class Task(ABC):
    """A task, see the module docstring.

    Attributes:
        name: in a recipe's `data.task`.
        kind: runs on tasks of one kind are read together; the name of the folder.
        Data, Curriculum: classes of the recipe's sections of these names.
        records: files that are measured, in the order in which they are published.
        figures: name -> picture of a run, in the order of the card.
        files: patterns of other files in a run that measuring leaves there.
        arguments: (verb, option) -> its help and type, of options that are not of the verb itself.
        defaults: "eval --loops" -> what the option is where it is not given, for the help.
        measured: what `measure` finds.
        drafting: of `prompts`.
        demo_requirements: packages that a Space installs for `demo_part`.
    """

    name: str
    kind: str
    Data: type[Data]
    Curriculum: type[Curriculum] = Curriculum
    records: Sequence[RecordFile] = ()
    figures: ClassVar[Mapping[str, Figure]] = {}
    files: Sequence[str] = ()
    arguments: ClassVar[Mapping[tuple[str, str], Argument]] = {}
    defaults: ClassVar[Mapping[str, str]] = {}
    measured: str
    drafting: Drafting
    demo_requirements: Sequence[str] = ()

    @classmethod
    def has(cls, method: str) -> bool:
        """Whether the class defines the method itself."""
        return getattr(cls, method) is not getattr(Task, method)

    @classmethod
    def options(cls, verb: str) -> set[str] | None:
        """Options that the task takes of a verb, as the keyword arguments of its method; None if it lacks the verb."""
        methods = [method for method in METHODS[verb] if cls.has(method)]
        keywords = [inspect.signature(getattr(cls, method)).parameters.values() for method in methods]
        return {p.name for each in keywords for p in each if p.kind is p.KEYWORD_ONLY} if methods else None

    @abstractmethod
    def training(self, recipe, splits: "DatasetDict", depth, accelerator, kept_tokenizer) -> "TaskTraining":
        """The task in training; arguments as of `tasks.training.TaskTraining`."""

    def evaluate(self, run: Run) -> Path:
        """Measure the run at several loop counts and write files of `records`; returns the path of one."""
        raise NotImplementedError

    def show(self, run: Run) -> str:
        """What `evaluate` measured, as text."""
        raise NotImplementedError

    def table(self, runs: Sequence[Run]) -> str:
        """A Markdown line per group of seeds; the keyword `against` names the group to compare the others to."""
        raise NotImplementedError

    def plot(self, runs: Sequence[Run], output: str | Path | None) -> list[Path]:
        """Draw the runs, and groups of seeds where there are several; returns the paths of the pictures.

        Args:
            output: folder for the figures of one run, or for those that show several together; unless given
                RUN/figures, or `figures/<groups>` beside the first run.
        """
        raise NotImplementedError

    def halting(self, run: Run) -> tuple[Path, str]:
        """Measure what halting rules save; returns the file and what it says."""
        raise NotImplementedError

    def lens(self, run: Run) -> list[Path]:
        """Look inside the model; returns the paths of what was written, and prints what it found."""
        raise NotImplementedError

    def ask(self, run: Run, question: str | None) -> None:
        """Print what the model says to one question at several loop counts."""
        raise NotImplementedError

    def measure(
        self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int | None
    ) -> "Callable[[PreTrainedModel, int], dict]":
        """A function: model and loop count -> what the model is worth on the test split.

        Its result has the number `measured`, its 95 % `interval`, and what else there is to say.
        """
        raise NotImplementedError

    def blocks(self, run: Run, tokenizer: "PreTrainedTokenizerBase") -> dict:
        """`data_builders.TextBlocks` of the splits train and test. The task's `measure` finds `perplexity` and
        `block_losses`."""
        raise NotImplementedError

    def prompts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", count: int, length: int) -> "torch.Tensor":
        """(count, length) token ids of beginnings of test texts."""
        raise NotImplementedError

    def time_halting(self, run: Run, number: int, rounds: int) -> list[dict]:
        """Rows of `looped bench`: halting against fixed loop counts on `number` test rows of each sort."""
        raise NotImplementedError

    def card(self) -> "Card":
        """What the model's page on the Hub says."""
        raise NotImplementedError

    def data_licence(self, config: str, licence: str) -> str | None:
        """Licence of the data of a builder's preset, as the Hub spells it; None where only the user can know.

        Args:
            licence: that of the model.
        """
        return None

    def demo_part(self, run: Run, config: dict) -> dict:
        """What demo.json says of a run: `text` for the page, and what its tab needs.

        Args:
            config: config.json of the model.
        """
        raise NotImplementedError
