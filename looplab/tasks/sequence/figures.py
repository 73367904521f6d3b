"""`looped plot` on questions.

    grades.png     x grade by kind, y loops, colour and number right answers in %; a frame around what was trained
    reach.png      right answers by grade, a line per loop count; for groups, at the loops chosen on validation rows
    halting.png    right answers against mean loops of a token, by rule, on validation rows
    training.png   losses over training tokens (language/figures.py)

A band or bar is the 95 % Wilson interval over the rows of a run, or the t-interval over the runs of a group.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from looplab.instruments.drawing import (
    FRAME,
    MARKS,
    PALETTE,
    SeedGroup,
    all_have,
    band_words,
    draw_band,
    groups_folder,
    own_folder,
    points,
    save,
    shade,
    spread,
    tidy,
)
from looplab.runs.folder import Run
from looplab.runs.intervals import t_interval
from looplab.runs.seeds import group_runs
from looplab.tasks.language.figures import held_out_figure, training_figure

from .records import EVALUATION, GRADES, HALTING
from .results import WORDS, Line, facts_of, lines_of, measure_of

MOST_COLUMNS, MOST_ROWS, MOST_LINES, MOST_PANELS = 24, 16, 6, 12


def plot_runs(runs: Sequence[Run], output: str | Path | None = None, format: str = "png") -> list[Path]:
    """`Task.plot`. Runs that were not evaluated get only training.png.

    Raises:
        ValueError: a run has no held-out loss yet, or the runs of a group have none at the same steps.
    """
    paths = []
    for run in runs:
        figures = own_folder(run, runs, output)
        own = [save(training_figure(run), figures / "training.png", format)]
        if run.has(GRADES):
            own.append(save(grades_figure(run), figures / "grades.png", format))
            own.append(save(loops_figure(run), figures / "reach.png", format))
        if run.has(HALTING):
            own.append(save(halting_figure(run), figures / "halting.png", format))
        paths += run.drew(own)
    if len(runs) > 1:
        groups = list(group_runs(runs).items())
        folder = groups_folder(runs, groups, output)
        paths.append(save(held_out_figure(groups), folder / "held_out.png", format))
        if all_have(runs, GRADES):
            paths.append(save(reach_figure(groups), folder / "reach.png", format))
    return paths


def name_of(line: Line) -> str:
    grade, kind = line
    return f"{grade} {kind}".strip()


def by_kind(line: Line) -> tuple[str, int]:
    """Sorting key of a line: kinds one after the other, each with its grades."""
    return line[1], line[0]


def grades_figure(run: Run) -> Figure:
    """Right answers over loops x grade, of the test rows."""
    rows = run.read(GRADES)
    test, measure = lines_of(rows, "test"), measure_of(rows)
    lines = spread(sorted(test, key=by_kind), MOST_COLUMNS)
    loops = spread(sorted({row["loops"] for row in rows}), MOST_ROWS)
    figure = Figure(figsize=(2.4 + 0.44 * max(len(lines), 8), 1.9 + 0.38 * len(loops)), layout="constrained")
    axes = figure.add_subplot()
    image = shade(axes, [[test[line][count][measure] for line in lines] for count in loops])
    names = [name_of(line) for line in lines]
    turned = {"rotation": 45, "ha": "right"} if any(kind for _, kind in lines) else {}
    axes.set_xticks(range(len(lines)), names, fontsize=points(figure, 8), parse_math=False, **turned)
    axes.set_yticks(range(len(loops)), loops, fontsize=points(figure, 9))
    axes.set_xlabel("grade", fontsize=points(figure, 10))
    axes.set_ylabel("loops at inference", fontsize=points(figure, 10))
    low, high = run.trained_loops()
    ys = [y for y, count in enumerate(loops) if low <= count <= high]
    for x, line in enumerate(lines):
        if test[line][loops[0]]["trained"] and ys:
            corner, size = (x - 0.5, ys[0] - 0.5), ys[-1] - ys[0] + 1
            axes.add_patch(Rectangle(corner, 1, size, fill=False, edgecolor=FRAME, linewidth=2, clip_on=False))
    some = f"; {len(lines)} of {len(test)} lines" if len(lines) < len(test) else ""
    title = f"{run.name}: {WORDS[measure]} in %; framed: trained grades and loops{some}"
    axes.set_title(title, fontsize=points(figure, 10))
    bar = figure.colorbar(image, ax=axes, ticks=range(0, 101, 20))
    chance = 100 * run.read(EVALUATION)["chance"]
    bar.set_label(f"%; white line: the commonest answer, {chance:.1f}", fontsize=points(figure, 9))
    bar.ax.axhline(chance, color="white", linewidth=1.5)
    return figure


def panels_of(lines: Sequence[Line]) -> tuple[Figure, list[tuple[str, Axes]], str]:
    """A figure with a panel for each kind, at most MOST_PANELS; and what a title says of the kinds left out."""
    every = list(dict.fromkeys(kind for _, kind in sorted(lines, key=by_kind)))
    kinds = spread(every, MOST_PANELS)
    figure = Figure(figsize=(8, 1.2 + 3.4 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    some = f"; {len(kinds)} of {len(every)} kinds" if len(kinds) < len(every) else ""
    return figure, list(zip(kinds, panels, strict=True)), some


def name_panel(axes: Axes, kind: str, words: str) -> None:
    """Write above a panel which kind it is of. A kind is the user's text, in which $ begins no formula."""
    axes.set_title(f"{kind}{': ' if kind else ''}{words}", fontsize=9, loc="left", parse_math=False)


