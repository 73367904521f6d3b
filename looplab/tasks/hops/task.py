"""Chains of hops as a task: its verbs."""

from collections.abc import Sequence
from pathlib import Path

from looplab.runs.folder import Run
from looplab.tasks.base import refuse_masked

from .data import HopCurriculum, HopData


class HopReader:
    """Runs on chains of hops."""

    Data, Curriculum = HopData, HopCurriculum

    def training(self, recipe, splits, depth, accelerator, kept_tokenizer):
        """The task in training, see `tasks.training.TaskTraining`."""
        from .training import HopTraining

        return HopTraining(recipe, splits, depth, accelerator, kept_tokenizer)

    def evaluate(self, run: Run, *, loops, limit, max_loops, max_hops, masked) -> Path:
        """Write the files of `evaluation.evaluate_run`; None is its default.

        Raises:
            ValueError: `masked` is given: there are no molecules to write.
        """
        from .evaluation import MAX_LOOPS, evaluate_run

        refuse_masked(run, masked)
        max_loops = MAX_LOOPS if max_loops is None else max_loops
        return evaluate_run(run.folder, loops=loops, limit=limit, max_loops=max_loops, max_hops=max_hops)

    def halting(self, run: Run, *, limit, max_loops, max_hops) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `halting.halting_run`; returns it and what it says."""
        from .evaluation import MAX_LOOPS
        from .halting import halting_run
        from .results import halting_text

        max_loops = MAX_LOOPS if max_loops is None else max_loops
        path = halting_run(run.folder, max_loops=max_loops, max_hops=max_hops, limit=limit)
        return path, halting_text(run.halting())

    def show(self, run: Run) -> None:
        """Print what `evaluate` measured."""
        from .evaluation import print_grid
        from .results import depth_text

        print_grid(run)
        print(f"\n{depth_text(run)}")

    def table(self, runs: Sequence[Run], against: str | None) -> str:
        """A Markdown line per group of seeds.

        Raises:
            ValueError: `against` is given.
        """
        from .results import markdown_table

        if against is not None:
            raise ValueError(
                f"--against compares runs on text or on molecules, and {runs[0].folder} is one on {runs[0].task()}."
            )
        return markdown_table(runs)

    def plot(self, runs: Sequence[Run], output: str | Path | None) -> list[Path]:
        """Draw the runs and their groups; returns the PNG paths."""
        from .figures import plot_runs

        return plot_runs([run.folder for run in runs], output)
