"""The task sequence, see `tasks.base.Task`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from looplab.runs.folder import Run
from looplab.tasks.base import Drafting, Figure, Task

from .data import SequenceCurriculum, SequenceData
from .records import HALTING, RECORDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class SequenceTask(Task):
    """Questions with answers of any length."""

    name = kind = "sequence"
    Data, Curriculum = SequenceData, SequenceCurriculum
    records = RECORDS
    figures: ClassVar = {
        "grades": Figure("Right answers in % over grades and loops; a frame around what was trained"),
        "reach": Figure("Right answers by grade, a line per loop count"),
        "halting": Figure("Right answers against mean loops of a token, by halting rule"),
        "lens": Figure("Likeliest next token after every loop, and how far each loop is from the last", "lens"),
        "dynamics": Figure("How the state moves from loop to loop", "dynamics"),
        "training": Figure("Training: loss and held-out measure over time"),
    }
    defaults: ClassVar = {
        "eval --loops": "1 2 4 .. to twice the trained loops, the model's own and the recipe's eval_loops",
        "halting --limit": "32 rows of a grade and kind",
        "halting --max-loops": "the model's own loops",
        "lens --limit": "32 test rows",
        "ask --loops": "1 2 4 8 16",
    }
    measured = "exact"
    drafting = Drafting(texts=16, prompt=64, drawn={}, ends=True)
    measures_any = True

    def training(self, recipe, splits, depth, accelerator, kept_tokenizer):
        from .training import SequenceTraining

        return SequenceTraining(recipe, splits, depth, accelerator, kept_tokenizer)

    def evaluate(self, run: Run, *, loops: Sequence[int] | None = None, limit: int | None = None) -> Path:
        """Write the files of `evaluation.evaluate_run`."""
        from .evaluation import evaluate_run

        return evaluate_run(run, loops, limit)

    def show(self, run: Run) -> str:
        from .results import grades_text

        return grades_text(run)

    def table(self, runs: Sequence[Run]) -> str:
        from .results import markdown_table

        return markdown_table(runs)

    def plot(self, runs: Sequence[Run], output: str | Path | None, *, format: str = "png") -> list[Path]:
        from .figures import plot_runs

        return plot_runs(runs, output, format)

    def halting(self, run: Run, *, limit: int | None = None, max_loops: int | None = None) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `halting.halting_run`."""
        from .halting import halting_run, halting_text

        return halting_run(run, max_loops, limit), halting_text(run.read(HALTING))

    def best_rule(self, run: Run) -> tuple[Mapping | None, str]:
        from .results import CRITERION

        return next((row for row in run.read(HALTING) if row["measure"] == "best"), None), CRITERION

    def graded(self, run: Run):
        from .results import graded

        return graded(run)

    def lens(self, run: Run, *, loops: int | None = None, limit: int | None = None, format: str = "png") -> list[Path]:
        """Write and draw what `lens.lens_run` measures."""
        from .lens import lens_run

        return lens_run(run, loops, limit, format)

    def ask(self, run: Run, question: str | None, *, loops: Sequence[int] | None = None) -> None:
        from .ask import ask

        ask(run, question, loops)

    def measure(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int | None):
        from .quantizing import SequenceMeasure

        return SequenceMeasure(run, tokenizer, limit)

    def quantizing(self, run: Run, tokenizer: "PreTrainedTokenizerBase"):
        from .quantizing import SequenceQuantizing

        return SequenceQuantizing(run, tokenizer)

    def sorts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", limit: int):
        """By grade, at most six of them, from the easiest to the hardest."""
        from .quantizing import sorts_of

        return sorts_of(run, tokenizer, limit)

    def prompts(self, run: Run, tokenizer: "PreTrainedTokenizerBase", count: int, length: int) -> "torch.Tensor":
        """Whole prompts of the split test, of the commonest length that is at most `length`."""
        from .quantizing import prompts_of

        return prompts_of(run, tokenizer, count, length)

    def card(self):
        from .card import SequenceCard

        return SequenceCard()

    def data_licence(self, config: str, licence: str) -> str | None:
        """The licence of the model for data that a seed generates; only the user knows that of other data."""
        return None if config in ("files", "chats") else licence

    def demo_part(self, run: Run, config: dict) -> dict:
        from .card import sequence_part

        return sequence_part(run, config)
