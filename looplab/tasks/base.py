"""What a task is: one object with a method for every verb that may be asked of it.

    verb                       method                       gives
    train.py                   training                     the task in training; every task has it
    looped eval                evaluate, then show          measurements, then text
    looped table, plot         table, plot                  a Markdown table; figures
    looped halting, lens, ask  halting, lens, ask           measurements; an answer
    looped memory              measure                      the quality of a model under another KV policy
    looped quantize            quantizing                   rows to calibrate and measure on
    looped dynamics            sorts                        rows to watch the state on
    looped bench --run         prompts or time_halting      drafts, or halting, on a trained run
    looped publish             card; data_licence           a page of the Hub
    looped demo                demo_part                    a tab of the page with the loop slider

A task has the verbs whose methods its class defines, and a verb has the options that are keyword-only arguments of its
method; there is no other list of them. `registry.task_for` refuses the rest. A method imports what it needs when it is
called, and nothing here imports torch, so that the command line and tables stay quick.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from looplab.runs.folder import NUMBER, RecordFile, Run

from .data import Curriculum, Data

if TYPE_CHECKING:
    import torch
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .card import Card
    from .quantizing import Quantizing
    from .training import TaskTraining

# Verb of `looped` -> methods; a task has the verb if it has one of them.
METHODS = {
    "eval": ("evaluate",),
    "table": ("table",),
    "plot": ("plot",),
    "halting": ("halting",),
    "lens": ("lens",),
    "ask": ("ask",),
    "memory": ("measure",),
    "quantize": ("quantizing",),
    "dynamics": ("sorts",),
    "bench": ("prompts", "time_halting", "chains"),
    "publish": ("card",),
    "demo": ("demo_part",),
}

# What `looped memory` writes, whatever the task.
MEMORY = RecordFile(
    "memory.jsonl",
    "memory",
    {"kv_sharing": str, "chunk": int, "kv_bytes": int, "interval": [NUMBER], "trained": bool},
)

# What `looped dynamics` writes, whatever the task.
DYNAMICS = RecordFile("dynamics.jsonl", "dynamics", {"sort": str, "loops": int, "n": int})


@dataclass(frozen=True)
class Graded:
    """What was measured of a run whose rows have a difficulty, a number of hops or a grade: `Task.graded`.

    Args:
        rows: for every split (validation, test), loop count and difficulty: split, loops, grade, right (share of right
            answers, the lowest of its kinds), trained (whether the training had the difficulty).
        chance: share of right answers of a trivial rule, which always says the commonest answer.
        halting: mean loops of the halting rule with the fewest that loses at most a point, and of an oracle that knows
            the difficulty; None if nothing was measured, no difficulty is solved, or every rule loses more.
    """

    rows: Sequence[Mapping]
    chance: float
    halting: tuple[float, float] | None


@dataclass(frozen=True)
class Figure:
    """A figure of one run, figures/NAME.png, or another format.

    Args:
        caption: on the card.
        verb: draws the figure.
        of_snapshots: the verb also draws it for a snapshot, as NAME_step-N.png.
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
        type: `Whole` or `Real` for the range of a number, str for a text, None for a name.
        many: it takes one or more of them.
    """

    help: str
    metavar: str
    type: Callable[[str], object] | None = None
    many: bool = False


@dataclass(frozen=True)
class Drafting:
    """How `looped bench` begins and continues texts when it times drafts.

    Args:
        texts: number of texts.
        prompt: tokens that a text begins with.
        drawn: arguments of `generate` for sampling.
        ends: whether a text may end early.
    """

    texts: int
    prompt: int
    drawn: Mapping[str, float]
    ends: bool


class Task(ABC):
    """A task, see the module docstring.

    Attributes:
        name: the value of `data.task` in a recipe.
        kind: runs on tasks of one kind can be read together; it is the name of the folder.
        Data, Curriculum: classes of the recipe's sections `data` and `curriculum`.
        records: measured files, in the order of publication.
        figures: name -> figure of a run, in the order of the card.
        files: patterns of other files that a measurement leaves in a run.
        arguments: (verb, option) -> an option of the verb that only some tasks take.
        defaults: "eval --loops" -> default of the option, for the help.
        measured: the field of `measure` with the main number.
        drafting: for `prompts`.
        demo_requirements: packages that a Space installs for `demo_part`.
        measures_any: `evaluate` measures a model without a recipe, too, on the data that a user names for it.
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
    measures_any: bool = False

    @classmethod
    def has(cls, method: str) -> bool:
        """Whether the task defines the method."""
        return getattr(cls, method) is not getattr(Task, method)

    @classmethod
    def options(cls, verb: str) -> set[str] | None:
        """The options of a verb, the keyword-only arguments of its method; None if the task lacks the verb."""
        methods = [method for method in METHODS[verb] if cls.has(method)]
        keywords = [inspect.signature(getattr(cls, method)).parameters.values() for method in methods]
        return {p.name for each in keywords for p in each if p.kind is p.KEYWORD_ONLY} if methods else None

    @abstractmethod
    def training(self, recipe, splits: "DatasetDict", depth, accelerator, kept_tokenizer) -> "TaskTraining":
        """The task in training, see `tasks.training.TaskTraining`."""

    def evaluate(self, run: Run) -> Path:
        """Measure the run at several loop counts, write files of `records`, and return the path of one."""
        raise NotImplementedError

    def show(self, run: Run) -> str:
        """The measurements of `evaluate` as text."""
        raise NotImplementedError

    def table(self, runs: Sequence[Run]) -> str:
        """A Markdown table with a line per group of seeds. The keyword `against` names the baseline."""
        raise NotImplementedError

    def plot(self, runs: Sequence[Run], output: str | Path | None, *, format: str = "png") -> list[Path]:
        """Draw the runs, and groups of seeds if there are several runs; returns the paths of the figures.

        Args:
            output: folder for the figures of a single run, or of groups; unless given, RUN/figures for a run, and
                `figures/<groups>` beside the first run for groups.
            format: of the figures, see `drawing.save`.
        """
        raise NotImplementedError

    def halting(self, run: Run) -> tuple[Path, str]:
        """Measure what halting rules save; returns the file and its text."""
        raise NotImplementedError

    def best_rule(self, run: Run) -> tuple[Mapping | None, str]:
        """Of a task that has `halting`: the record of the rule that `--save` writes, None if no rule is good enough;
        and what a rule has to do for that, the end of a sentence about it."""
        raise NotImplementedError

    def graded(self, run: Run) -> Graded:
        """What `evaluate` and, if it ran, `halting` have measured, by difficulty: for `looped loopbench`."""
        raise NotImplementedError

    def own_loss(self, run: Run) -> float:
        """Nats per token of held-out text at the model's own loop count, as `evaluate` has measured them.

        Raises:
            ValueError: the run is not of text, or was not evaluated there.
        """
        raise ValueError(f"{run} is of the task {self.name}, and losses of text are needed: name runs on text.")

    def lens(self, run: Run) -> list[Path]:
        """Look inside the model; returns the paths of the files that were written."""
        raise NotImplementedError

    def ask(self, run: Run, question: str | None) -> None:
        """Print the model's answer to a question at several loop counts."""
        raise NotImplementedError

    def measure(
        self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int | None
    ) -> "Callable[[PreTrainedModel, int], dict]":
        """A function of (model, loop count) that measures the model on the test split.

        It returns the field `measured`, its 95 % `interval`, and further fields. limit: most rows or blocks.
        """
        raise NotImplementedError

    def quantizing(self, run: Run, tokenizer: "PreTrainedTokenizerBase") -> "Quantizing":
        """Rows of the run's data, see `tasks.quantizing.Quantizing`."""
        raise NotImplementedError

    def sorts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int) -> "dict[str, list[torch.Tensor]]":
        """Test rows by sort, as batches of ids (b, T) without padding. limit: most rows of a sort."""
        raise NotImplementedError

    def prompts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", count: int, length: int) -> "torch.Tensor":
        """Token ids (at most count, at most length): the beginnings of test texts."""
        raise NotImplementedError

    def time_halting(self, run: Run, number: int, rounds: int) -> list[dict]:
        """Rows of `looped bench`: halting against a fixed loop count, on `number` test rows of each hop count."""
        raise NotImplementedError

    def chains(
        self, run: Run, tokenizer: "PreTrainedTokenizerBase", number: int, most: int
    ) -> "list[tuple[list[int], int, int]]":
        """Test questions of at most `most` hops, `number` of each hop count: token ids, hops, and the answer's id."""
        raise NotImplementedError

    def card(self) -> "Card":
        """The model's card on the Hub."""
        raise NotImplementedError

    def data_licence(self, config: str, licence: str) -> str | None:
        """The licence of the data of a builder's preset, as the Hub spells it; None if only the user can know it.

        Args:
            licence: the licence of the model.
        """
        return None

    def demo_part(self, run: Run, config: dict) -> dict:
        """The section of demo.json about a run: `text` for the page, and the fields of its tab.

        Args:
            config: the fields of the model's config.json.
        """
        raise NotImplementedError
