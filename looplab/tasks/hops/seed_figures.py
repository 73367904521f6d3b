"""Figures of groups of seeds (runs/seeds.py) on hops: means with a band.

    hops       accuracy against hops at the loop count chosen on validation rows      all groups
    loops      accuracy and logit margin against loops, a line per hop count          one group
    halting    accuracy against mean loops; loops used against hops                   one group
    learning   held-out accuracy against minutes (logarithmic)                        all groups

A band is the 95 % t-interval over the runs of a group; for a single run it is the Wilson interval over its rows.
"""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from looplab.instruments.drawing import FRAME, MARKS, PALETTE, STYLES, SeedGroup, band_words, spread, tidy
from looplab.runs.folder import Run
from looplab.runs.intervals import t_interval, wilson_interval

from .records import EVALUATION, HALTING, LOOPS
from .results import THRESHOLDS, depth_facts, halting_facts, lines_of
from .rows import KIND_WORDS

MOST_LINES = 6


def chance_line(axes, runs: Sequence[Run]) -> None:
    """Draw the mean chance level of the runs, in %."""
    chance = 100 * fmean(run.read(EVALUATION)["chance"] for run in runs)
    axes.axhline(chance, color="0.55", linestyle=(0, (1, 2)), linewidth=1, label=f"chance, {chance:.1f}")


