"""Results of a run on hops, from its files: how many hops it reaches, what more loops do, what halting saves.

    loops      chosen on the validation rows: one loop count for all hop counts, or one for each
    accuracy   measured on the test rows, other chains of the same hop counts
    reach      largest hop count such that it and all smaller ones have >= 60 / 90 / 95 % (arXiv 2604.07822)
    ratio      reach at 60 % over the learnable depth, the deepest hop count that passed the held-out check in training
    kept       accuracy after the last loop over accuracy at the chosen loop count: 1 means no overthinking

A line of a table is a (split kind, hop count), and every line has the same weight in a mean. Nothing here imports
torch, so that tables are quick.
"""

from collections.abc import Sequence

from looplab.runs.folder import Run
from looplab.runs.seeds import group_runs, span, to_markdown
from looplab.tasks.base import Graded
from looplab.tasks.quantizing import quantized_cells

from .records import EVALUATION, HALTING, LOOPS

THRESHOLDS = (0.6, 0.9, 0.95)  # arXiv 2604.07822 has them for generalization ratio, "strong", and curriculum

# A mean this close to the best counts as best, so that a single row does not choose 50 loops over 12.
TIE = 0.001
CRITERION = "loses at most a point at each solvable hop count of the validation rows"  # of a rule that is saved
ROUNDING = 1e-9  # a loss of one row in a hundred is 0.010000000000000009, and has to count as one point

Line = tuple[str, int]


def hops_solved(rows: Sequence[dict], loops: int, threshold: float) -> int:
    """Largest hop count such that it and all smaller ones reach `threshold` with `loops` loops; 0 if none does.

    Only the split kinds atomic, id and ood count; the finer kinds of the task composition are not in the paper's
    measure.
    """
    worst = {}
    for row in rows:
        if row["loops"] == loops and row["split_kind"] in ("atomic", "id", "ood"):
            worst[row["hops"]] = min(row["accuracy"], worst.get(row["hops"], 1.0))
    solved = 0
    for hops in sorted(worst):
        if worst[hops] < threshold:
            break
        solved = hops
    return solved


def lines_of(rows: Sequence[dict], split: str, field: str = "accuracy") -> dict[Line, list[float]]:
    """Line -> `field` after each loop, for a split. rows: records of loops.jsonl."""
    lines = {}
    for row in sorted((row for row in rows if row["split"] == split), key=lambda row: row["loops"]):
        lines.setdefault((row["split_kind"], row["hops"]), []).append(row[field])
    return lines


def fewest_near_best(accuracies: Sequence[float], tie: float = TIE) -> int:
    """The smallest loop count whose accuracy is within `tie` of the best, from the accuracies after each loop."""
    best = max(accuracies)
    return next(loops for loops, accuracy in enumerate(accuracies, start=1) if accuracy >= best - tie - ROUNDING)


def best_loops(lines: dict[Line, list[float]]) -> int:
    """The loop count with the best mean accuracy over the lines."""
    return fewest_near_best([sum(column) / len(column) for column in zip(*lines.values(), strict=True)])


def depth_facts(run: Run) -> dict:
    """The numbers that the module docstring explains, by name; a ratio is None if it would divide by zero."""
    rows = run.read(LOOPS)
    validation, test = lines_of(rows, "validation"), lines_of(rows, "test")
    loops = best_loops(validation)
    # A test line without validation rows takes the common loop count.
    own = {line: fewest_near_best(validation[line]) if line in validation else loops for line in test}
    at_own = [
        {"split_kind": kind, "hops": hops, "loops": 0, "accuracy": test[kind, hops][count - 1]}
        for (kind, hops), count in own.items()
    ]
    learnable = run.summary()["learnable_depth"]
    single = {threshold: hops_solved([row for row in rows if row["split"] == "test"], loops, threshold)
              for threshold in THRESHOLDS}  # fmt: skip
    kinds = {}
    for (kind, _), values in test.items():
        kinds.setdefault(kind, []).append(values[loops - 1])
    last = {line: values[-1] for line, values in test.items()}
    peak = {line: test[line][own[line] - 1] for line in test}
    chosen = sum(values[loops - 1] for values in test.values())
    return {
        "learnable_depth": learnable,
        "loops": loops,
        "max_loops": len(next(iter(test.values()))),
        "reach": single,
        "reach_own_loops": {threshold: hops_solved(at_own, 0, threshold) for threshold in THRESHOLDS},
        "ratio": single[0.6] / learnable if learnable else None,
        "accuracy": {kind: sum(values) / len(values) for kind, values in kinds.items()},
        "kept": sum(last.values()) / chosen if chosen else None,
        "kept_by_line": {line: last[line] / peak[line] if peak[line] else None for line in test},
        "own_loops": own,
        "first_correct": first_correct(rows),
    }


