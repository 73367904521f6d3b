"""The cells of a study, one per arm and seed: train it, measure it, and keep its rows in NAME.jsonl.

A cell whose rows are there is not run again, unless its recipe, its overrides or the evaluation has changed since. A
training that was cut short goes on. Every cell is a process of its own, and writes what it prints to
runs/NAME/ARM-seedS.log.
"""

import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TextIO

from tqdm.auto import tqdm

from looplab.runs.folder import Run, json_lines, to_json_lines
from looplab.runs.records import locked
from looplab.runs.writing import write_whole
from looplab.tasks.base import Task
from looplab.tasks.registry import TASKS, spelt

from .study_file import Study, digests_of, flags_of, folder_of, matches, named

logger = logging.getLogger(__name__)

TRAINING = defaultdict(Lock)  # folder of a run -> held while it is trained: several cells may use one run


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        recipe: digest of what its rows depend on.
        folder: of the run.
    """

    arm: str
    seed: int
    recipe: str
    folder: Path

    def beside(self, suffix: str) -> Path:
        """The file FOLDER + suffix. The name of an arm may have dots."""
        return self.folder.with_name(self.folder.name + suffix)

    @property
    def key(self) -> dict:
        """Fields of its rows."""
        return {"arm": self.arm, "seed": self.seed, "recipe": self.recipe}


def cells_of(name: str, study: Study, runs: Path) -> list[Cell]:
    """All cells, seed by seed, so that every arm has a seed before one arm has all. runs: the folder of runs."""
    recipes, trainings = digests_of(study), runs / (study.folder or name)
    return [
        Cell(arm, seed, recipes[arm], trainings / folder_of(arm, seed)) for seed in study.seeds for arm in study.arms
    ]


def read_rows(path: Path) -> list[dict]:
    """The rows of a study; none without the file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        rows = json_lines(path.read_text(encoding="utf-8")) if path.is_file() else []
        if not all(isinstance(row.get("arm"), str) and isinstance(row.get("seed"), int) for row in rows):
            raise ValueError("a row has no arm or no seed")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or delete it and run the study again.") from error
    return rows


def missing(cells: Sequence[Cell], rows: Sequence[Mapping]) -> list[Cell]:
    """Cells without rows, or with rows of another recipe."""
    return [cell for cell in cells if not any(matches(row, cell.key) for row in rows)]


def check_arms(study: Study) -> None:
    """Raise ValueError if a recipe cannot run, or its task cannot be measured as it is written."""
    for name, what in study.arms.items():
        task = task_of_arm(study, name)
        options = task.options(study.measure)
        if options is None:
            raise ValueError(f"arms.{name}: there is no `looped {study.measure}` for {task.name}: change `measure`.")
        files = [each.name for each in task.records if each.verb == study.measure and each.name.endswith(".jsonl")]
        if study.record not in files:
            raise ValueError(
                f"record {study.record} is no file that `looped {study.measure}` writes for {task.name}: name one of "
                f"{', '.join(files)}."
            )
        # `memory` is the same for every task: the command knows its options, and refuses others.
        unknown = sorted((study.evaluate | what.evaluate).keys() - options)
        if unknown and study.measure != "memory":
            raise ValueError(
                f"evaluate.{unknown[0]} is no option of `looped {study.measure}` for {task.name}: leave it out."
            )


def measurement(study: Study, arm: str, run: Path) -> list[str]:
    """The arguments of `looped` that measure a run of an arm."""
    options = []
    for option, value in (study.evaluate | study.arms[arm].evaluate).items():
        options += [spelt(option), *map(str, value if isinstance(value, list) else [value])]
    return [study.measure, str(run), *options]


def task_of_arm(study: Study, name: str) -> Task:
    """What an arm is trained on. Raises ValueError if its recipe cannot run."""
    from looplab.training.recipe import read_recipe

    arm = study.arms[name]
    try:
        return TASKS[read_recipe(arm.recipe, flags_of(study, arm, study.seeds[0], Path("runs"))).data.task]
    except ValueError as error:
        raise ValueError(f"arms.{name}: {error}") from error


