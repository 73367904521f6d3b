"""How `looped eval`, `table` and `plot` read a run: chosen once, by its task.

    reader            reads                measures                      tables and draws
    HopReader         khop, composition    accuracy over loops x hops    learnable depth, reach, heat maps
    TextReader        text                 test perplexity by loops      perplexity, differences, loss over tokens
    MoleculeReader    molecules            samples, validity by loops    validity and its kin, faults by loops

A reader imports what a command needs when it is called, so that tables stay quick.
"""

from collections.abc import Sequence
from pathlib import Path

from looplab.runs.folder import Run


class HopReader:
    """Runs on chains of hops."""

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
        from looplab.runs.seeds import markdown_table

        if against is not None:
            raise ValueError(
                f"--against compares runs on text or on molecules, and {runs[0].folder} is one on {runs[0].task()}."
            )
        return markdown_table(runs)

    def plot(self, runs: Sequence[Run], output: str | Path | None) -> list[Path]:
        """Draw the runs and their groups; returns the PNG paths."""
        from .figures import plot_runs

        return plot_runs([run.folder for run in runs], output)


class TextReader:
    """Runs on text; the arguments mean what they do to `HopReader`."""

    def evaluate(self, run: Run, *, loops, limit, max_loops, max_hops, masked) -> Path:
        """Write the files of `perplexity.evaluate_text`.

        Raises:
            ValueError: `max_loops`, `max_hops` or `masked` is given: text has no chains to follow and no molecules.
        """
        from .perplexity import evaluate_text

        refuse_hop_options(run, max_loops, max_hops)
        refuse_masked(run, masked)
        return evaluate_text(run.folder, loops=loops, limit=limit)

    def halting(self, run: Run, *, limit, max_loops, max_hops) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `exits.exits_run`; returns it and what it says.

        Raises:
            ValueError: `max_hops` is given.
        """
        from .exits import exits_run, exits_text

        refuse_hop_options(run, None, max_hops)
        path = exits_run(run.folder, num_loops=max_loops, limit=limit)
        return path, exits_text(run.halting())

    def show(self, run: Run) -> None:
        from .text_results import loops_text

        print(f"\n{run.folder}\n{loops_text(run)}")

    def table(self, runs: Sequence[Run], against: str | None) -> str:
        """A Markdown line per group of seeds, each also compared to the group `against` where it is given."""
        from .text_results import text_table

        return text_table(runs, against)

    def plot(self, runs: Sequence[Run], output: str | Path | None) -> list[Path]:
        from .figures import plot_text_runs

        return plot_text_runs(runs, output)


class MoleculeReader:
    """Runs on molecules; `limit` and `masked` count samples, other arguments mean what they do to `HopReader`."""

    def evaluate(self, run: Run, *, loops, limit, max_loops, max_hops, masked) -> Path:
        """Write the files of `molecules.evaluate_molecules`.

        Raises:
            ValueError: `max_loops` or `max_hops` is given.
        """
        from .molecules import evaluate_molecules

        refuse_hop_options(run, max_loops, max_hops)
        return evaluate_molecules(run.folder, loops=loops, limit=limit, masked=masked)

    def halting(self, run: Run, *, limit, max_loops, max_hops) -> tuple[Path, str]:
        """Write RUN/halting.jsonl by `molecule_exits.exits_of_molecules`; returns it and what it says.

        Raises:
            ValueError: `max_hops` is given.
        """
        from .molecule_exits import exits_of_molecules, molecule_exits_text

        refuse_hop_options(run, None, max_hops)
        path = exits_of_molecules(run.folder, num_loops=max_loops, limit=limit)
        return path, molecule_exits_text(run.halting())

    def show(self, run: Run) -> None:
        from .molecule_results import molecules_text

        print(f"\n{run.folder}\n{molecules_text(run)}")

    def table(self, runs: Sequence[Run], against: str | None) -> str:
        """A Markdown line per group of seeds, each also compared to the group `against` where it is given."""
        from .molecule_results import molecules_table

        return molecules_table(runs, against)

    def plot(self, runs: Sequence[Run], output: str | Path | None) -> list[Path]:
        from .figures import plot_molecule_runs

        return plot_molecule_runs(runs, output)


def refuse_hop_options(run: Run, max_loops: int | None, max_hops: int | None) -> None:
    for option, value in {"--max-loops": max_loops, "--max-hops": max_hops}.items():
        if value is not None:
            raise ValueError(
                f"{option} is for tasks with hops, and {run.folder} is a run on {run.task()}: leave it out."
            )


def refuse_masked(run: Run, masked: int | None) -> None:
    if masked is not None:
        raise ValueError(f"--masked is for molecules, and {run.folder} is a run on {run.task()}: leave it out.")


Reader = HopReader | TextReader | MoleculeReader
READERS: dict[str, Reader] = {
    "khop": HopReader(),
    "composition": HopReader(),
    "text": TextReader(),
    "molecules": MoleculeReader(),
}


def reader_of(runs: Sequence[Run]) -> Reader:
    """The reader of all of `runs`.

    Raises:
        ValueError: they need different readers, or a recipe's task is unknown.
    """
    for run in runs:
        if run.task() not in READERS:
            raise ValueError(f"{run.folder}: there is no task {run.task()!r}; there are {', '.join(READERS)}.")
        if type(READERS[run.task()]) is not type(READERS[runs[0].task()]):
            raise ValueError(
                f"{runs[0].folder} is a run on {runs[0].task()} and {run.folder} on {run.task()}: read them apart."
            )
    return READERS[runs[0].task()]
