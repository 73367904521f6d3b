"""Results of a run on questions, from its files. Nothing here imports torch, so that tables are quick.

    loops     chosen on the validation rows of trained grades: the fewest within a tenth of a point of the best mean
    reach     highest grade such that it and all lower ones have >= 60 / 90 / 95 % right answers, on the test rows
    trained   mean of the trained grades, and `beyond`, of the higher ones; a line has the same weight as another
    kept      mean over all lines at the largest loop count over that at the chosen one: 1 means no overthinking

A line is a (grade, kind).
"""

from collections.abc import Sequence

from looplab.runs.folder import Run
from looplab.runs.seeds import group_runs, span, to_markdown
from looplab.tasks.base import Graded
from looplab.tasks.quantizing import quantized_cells

from .records import EVALUATION, GRADES, HALTING

THRESHOLDS = (0.6, 0.9, 0.95)  # as of arXiv 2604.07822
TIE = 0.001
ROUNDING = 1e-9  # a loss of one row in a hundred is 0.010000000000000009, and has to count as one point
POINT = 0.01  # share of right answers that a halting rule may lose in any line
SOLVABLE = 0.6  # share of right answers
CRITERION = "loses at most a point of right answers in each solvable grade of the validation rows"

Line = tuple[int, str]


def lines_of(rows: Sequence[dict], split: str) -> dict[Line, dict[int, dict]]:
    """Line -> loop count -> record, of a split. rows: records of grades.jsonl."""
    lines: dict[Line, dict[int, dict]] = {}
    for row in rows:
        if row["split"] == split:
            lines.setdefault((row["grade"], row["kind"]), {})[row["loops"]] = row
    return dict(sorted(lines.items()))


def measure_of(rows: Sequence[dict]) -> str:
    """The measure that counts: `score` where a verifier judged, or `exact`."""
    return "score" if all("score" in row for row in rows) else "exact"


def mean(lines: dict[Line, dict[int, dict]], loops: int, measure: str) -> float | None:
    """Mean of a measure over lines at one loop count; None without lines."""
    values = [at[loops][measure] for at in lines.values()]
    return sum(values) / len(values) if values else None


def best_loops(lines: dict[Line, dict[int, dict]], measure: str) -> int:
    """The fewest loops whose mean is within TIE of the best."""
    means = {count: mean(lines, count, measure) for count in next(iter(lines.values()))}
    return min(count for count, value in means.items() if value >= max(means.values()) - TIE - ROUNDING)


def only(lines: dict, trained: bool) -> dict:
    """The lines whose grade was trained, or was not."""
    return {line: at for line, at in lines.items() if next(iter(at.values()))["trained"] == trained}


def reach_of(lines: dict[Line, dict[int, dict]], loops: int, measure: str, threshold: float) -> int | None:
    """The highest grade such that all lines up to it reach the threshold; None if the lowest does not."""
    reached = None
    for grade in sorted({grade for grade, _ in lines}):
        if min(at[loops][measure] for (own, _), at in lines.items() if own == grade) < threshold:
            return reached
        reached = grade
    return reached


def facts_of(run: Run) -> dict:
    """The numbers that the module docstring explains, by name."""
    rows = run.read(GRADES)
    measure, validation, test = measure_of(rows), lines_of(rows, "validation"), lines_of(rows, "test")
    loops = best_loops(only(validation, True) or validation, measure)
    last = max(row["loops"] for row in rows)
    chosen, at_last = mean(test, loops, measure), mean(test, last, measure)
    return {
        "measure": measure,
        "loops": loops,
        "last": last,
        "learnable": run.summary()["learnable_depth"],
        "reach": {threshold: reach_of(test, loops, measure, threshold) for threshold in THRESHOLDS},
        "trained": mean(only(test, True), loops, measure),
        "beyond": mean(only(test, False), loops, measure),
        "all": chosen,
        "kept": at_last / chosen if chosen else None,
    }


def graded(run: Run) -> Graded:
    """See `Task.graded`."""
    rows = run.read(GRADES)
    measure, lowest = measure_of(rows), {}
    for row in rows:
        key = row["split"], row["loops"], row["grade"], row["trained"]
        lowest[key] = min(row[measure], lowest.get(key, 1.0))
    names = ("split", "loops", "grade", "trained")
    found = [dict(zip(names, key, strict=True)) | {"right": right} for key, right in lowest.items()]
    return Graded(
        found, run.read(EVALUATION)["chance"], halting_loops(run.read(HALTING)) if run.has(HALTING) else None
    )


