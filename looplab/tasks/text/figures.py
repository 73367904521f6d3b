"""`looped plot` on text: losses over training tokens (language/figures.py), and perplexity over loops.

The band of perplexity is the 95 % t-interval over the runs of a group; for a single run it is the bootstrap interval
over its test blocks.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from looplab.instruments.drawing import (
    FRAME,
    SeedGroup,
    all_have,
    band_words,
    draw_band,
    groups_folder,
    own_folder,
    save,
    tidy,
)
from looplab.runs.folder import Run
from looplab.runs.intervals import t_interval
from looplab.runs.seeds import group_runs
from looplab.tasks.language.figures import held_out_figure, training_figure

from .records import PERPLEXITY


def plot_runs(runs: Sequence[Run], output: str | Path | None = None, format: str = "png") -> list[Path]:
    """`Task.plot`. Runs that were not evaluated, or at one loop count only, get no perplexity.png.

    Raises:
        ValueError: a run has no held-out loss yet, or the runs of a group have none at the same steps.
    """
    paths = []
    for run in runs:
        own = [save(training_figure(run), own_folder(run, runs, output) / "training.png", format)]
        paths += run.drew(own + draw_perplexity([(run.name, [run])], own_folder(run, runs, output), format))
    if len(runs) > 1:
        groups = list(group_runs(runs).items())
        folder = groups_folder(runs, groups, output)
        paths += [
            save(held_out_figure(groups), folder / "held_out.png", format),
            *draw_perplexity(groups, folder, format),
        ]
    return paths


def draw_perplexity(groups: Sequence[SeedGroup], folder: Path, format: str) -> list[Path]:
    """Save perplexity.png in `folder`, if all runs were evaluated, and at more than one loop count."""
    evaluated = all_have([run for _, members in groups for run in members], PERPLEXITY)
    figure = perplexity_figure(groups) if evaluated else None
    return [] if figure is None else [save(figure, folder / "perplexity.png", format)]


def loop_points(runs: Sequence[Run]) -> dict[int, tuple[float, float, float]]:
    """Loop count -> (mean, low, high) of the test perplexity, for loop counts at which all runs were measured."""
    by_loops = [{row["loops"]: row for row in run.read(PERPLEXITY)} for run in runs]
    points = {}
    for count in sorted(set.intersection(*map(set, by_loops))):
        rows = [rows[count] for rows in by_loops]
        alone = rows[0]["perplexity"], *rows[0]["interval"]
        points[count] = alone if len(rows) == 1 else t_interval([row["perplexity"] for row in rows])
    return points


def perplexity_figure(groups: Sequence[SeedGroup]) -> Figure | None:
    """Test perplexity over loops, with trained loop counts shaded; None if fewer than two loop counts were measured.

    A group with a single loop count, such as a plain stack, is a point with an error bar.
    """
    measured = [(name, loop_points(runs)) for name, runs in groups]
    counts = sorted({count for _, points in measured for count in points})
    if len(counts) < 2:
        return None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(measured):
        if points:
            draw_band(axes, list(points), list(points.values()), index, name, shaded=True)
    spans = {run.trained_loops() for _, runs in groups for run in runs}
    if len(spans) == 1:
        [(first, last)] = spans
        axes.axvspan(first - 0.5, last + 0.5, color=FRAME, alpha=0.08, linewidth=0, label="loops in training")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, counts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
    tidy(axes, "test perplexity", "loops at inference (logarithmic)")
    bands = band_words(groups, "95 % bootstrap interval over one run's test blocks")
    axes.set_title(bands, fontsize=9, color="0.3", loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