def run_cells(name: str, study: Study, path: Path, runs: Path, jobs: int = 1) -> list[str]:
    """Train and measure the cells that have no rows in `path`, and add their rows; returns what failed, a line each.

    Args:
        jobs: cells that run at once. They share the cores.

    Raises:
        ValueError: another process runs the study.
    """
    cells = cells_of(name, study, runs)
    with alone(study.folder or name, runs), tqdm(total=len(cells), desc=name) as bar:
        return fill(path, cells, [(cell.arm, cell.seed) for cell in cells], partial(run_cell, study), jobs, bar)


@contextmanager
def alone(name: str, runs: Path) -> Iterator[None]:
    """Within the block, no other process trains in runs/NAME. Raises ValueError if one does."""
    (runs / name).mkdir(parents=True, exist_ok=True)
    with locked(runs / name / "lock", f"the study {name} is running"):
        yield


def fill(
    path: Path,
    cells: Sequence[Cell],
    order: Sequence[tuple[str, int]],
    work: Callable[[Cell, int], list[dict]],
    jobs: int,
    bar: tqdm,
) -> list[str]:
    """Put the rows that `work(cell, threads)` makes of every cell without rows into `path`; returns what failed, a
    line each.

    Args:
        order: of the file, see `add_rows`.
        bar: counts the cells.
    """
    left = missing(cells, read_rows(path))
    bar.update(len(cells) - len(left))
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, cell, max(1, (os.cpu_count() or 1) // jobs)): cell for cell in left}
        for future in as_completed(futures):
            cell = futures[future]
            try:
                add_rows(path, order, cell, future.result())
            except (OSError, ValueError) as error:
                failed.append(f"{cell.arm}, seed {cell.seed}: {error}")
                logger.warning(failed[-1])
            bar.update()
    return failed


def run_cell(study: Study, cell: Cell, threads: int) -> list[dict]:
    """Rows of one cell, made in processes of their own. Raises ValueError, with the log, if one fails."""
    with open(cell.beside(".log"), "w", encoding="utf-8") as log:
        train_cell(study, cell.arm, cell.seed, cell.folder.parent, log, threads)
        run_module(["looplab.cli", *measurement(study, cell.arm, cell.folder)], log, threads)
    run = Run(cell.folder)
    lines = json_lines((cell.folder / study.record).read_text(encoding="utf-8"))
    rows = [line for line in lines if matches(line, study.keep)]
    if not rows:
        raise ValueError(f"no line of {cell.folder / study.record} has {study.keep}: change `keep`, or `evaluate`.")
    return [cell.key | {"commit": run.summary()["commit"]} | row for row in rows]


def train_cell(study: Study, arm: str, seed: int, trainings: Path, log: TextIO, threads: int) -> None:
    """Train an arm with a seed, or go on with it; and before it the arms whose runs it uses.

    trainings: the folder of the runs. `log`, `threads` and what it raises: see `run_module`.
    """
    what, name = study.arms[arm], folder_of(arm, seed)
    for before in sorted(named(what.overrides)):
        train_cell(study, before, seed, trainings, log, threads)
    place = [f"--output_dir={trainings}", f"--name={name}"]
    with TRAINING[trainings / name]:
        run_module(
            ["looplab.cli", "train", what.recipe, *place, *flags_of(study, what, seed, trainings)], log, threads
        )


def run_module(command: Sequence[str], log: TextIO, threads: int) -> None:
    """Run a module of this package with its arguments.

    Args:
        log: a file that gets what it prints.
        threads: of it, unless OMP_NUM_THREADS says otherwise: on a busy machine, two that wait for each other are
            slower by far than one.

    Raises:
        ValueError: it failed; the message names the log.
    """
    done = subprocess.run(
        [sys.executable, "-m", *command],
        stdout=log,
        stderr=log,
        env={"OMP_NUM_THREADS": str(threads)} | os.environ,
    )
    if done.returncode:
        raise ValueError(f"its process ended with status {done.returncode}, see {log.name}.")


def add_rows(path: Path, order: Sequence[tuple[str, int]], cell: Cell, rows: list[dict]) -> None:
    """Put the rows of a cell in the place of its old ones. order: arm and seed of the cells, as the file has them."""
    kept = [row for row in read_rows(path) if not matches(row, {"arm": cell.arm, "seed": cell.seed})]
    places = {key: index for index, key in enumerate(order)}
    rows = sorted([*kept, *rows], key=lambda row: places.get((row["arm"], row["seed"]), len(places)))
    write_whole(path, to_json_lines(rows))