def first_correct(rows: Sequence[dict]) -> dict[Line, float | None]:
    """Line -> mean loop after which a test row is right for the first time, over the rows that ever are right."""
    means = {}
    for line, shares in lines_of(rows, "test", "first_correct").items():
        ever = sum(shares)
        means[line] = sum(loop * share for loop, share in enumerate(shares, start=1)) / ever if ever else None
    return means


def graded(run: Run) -> Graded:
    """See `Task.graded`."""
    trained, lowest = run.summary()["trained_hops"], {}
    for row in run.read(LOOPS):
        key = row["split"], row["loops"], row["hops"]
        lowest[key] = min(row["accuracy"], lowest.get(key, 1.0))
    names = ("split", "loops", "grade")
    found = [
        dict(zip(names, key, strict=True)) | {"right": right, "trained": key[2] in trained}
        for key, right in lowest.items()
    ]
    return Graded(
        found, run.read(EVALUATION)["chance"], halting_loops(run.read(HALTING)) if run.has(HALTING) else None
    )


def halting_loops(rows: Sequence[dict]) -> tuple[float, float] | None:
    """See `Graded.halting`; over the solvable hop counts of the test rows. rows: records of halting.jsonl."""
    best = next((row["rule"] for row in rows if row["measure"] == "best"), None)
    mine = [row for row in rows if row["measure"] == "chosen" and row["rule"] == best and row["solvable"]]
    return None if best is None else tuple(sum(row[n] for row in mine) / len(mine) for n in ("loops", "own_loops"))


def depth_text(run: Run) -> str:
    """`depth_facts` as text, with a line per test line."""
    facts, rows = depth_facts(run), run.read(LOOPS)
    test, margins = lines_of(rows, "test"), lines_of(rows, "test", "margin")
    last, loops = facts["max_loops"], facts["loops"]
    text = [
        f"Every loop to {last}: {loops} loops are best on the validation rows; accuracy in % of the test rows.",
        f"{'split':<11}{'hops':>5} |{f'at {loops}':>7}{'own best':>10}{f'at {last}':>7}{'kept':>6} | first correct |"
        f" margin at {loops}, at {last}",
    ]
    for (kind, hops), values in test.items():
        line = kind, hops
        own = facts["own_loops"][line]
        numbers = f"{100 * values[loops - 1]:7.1f}{f'{100 * values[own - 1]:.1f} @{own}':>10}{100 * values[-1]:7.1f}"
        margin = f"{margins[line][loops - 1]:.1f}, {margins[line][-1]:.1f}"
        text.append(
            f"{kind:<11}{hops:>5} |{numbers}{number(facts['kept_by_line'][line]):>6} |"
            f"{number(facts['first_correct'][line]):>14} | {margin}"
        )
    reach = ", ".join(
        f"{facts['reach'][t]} ({facts['reach_own_loops'][t]} with own loops) at >= {100 * t:.0f} %" for t in THRESHOLDS
    )
    reach = f"hops reached in loops 1 to {last}: {reach}"
    text.append(f"learnable depth {facts['learnable_depth']}; {reach}; ratio {number(facts['ratio'])}")
    return "\n".join(text)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def halting_facts(rows: Sequence[dict]) -> dict[str, dict]:
    """Rule -> the numbers that `halting_text` prints, over the solvable hop counts of the test rows."""
    from looplab.instruments.halting_settings import SETTING_FIELDS  # which imports torch

    facts = {}
    for time in (row for row in rows if row["measure"] == "time"):
        chosen = [
            row for row in rows if row["measure"] == "chosen" and row["rule"] == time["rule"] and row["solvable"]
        ]
        mean = {
            name: sum(row[name] for row in chosen) / len(chosen)
            for name in ("accuracy", "loops", "own_accuracy", "own_loops", "fixed_accuracy", "fixed_loops")
        }
        facts[time["rule"]] = mean | {
            "setting": {name: value for name, value in time.items() if name in SETTING_FIELDS},
            "largest_loss": max(row["own_accuracy"] - row["accuracy"] for row in chosen),
            "needed_loops": chosen[0]["needed_loops"],
            "saved": 1 - mean["loops"] / mean["fixed_loops"],
            "saved_of_needed": 1 - mean["loops"] / chosen[0]["needed_loops"],
            "time": (time["ratio_min"], time["ratio"], time["ratio_max"]),
            "apart": max(abs(row["loops"] - row["simulated_loops"]) for row in chosen),
        }
    return facts


