"""`looped loopbench`: the cells of tasks x architectures, their learning rates first, and their rows in NAME.jsonl.

    for every task:
        every architecture x rate x tuning seed     a training; its row has the right answers on validation rows
        every architecture x seed, at its rate      a training, and what `measuring.py` says of it

The rows are the record: a cell whose row is there is not run again, unless what it depends on has changed since.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm

from looplab.runs.folder import Run

from .cells import Cell, alone, cells_of, fill, read_rows, run_module, task_of_arm, train_cell
from .loopbench_file import RIGHT, Bench, Pair, arm_name, pairs_of, reporting, study_of, tuning
from .study_file import Study

Names = tuple[Sequence[str], Sequence[str], Sequence[int]]  # tasks, architectures and seeds


def run_bench(name: str, bench: Bench, names: Names, path: Path, runs: Path, jobs: int) -> list[str]:
    """Run the cells that have no rows in `path`, and add their rows; returns what failed, a line each.

    Args:
        names: that are run.
        jobs: cells that run at once.

    Raises:
        ValueError: a name that nobody knows or a recipe that cannot run, before anything runs; another process runs
            the bench.
    """
    tasks, architectures, seeds = names
    pairs = pairs_of(bench, tasks, architectures)
    if not pairs:
        raise ValueError(
            f"{' and '.join(tasks)} cannot have {' or '.join(architectures)}, by `without` of the bench: name other "
            "architectures."
        )
    rates = tuning(bench, pairs)
    for arm in rates.arms:
        if not task_of_arm(rates, arm).has("graded"):
            raise ValueError(f"arms.{arm}: the rows of its task have no grades, by which a bench is measured.")
    study_of(bench, rates.arms, seeds)  # which refuses tuning seeds
    tried = len(bench.rates) * len(bench.tuned_on) if len(bench.rates) > 1 else 0
    order, failed = order_of(bench, read_rows(path), names), []
    with alone(name, runs), tqdm(total=len(pairs) * (tried + len(seeds))) as bar:
        bar.set_description(name)
        for task in dict.fromkeys(pair.task for pair in pairs):
            mine = {pair.arm: pair for pair in pairs if pair.task == task}
            rates = tuning(bench, list(mine.values()))
            if len(bench.rates) > 1:
                failed += fill(path, cells_of(name, rates, runs), order, partial(tune, rates, mine), jobs, bar)
            study = reporting(bench, list(mine.values()), seeds, read_rows(path))
            if study is not None:
                failed += fill(path, cells_of(name, study, runs), order, partial(report, study, mine), jobs, bar)
    return failed


def order_of(bench: Bench, rows: Sequence[Mapping], names: Names) -> list[tuple[str, int]]:
    """Arm and seed of the rows of NAME.jsonl, in order: task by task, the rates of an architecture first. names: that
    are asked for, beside those of the bench and of the rows."""
    known = bench.tasks, bench.architectures, bench.seeds
    tasks, architectures, seeds = (
        dict.fromkeys([*own, *(row[field] for row in rows), *more])
        for own, field, more in zip(known, ("task", "architecture", "seed"), names, strict=True)
    )
    order = []
    for arm in (arm_name(task, architecture) for task in tasks for architecture in architectures):
        order += [(f"{arm}.{rate}", seed) for seed in bench.tuned_on for rate in bench.rates]
        order += [(arm, seed) for seed in seeds]
    return order


def tune(study: Study, pairs: Mapping[str, Pair], cell: Cell, threads: int) -> list[dict]:
    """The row of a training at one rate: right answers of the held-out check at its end, a mean over grades."""
    with open(cell.beside(".log"), "w", encoding="utf-8") as log:
        train_cell(study, cell.arm, cell.seed, cell.folder.parent, log, threads)
    summary = Run(cell.folder).summary()
    found = {RIGHT: fmean(summary["gate"].values()), "seconds": summary["seconds"]}
    arm, _, rate = cell.arm.rpartition(".")
    return [row_of(cell, pairs[arm], summary, {"rate": rate} | found)]


def report(study: Study, pairs: Mapping[str, Pair], cell: Cell, threads: int) -> list[dict]:
    """The row of a training that is reported."""
    output = cell.beside(".json")
    measuring = ["looplab.study.measuring", str(cell.folder), str(output), json.dumps(study.arms[cell.arm].evaluate)]
    with open(cell.beside(".log"), "w", encoding="utf-8") as log:
        train_cell(study, cell.arm, cell.seed, cell.folder.parent, log, threads)
        run_module(measuring, log, threads)
    found = json.loads(output.read_text(encoding="utf-8"))
    return [row_of(cell, pairs[cell.arm], Run(cell.folder).summary(), found)]


def row_of(cell: Cell, pair: Pair, summary: Mapping, found: Mapping) -> dict:
    """A row of NAME.jsonl: what the cell is, and what was found."""
    names = {"task": pair.task, "architecture": pair.architecture}
    return cell.key | {"commit": summary["commit"]} | names | dict(found)