def hops_figure(groups: Sequence[SeedGroup]) -> Figure:
    """Test accuracy of each line (split kind, hops), at the loop count that the validation rows of a run choose."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    lines = list(dict.fromkeys(line for _, runs in groups for line in lines_of(runs[0].read(LOOPS), "test")))
    deep = len({hops for _, hops in lines}) > 1
    places = {line: line[1] if deep else index for index, line in enumerate(lines)}
    for index, (name, runs) in enumerate(groups):
        facts = [depth_facts(run) for run in runs]
        at_chosen = {}  # line -> a row per run
        for run, fact in zip(runs, facts, strict=True):
            for row in run.read(LOOPS):
                if (row["split"], row["loops"]) == ("test", fact["loops"]):
                    at_chosen.setdefault((row["split_kind"], row["hops"]), []).append(row)
        points = []
        for line in lines:
            rows = at_chosen.get(line)
            if rows:
                middle, low, high = t_interval([row["accuracy"] for row in rows])
                if len(rows) == 1:
                    low, high = wilson_interval(middle, rows[0]["n"])
                points.append((places[line], *(100 * min(1.0, max(0.0, value)) for value in (middle, low, high))))
        x, middle, low, high = zip(*points, strict=True)
        loops = sorted({fact["loops"] for fact in facts})
        label = f"{name} at {', '.join(map(str, loops))} loops"
        colour, mark = PALETTE[index % len(PALETTE)], MARKS[index % len(MARKS)]
        if deep:
            axes.plot(x, middle, marker=mark, markersize=4.5, color=colour, label=label)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        else:
            aside = 0.12 * (index - (len(groups) - 1) / 2)
            errors = [[m - lo for m, lo in zip(middle, low, strict=True)],
                      [hi - m for m, hi in zip(middle, high, strict=True)]]  # fmt: skip
            axes.errorbar([p + aside for p in x], middle, errors, fmt=mark, capsize=3, color=colour, label=label)
    words = f"{', '.join(f'{100 * threshold:.0f}' for threshold in THRESHOLDS)} %"
    for threshold in THRESHOLDS if deep else ():
        axes.axhline(100 * threshold, color="0.75", linestyle="--", linewidth=0.8, zorder=0, label=words)
        words = None
    chance_line(axes, [run for _, runs in groups for run in runs])
    if deep:
        trained = {max(run.summary()["trained_hops"]) for _, runs in groups for run in runs}
        if len(trained) == 1:
            axes.axvspan(min(places.values()) - 0.5, trained.pop() + 0.5, color=FRAME, alpha=0.08, linewidth=0,
                         label="hops in training")  # fmt: skip
        axes.set_xlim(min(places.values()) - 0.5, max(places.values()) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xticks(range(len(lines)), [KIND_WORDS.get(kind, kind) for kind, _ in lines])
        axes.set_xlim(-0.6, len(lines) - 0.4)
    axes.set_ylim(-3, 103)
    tidy(axes, "accuracy (%)", "hops" if deep else "split of the two-hop questions")
    axes.set_title(f"test questions; {band_words(groups)}", fontsize=9, color="0.3", loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def loops_figure(group: SeedGroup) -> Figure:
    """Accuracy and mean margin of the gold token after every loop; trained loop counts are shaded, lines of hop counts
    beyond the training are dashed."""
    name, runs = group
    rows = [run.read(LOOPS) for run in runs]
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    lines = list(lines_of(rows[0], "test"))
    shown = spread(lines, MOST_LINES)
    deep = len({hops for _, hops in lines}) > 1
    for index, (kind, hops) in enumerate(shown):
        colour = PALETTE[index]
        style = "-" if all(hops in run.summary()["trained_hops"] for run in runs) else "--"
        label = f"{hops} hops" if deep else KIND_WORDS.get(kind, kind)
        for axes, field, scale in ((upper, "accuracy", 100), (lower, "margin", 1)):
            columns = zip(*(lines_of(run_rows, "test", field)[kind, hops] for run_rows in rows), strict=False)
            middle, low, high = zip(*map(t_interval, columns), strict=True)
            if field == "accuracy":
                low, high = [max(0.0, value) for value in low], [min(1.0, value) for value in high]
            x = range(1, len(middle) + 1)
            # Marks at places of its own show each of several lines that coincide.
            marks = {"marker": MARKS[index], "markersize": 5, "markevery": mark_places(len(x), index, len(shown))}
            axes.plot(x, [scale * value for value in middle], style, color=colour, linewidth=1.8, label=label, **marks)
            if len(runs) > 1:
                axes.fill_between(x, [scale * v for v in low], [scale * v for v in high], color=colour, alpha=0.15,
                                  linewidth=0)  # fmt: skip
    spans = {run.trained_loops() for run in runs}
    for axes in (upper, lower):
        for first, last in spans:
            axes.axvspan(first - 0.5, last + 0.5, color=FRAME, alpha=0.08, linewidth=0, label="loops in training")
    chance_line(upper, runs)
    lower.axhline(0, color="0.55", linewidth=0.8)
    upper.set_ylim(-3, 103)
    lower.set_xlim(0.5, max(len(values) for values in lines_of(rows[0], "test").values()) + 0.5)
    tidy(upper, "accuracy (%)", "")
    tidy(lower, "mean margin of the answer (logits)", "loops at inference")
    bands = f"; {band_words([group])}" if len(runs) > 1 else ""
    upper.set_title(f"{name}: the test questions after every loop{bands}", fontsize=9, color="0.3", loc="left")
    handles, labels = upper.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    styles = {handle.get_linestyle() for handle in handles if isinstance(handle, Line2D)}
    if "--" in styles:
        words = {"-": "solid: hops in training", "--": "dashed: more hops"}
        unique |= {words[s]: Line2D([], [], color="0.4", linestyle=s) for s in words if s in styles}
    figure.legend(unique.values(), unique.keys(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def mark_places(length: int, index: int, lines: int) -> list[int]:
    """Places of the marks of line `index` of `lines` with so many points, apart from those of the other lines."""
    step = max(1, length // 4)
    return list(range(index * step // lines, length, step))


def halting_figure(group: SeedGroup) -> Figure:
    """Left: fixed loop counts, the frontier of each run, and the chosen settings. Right: loops used by hop count."""
    name, runs = group
    rows = [run.read(HALTING) for run in runs]
    facts = [halting_facts(run_rows) for run_rows in rows]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    fixed = [[row["accuracy"] for row in run_rows if row["measure"] == "fixed"] for run_rows in rows]
    middle, low, high = zip(*map(t_interval, zip(*fixed, strict=False)), strict=True)
    x = range(1, len(middle) + 1)
    left.plot(x, [100 * value for value in middle], color="0.45", label="fixed count")
    if len(runs) > 1:
        bounds = [100 * max(0.0, v) for v in low], [100 * min(1.0, v) for v in high]
        left.fill_between(x, *bounds, color="0.45", alpha=0.15, linewidth=0)
    for index, rule in enumerate(facts[0]):
        colour, mark, size = PALETTE[index], MARKS[index], 10 - 2.5 * index  # rules that agree show behind each other
        for run_rows in rows:
            points = [row for row in run_rows if row["measure"] == "frontier" and row["rule"] == rule]
            left.plot([p["loops"] for p in points], [100 * p["accuracy"] for p in points], color=colour, alpha=0.6,
                      linewidth=1)  # fmt: skip
        chosen = [(fact[rule]["loops"], 100 * fact[rule]["accuracy"]) for fact in facts]
        left.plot(*zip(*chosen, strict=True), linestyle="", marker=mark, color=colour, markersize=size,
                  markeredgecolor="white", label=f"{rule}: chosen")  # fmt: skip
        by_hops = {}
        for run_rows in rows:
            for row in run_rows:
                if row["measure"] == "chosen" and row["rule"] == rule:
                    by_hops.setdefault(row["hops"], []).append(row["loops"])
        draw_by_hops(right, by_hops, colour, mark, size, rule)
    own, most = {}, [fact["fixed_loops"] for fact in (next(iter(run_facts.values())) for run_facts in facts)]
    for run_rows in rows:
        for row in run_rows:
            if row["measure"] == "chosen" and row["rule"] == next(iter(facts[0])) and row["solvable"]:
                own.setdefault(row["hops"], []).append(row["own_loops"])
    right.plot(own.keys(), [fmean(values) for values in own.values()], "x", color="black", label="own count (oracle)")
    right.axhline(fmean(most), color="0.45", linestyle="--", linewidth=1, label=f"fixed count, {fmean(most):.1f}")
    chance_line(left, runs)
    trained = {max(run.summary()["trained_hops"]) for run in runs}
    right.axvspan(min(own) - 0.5, min(trained) + 0.5, color=FRAME, alpha=0.08, linewidth=0, label="hops in training")
    left.set_xscale("log", base=2)
    counts = [2**power for power in range(11) if 2**power <= len(middle)]
    left.set_xticks(counts, counts)
    left.set_ylim(-3, 103)
    right.set_ylim(bottom=0)
    right.xaxis.get_major_locator().set_params(integer=True)
    tidy(left, "accuracy, mean over solvable hops (%)", "mean loops (logarithmic)")
    tidy(right, "mean loops used", "hops")
    bands = f"; {band_words([group])}" if len(runs) > 1 else ""
    figure.suptitle(f"{name}: test rows, thresholds chosen on validation rows{bands}", fontsize=9, color="0.3")
    entries = [axes.get_legend_handles_labels() for axes in (left, right)]
    shown = {label: handle for entry in entries for handle, label in zip(*entry, strict=True)}
    kept = {label: handle for label, handle in shown.items() if not label.endswith(": chosen")}
    figure.legend(kept.values(), kept.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def draw_by_hops(axes, by_hops: dict[int, list[float]], colour: str, mark: str, size: float, label: str) -> None:
    """Draw mean and band of the runs at each hop count. by_hops: hop count -> loops used by each run."""
    hops = sorted(by_hops)
    middle, low, high = zip(*(t_interval(by_hops[count]) for count in hops), strict=True)
    axes.plot(hops, middle, marker=mark, markersize=0.8 * size, color=colour, label=label)
    axes.fill_between(hops, low, high, color=colour, alpha=0.15, linewidth=0)


def learning_figure(groups: Sequence[SeedGroup]) -> Figure:
    """Held-out accuracy by split kind over minutes: colours are groups, line styles are split kinds."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    gates = {run.folder: [row for row in run.metrics() if "gate_by_split_kind" in row] for _, r in groups for run in r}
    keys = list(dict.fromkeys(key for rows in gates.values() for row in rows for key in row["gate_by_split_kind"]))
    if not keys:
        raise ValueError(
            f"{next(iter(gates))}/metrics.jsonl has no held-out check by split kind yet; wait for the first."
        )
    for index, (name, runs) in enumerate(groups):
        colour = PALETTE[index % len(PALETTE)]
        # The runs check at the same steps; a step that not all of them reached has no mean.
        by_step = [{row["step"]: row for row in gates[run.folder]} for run in runs]
        steps = sorted(set.intersection(*(set(rows) for rows in by_step)))
        for style, key in zip(STYLES * len(keys), keys, strict=False):
            points = []
            for step in steps:
                rows = [rows[step] for rows in by_step if key in rows[step]["gate_by_split_kind"]]
                if len(rows) == len(runs):
                    values = t_interval([100 * row["gate_by_split_kind"][key] for row in rows])
                    points.append((fmean(row["seconds"] for row in rows) / 60, *values))
            if points:
                x, middle, low, high = zip(*points, strict=True)
                kind = key.split()[-1]
                label = f"{name}: {KIND_WORDS.get(kind, kind)}"
                axes.plot(x, middle, style, color=colour, linewidth=1.8, label=label)
                if len(runs) > 1:
                    axes.fill_between(x, [max(0.0, v) for v in low], [min(100.0, v) for v in high], color=colour,
                                      alpha=0.15, linewidth=0)  # fmt: skip
    if all((run.folder / "evaluation.json").is_file() for _, runs in groups for run in runs):
        chance_line(axes, [run for _, runs in groups for run in runs])
    axes.set_xscale("log")
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(-3, 103)
    tidy(axes, "accuracy (%)", "wall time (minutes, logarithmic)")
    if any(len(runs) > 1 for _, runs in groups):
        several = [group for group in groups if len(group[1]) > 1]
        axes.set_title(band_words(several), fontsize=9, color="0.3", loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