def halting_text(rows: Sequence[dict]) -> str:
    """The chosen settings and the baselines as text. rows: records of halting.jsonl."""
    facts = halting_facts(rows)
    first = next(iter(facts.values()))
    hops = sorted({row["hops"] for row in rows if row["measure"] == "chosen" and row["solvable"]})
    text = [
        f"Test rows of the solvable hops {', '.join(map(str, hops))}, every hop count alike; settings chosen on "
        "validation rows.",
        f"{'':<12}{'accuracy':>9}{'loops':>7}",
        f"{'own count':<12}{100 * first['own_accuracy']:9.1f}{first['own_loops']:7.2f}   (an oracle that knows the "
        f"hops; the largest is {first['needed_loops']})",
        f"{'fixed count':<12}{100 * first['fixed_accuracy']:9.1f}{first['fixed_loops']:7.2f}",
    ]
    if by_length := [row for row in rows if row["measure"] == "length" and row["solvable"]]:
        accuracy, loops = (sum(row[name] for row in by_length) / len(by_length) for name in ("accuracy", "loops"))
        text.append(f"{'length':<12}{100 * accuracy:9.1f}{loops:7.2f}   (a loop per token of the input, no rule)")
    for rule, fact in facts.items():
        setting = ", ".join(
            f"{name} {value:.3g}" for name, value in fact["setting"].items() if isinstance(value, int | float)
        )
        low, middle, high = fact["time"]
        text.append(
            f"{rule:<12}{100 * fact['accuracy']:9.1f}{fact['loops']:7.2f}   {100 * fact['saved']:.0f} % fewer than "
            f"the fixed count, {100 * fact['saved_of_needed']:.0f} % than the largest own one; loses at most "
            f"{100 * fact['largest_loss']:.1f} points; {middle:.2f} ({low:.2f} - {high:.2f}) times as fast; {setting}"
        )
    for row in (row for row in rows if row["measure"] == "best"):
        text.append(
            f"best: {row['rule']}, the rule with the fewest loops that {CRITERION}; --save keeps it for "
            "generate(..., halting=True)"
        )
    return "\n".join(text)


def markdown_table(runs: Sequence[Run]) -> str:
    """A Markdown table with a line per group of seeds: mean [lowest, highest] of the test rows over its runs, at the
    loop count that the validation rows choose."""
    rows = []
    for name, members in group_runs(runs).items():
        facts = [depth_facts(run) for run in members]
        cells = {"runs": name, "seeds": str(len(members))}
        cells["learnable depth"] = span((fact["learnable_depth"] for fact in facts), 1)
        cells["loops"] = span((fact["loops"] for fact in facts), 1)
        for threshold in THRESHOLDS:
            reach = span((fact["reach"][threshold] for fact in facts), 1)
            cells[f"hops >= {100 * threshold:.0f} %"] = reach
        cells["ratio"] = span((fact["ratio"] for fact in facts), 2)
        for kind in facts[0]["accuracy"]:
            cells[f"{kind} %"] = span((fact["accuracy"].get(kind) for fact in facts), 1, 100)
        last = " / ".join(dict.fromkeys(str(fact["max_loops"]) for fact in facts))
        cells[f"kept at {last} loops"] = span((fact["kept"] for fact in facts), 2)
        if all(run.has(HALTING) for run in members):
            halted = [halting_facts(run.read(HALTING)) for run in members]
            for rule in halted[0]:
                cells[f"{rule}: loops saved %"] = span((fact[rule]["saved"] for fact in halted), 0, 100)
                cells[f"{rule}: speed"] = span((fact[rule]["time"][1] for fact in halted), 2)
                cells[f"{rule}: most points lost"] = span((fact[rule]["largest_loss"] for fact in halted), 1, 100)
        cells |= quantized_cells(members, "accuracy", 100, 1)
        rows.append(cells)
    return to_markdown(rows)
