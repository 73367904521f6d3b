"""What a run of a LoopBench is measured by: `python -m looplab.study.measuring RUN OUTPUT MEASURE`.

MEASURE is `loopbench_file.Measure` as JSON, and OUTPUT gets one JSON object:

    loops         the loop count that is best on the validation rows, a mean over all grades; the fewest of equals
    right         mean right answers of the test rows there, over all grades; `trained` and `beyond`, over some; and
                  `grades`, for each
    learnable     the highest trained grade such that it and all easier ones have 95 % of their validation rows right
    reach         the highest grade such that it and all easier ones have 60, 90, 95 % of their test rows right
    kept          right answers of test rows of trained grades at more loops, over those at `loops`
    halting       loops of the best halting rule, and of an oracle that knows the grade
    flops         of the training, by `instruments.flops.training_flops`
    kv_bytes      of a token in the cache, at the model's own loop count
    chance        right answers of whoever always says the commonest answer

One process does all of it, since loading the libraries takes longer than most of the parts.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from data_builders import DepthSampler
from looplab.bench.memory import kv_bytes
from looplab.instruments.flops import training_flops
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model, loops_to_try
from looplab.runs.writing import write_whole
from looplab.tasks.registry import TASKS

logger = logging.getLogger(__name__)

THRESHOLDS = (0.6, 0.9, 0.95)  # as of arXiv 2604.07822
LEARNT = 0.95
TIE = 0.001  # a mean this close to the best counts as best


def by_grade(rows: Sequence[Mapping], split: str, loops: int, trained: bool | None = None) -> dict[int, float]:
    """Grade -> right answers, in ascending order. trained: only grades that were trained, or that were not."""
    found = {
        row["grade"]: row["right"]
        for row in rows
        if row["split"] == split and row["loops"] == loops and trained in (None, row["trained"])
    }
    return dict(sorted(found.items()))


def best_loops(rows: Sequence[Mapping], loops: Sequence[int]) -> int:
    """The fewest of `loops` whose mean on the validation rows is within TIE of the best."""
    means = {count: fmean(by_grade(rows, "validation", count).values()) for count in loops}
    return min(count for count, mean in means.items() if mean >= max(means.values()) - TIE)


def reached(grades: Mapping[int, float], threshold: float) -> int | None:
    """The highest grade such that it and all easier ones reach the threshold; None if the easiest does not."""
    found = None
    for grade, right in grades.items():
        if right < threshold:
            break
        found = grade
    return found


def mean_of(grades: Mapping[int, float]) -> float | None:
    return fmean(grades.values()) if grades else None


def flops_of(config, recipe: Mapping, summary: Mapping) -> float:
    """FLOPs of the training, a mean over the loop counts that are drawn."""
    batch, steps = recipe["batch_size"], summary["steps"]
    length = summary["tokens"] / (steps * batch)  # a mean
    depth = DepthSampler(**{name: value for name, value in recipe["depth"].items() if value is not None})
    drawn = zip(depth.depths.tolist(), depth.probabilities.tolist(), strict=True)
    return steps * sum(share * training_flops(config, batch, length, loops) for loops, share in drawn)


def measure_run(run: Run, measure: Mapping) -> dict:
    """The object in OUTPUT, see the module docstring. measure: fields of `loopbench_file.Measure`.

    Raises:
        ValueError: the run has not finished.
    """
    task, summary = TASKS[run.task()], run.summary()
    model, tokenizer = load_run_model(run)
    loops = loops_to_try(model, measure["loops"])
    # Tasks on hops measure every loop to a last one, which some models may not run.
    options = {"max_loops": max(loops)} if "max_loops" in task.options("eval") else {}
    task.evaluate(run, loops=loops, limit=measure["limit"], **options)
    if summary["trained_loops"]["maximum"] > 1:
        try:
            task.halting(run, limit=measure["halting_limit"], max_loops=summary["trained_loops"]["maximum"])
        except ValueError as error:  # no grade is solved: there is nothing that a rule could save
            logger.warning(error)
    found = task.graded(run)
    best = best_loops(found.rows, loops)
    test = by_grade(found.rows, "test", best)
    quality = task.measure(run, tokenizer, measure["kept_limit"])

    def right(count: int) -> float:
        return quality(model, count)[task.measured]

    start = right(best)
    kept = {str(count): right(count) / start for count in loops_to_try(model, measure["kept"]) if start}
    return {
        "loops": best,
        "right": mean_of(test),
        "trained": mean_of(by_grade(found.rows, "test", best, True)),
        "beyond": mean_of(by_grade(found.rows, "test", best, False)),
        "grades": test,
        "learnable": reached(by_grade(found.rows, "validation", best, True), LEARNT),
        "reach": {f"{100 * threshold:.0f}": reached(test, threshold) for threshold in THRESHOLDS},
        "kept": kept,
        "halting": found.halting,
        "chance": found.chance,
        "parameters": summary["parameters"],
        "flops": flops_of(model.config, run.recipe(), summary),
        "kv_bytes": kv_bytes(model),
        "seconds": summary["seconds"],
        "hardest_trained": max(by_grade(found.rows, "test", best, True), default=None),
    }


def main(folder: str, output: str, measure: str) -> None:
    """The arguments RUN, OUTPUT and MEASURE of the module."""
    write_whole(Path(output), json.dumps(measure_run(Run(Path(folder)), json.loads(measure))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
