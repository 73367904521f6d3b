"""The task sequence, see `tasks.base.Task`."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from looplab.runs.folder import Run
from looplab.tasks.base import Figure, Task

from .data import SequenceCurriculum, SequenceData
from .records import RECORDS


class SequenceTask(Task):
    """Questions with answers of any length."""

    name = kind = "sequence"
    Data, Curriculum = SequenceData, SequenceCurriculum
    records = RECORDS
    figures: ClassVar = {
        "grades": Figure("Right answers in % over grades and loops; a frame around what was trained"),
        "reach": Figure("Right answers by grade, a line per loop count"),
        "training": Figure("Training: loss and held-out measure over time"),
    }
    defaults: ClassVar = {
        "eval --loops": "1 2 4 .. to twice the trained loops, the model's own and the recipe's eval_loops",
    }
    measured = "exact"

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