def loops_figure(run: Run) -> Figure:
    """Right answers by grade, a line per loop count and a panel per kind."""
    rows = run.read(GRADES)
    test, measure = lines_of(rows, "test"), measure_of(rows)
    loops = spread(sorted({row["loops"] for row in rows}), MOST_LINES)
    figure, panels, some = panels_of(list(test))
    for kind, axes in panels:
        own = {line[0]: at for line, at in test.items() if line[1] == kind}
        for index, count in enumerate(loops):
            values = [scaled(at[count][measure], *at[count][f"{measure}_interval"]) for at in own.values()]
            draw_band(axes, list(own), values, index, f"{count} loops" if count > 1 else "1 loop", shaded=True)
        shade_trained(axes, own, loops[0])
        tidy(axes, f"{WORDS[measure]} (%)", "grade")
        name_panel(axes, kind, band_words([(run.name, [run])]) + some)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def reach_figure(groups: Sequence[SeedGroup]) -> Figure:
    """Right answers by grade of every group, at the loops that each run's validation rows choose."""
    tests = {name: [lines_of(run.read(GRADES), "test") for run in runs] for name, runs in groups}
    figure, panels, some = panels_of([line for found in tests.values() for test in found for line in test])
    for kind, axes in panels:
        for index, (name, runs) in enumerate(groups):
            facts = [facts_of(run) for run in runs]
            shared = sorted(set.intersection(*(set(test) for test in tests[name])))
            x, values = [], []
            for line in (line for line in shared if line[1] == kind):
                at = [test[line][fact["loops"]] for test, fact in zip(tests[name], facts, strict=True)]
                measure = facts[0]["measure"]
                middle = t_interval([row[measure] for row in at])
                values.append(scaled(middle[0], *(middle[1:] if len(at) > 1 else at[0][f"{measure}_interval"])))
                x.append(line[0])
            if x:
                draw_band(axes, x, values, index, name, shaded=True)
        tidy(axes, f"{WORDS[facts_of(groups[0][1][0])['measure']]} (%)", "grade")
        axes.set_ylim(-3, 103)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        name_panel(axes, kind, band_words(groups) + some)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def scaled(middle: float, low: float, high: float) -> tuple[float, float, float]:
    """A share and its interval in %, inside of 0 .. 100."""
    return 100 * middle, 100 * max(0.0, low), 100 * min(1.0, high)


def shade_trained(axes, own: dict[int, dict[int, dict]], loops: int) -> None:
    """Grey behind the trained grades. own: grade -> loop count -> record."""
    trained = [grade for grade, at in own.items() if at[loops]["trained"]]
    if trained:
        axes.axvspan(min(trained) - 0.3, max(trained) + 0.3, color="0.93", zorder=0, label="trained grades")
    axes.set_ylim(-3, 103)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def halting_figure(run: Run) -> Figure:
    """Right answers against loops of every setting of the sweep; the fixed loop counts are a line."""
    rows = [row for row in run.read(HALTING) if row["measure"] == "sweep"]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, rule in enumerate(dict.fromkeys(row["rule"] for row in rows if row["rule"] != "fixed")):
        own = sorted((row["loops"], 100 * row["exact"]) for row in rows if row["rule"] == rule)
        axes.plot(*zip(*own, strict=True), MARKS[index % len(MARKS)], color=PALETTE[index % len(PALETTE)], label=rule)
    fixed = sorted((row["loops"], 100 * row["exact"]) for row in rows if row["rule"] == "fixed")
    axes.plot(*zip(*fixed, strict=True), color="0.55", linewidth=1.5, zorder=0, label="fixed loop counts")
    axes.set_ylim(-3, 103)
    tidy(axes, "right answers (%)", "mean loops of a token")
    axes.set_title(f"{run.name}: validation rows, every grade alike", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure
