"""The cells of a study, one per arm and seed: train it, measure it, and keep its rows in NAME.jsonl.

A cell whose rows are there is not run again, unless its recipe, its overrides or the evaluation has changed since. A
training that was cut short goes on. Every cell is a process of its own, and writes what it prints to
runs/NAME/ARM-seedS.log.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from looplab.runs.folder import Run, json_lines, to_json_lines
from looplab.runs.records import locked
from looplab.runs.writing import write_whole

from .study_file import Study, digest_of, flags_of, matches

logger = logging.getLogger(__name__)


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

    @property
    def key(self) -> dict:
        """Fields of its rows."""
        return {"arm": self.arm, "seed": self.seed, "recipe": self.recipe}


def cells_of(name: str, study: Study, runs: Path) -> list[Cell]:
    """All cells, seed by seed, so that every arm has a seed before one arm has all. runs: the folder of runs."""
    recipes = {arm: digest_of(study, what) for arm, what in study.arms.items()}
    return [
        Cell(arm, seed, recipes[arm], runs / name / f"{arm}-seed{seed}") for seed in study.seeds for arm in study.arms
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
    """Raise ValueError if a recipe cannot run, or `looped eval` lacks an option for its task."""
    from looplab.tasks.registry import TASKS
    from looplab.training.recipe import read_recipe

    for name, what in study.arms.items():
        try:
            task = read_recipe(what.recipe, flags_of(study, what, study.seeds[0])).data.task
        except ValueError as error:
            raise ValueError(f"arms.{name}: {error}") from error
        unknown = sorted((study.evaluate | what.evaluate).keys() - TASKS[task].options("eval"))
        if unknown:
            raise ValueError(f"evaluate.{unknown[0]} is no option of `looped eval` for {task}: leave it out.")


def run_cells(name: str, study: Study, path: Path, runs: Path, jobs: int = 1) -> list[str]:
    """Train and measure the cells that have no rows in `path`, and add their rows; returns what failed, a line each.

    Args:
        jobs: cells that run at once. They share the cores.

    Raises:
        ValueError: a recipe that cannot run, before anything runs; another process runs the study.
    """
    check_arms(study)
    cells = cells_of(name, study, runs)
    (runs / name).mkdir(parents=True, exist_ok=True)
    with locked(runs / name / "lock", f"the study {name} is running"):
        left = missing(cells, read_rows(path))
        failed = []
        with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), initial=len(cells) - len(left)) as bar:
            bar.set_description(name)
            futures = {
                pool.submit(run_cell, study, cell, max(1, (os.cpu_count() or 1) // jobs)): cell for cell in left
            }
            for future in as_completed(futures):
                cell = futures[future]
                try:
                    add_rows(path, cells, cell, future.result())
                except (OSError, ValueError) as error:
                    failed.append(f"{cell.arm}, seed {cell.seed}: {error}")
                    logger.warning(failed[-1])
                bar.update()
        return failed


def run_cell(study: Study, cell: Cell, threads: int) -> list[dict]:
    """Rows of one cell, made in processes of their own. Raises ValueError, with the log, if one fails."""
    what = study.arms[cell.arm]
    place = [f"--output_dir={cell.folder.parent}", f"--name={cell.folder.name}"]
    options = []
    for option, value in (study.evaluate | what.evaluate).items():
        options += [f"--{option.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    log = cell.folder.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as output:
        for command in (
            ["train", what.recipe, *place, *flags_of(study, what, cell.seed)],
            ["eval", str(cell.folder), *options],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "looplab.cli", *command],
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
            if done.returncode:
                raise ValueError(f"looped {command[0]} ended with status {done.returncode}, see {log}.")
    run = Run(cell.folder)
    lines = json_lines((cell.folder / study.record).read_text(encoding="utf-8"))
    rows = [line for line in lines if matches(line, study.keep)]
    if not rows:
        raise ValueError(f"no line of {cell.folder / study.record} has {study.keep}: change `keep`, or `evaluate`.")
    return [cell.key | {"commit": run.summary()["commit"]} | row for row in rows]


def add_rows(path: Path, cells: Sequence[Cell], cell: Cell, rows: list[dict]) -> None:
    """Put the rows of a cell in the place of its old ones; the file is in the order of the cells."""
    kept = [row for row in read_rows(path) if not matches(row, {"arm": cell.arm, "seed": cell.seed})]
    order = {(each.arm, each.seed): index for index, each in enumerate(cells)}
    rows = sorted([*kept, *rows], key=lambda row: order.get((row["arm"], row["seed"]), len(order)))
    write_whole(path, to_json_lines(rows))