def halting_loops(rows: Sequence[dict]) -> tuple[float, float] | None:
    """See `Graded.halting`; over the solvable grades of the test rows. rows: records of halting.jsonl."""
    best = next((row["rule"] for row in rows if row["measure"] == "best"), None)
    mine = [row["loops"] for row in rows if row["measure"] == "chosen" and row["rule"] == best and row["solvable"]]
    oracle = [row["loops"] for row in rows if row["measure"] == "oracle" and row["solvable"]]
    return None if best is None else (sum(mine) / len(mine), sum(oracle) / len(oracle))


WORDS = {"exact": "right answers", "score": "mean score of the answers"}


def grades_text(run: Run) -> str:
    """The grid of an evaluated run as text, in %: a line per grade and kind, a column per loop count."""
    rows, evaluation = run.read(GRADES), run.read(EVALUATION)
    loops, chance = sorted({row["loops"] for row in rows}), f"{100 * evaluation['chance']:.1f}"
    if run.bare:
        own = evaluation["num_loops"]
        best, measure, marked = own if own in loops else loops[-1], measure_of(rows), range(0)
        said, marks = f"Questions, {WORDS[measure]} in % (the commonest answer: {chance})", ""
    else:
        facts, (low, high) = facts_of(run), run.trained_loops()
        best, measure, marked = facts["loops"], facts["measure"], range(low, high + 1)
        said = f"Test rows, {WORDS[measure]} in % (the commonest training answer: {chance})"
        marks = "; [ ] and * mark trained loops and grades"
    test = lines_of(rows, "test")
    header = "".join(f"{f'[{count}]' if count in marked else count:>6}" for count in loops)
    wide = max(len("kind"), *(len(kind) for _, kind in test))
    text = [
        f"{said}, read by {evaluation['by']}; a column is a loop count{marks}.",
        f"{'grade':>6}  {'kind':<{wide}} {'n':>6} |{header} | {f'95 % interval at {best} loops':<28}| tokens",
    ]
    for (grade, kind), at in test.items():
        row = at[best]
        values = "".join(f"{100 * at[count][measure]:6.1f}" for count in loops)
        interval = " - ".join(f"{100 * bound:.1f}" for bound in row[f"{measure}_interval"])
        name = f"{grade:>5}{'*' if row['trained'] else ' '}  {kind:<{wide}}"
        text.append(f"{name} {row['n']:>6} |{values} | {interval:<28}| {100 * row['tokens']:6.1f}")
    if run.bare:
        return "\n".join(text)
    text.append(
        f"{best} loops are best on the validation rows of trained grades: "
        f"{percent(facts['trained'])} of trained grades, {percent(facts['beyond'])} beyond them; grades reached: "
        + ", ".join(f"{shown(facts['reach'][t])} at >= {100 * t:.0f} %" for t in THRESHOLDS)
    )
    return "\n".join(text)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def shown(number: int | None) -> str:
    return "none" if number is None else str(number)


def markdown_table(runs: Sequence[Run]) -> str:
    """A Markdown table with a line per group of seeds: mean [lowest, highest] of the test rows over its runs, at the
    loop count that the validation rows choose."""
    rows = []
    for name, members in group_runs(runs).items():
        facts = [facts_of(run) for run in members]
        cells = {"runs": name, "seeds": str(len(members))}
        cells["learnable grade"] = span((fact["learnable"] for fact in facts), 1)
        cells["loops"] = span((fact["loops"] for fact in facts), 1)
        for threshold in THRESHOLDS:
            cells[f"grade >= {100 * threshold:.0f} %"] = span((fact["reach"][threshold] for fact in facts), 1)
        what = "/".join(dict.fromkeys("score" if fact["measure"] == "score" else "right" for fact in facts))
        for part in ("trained", "beyond"):
            cells[f"{what} %, {part}"] = span((fact[part] for fact in facts), 1, 100)
        last = " / ".join(dict.fromkeys(str(fact["last"]) for fact in facts))
        cells[f"kept at {last} loops"] = span((fact["kept"] for fact in facts), 2)
        if all(run.has(HALTING) for run in members):
            best = [next((row for row in run.read(HALTING) if row["measure"] == "best"), None) for run in members]
            cells["loops, best rule"] = span((row and row["loops"] for row in best), 2)
        cells |= quantized_cells(members, "accuracy", 100, 1)
        rows.append(cells)
    return to_markdown(rows)
