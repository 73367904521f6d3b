"""Figures of a run on hops: the heat map of accuracy, and the training curves.

    grid.png       x hops by split kind, y loops, colour and number accuracy in %; a frame around the trained cells
    training.png   loss and held-out accuracy per hop count over minutes; a dashed line where a hop count was added

The heat map of several runs (seeds) has their mean and their lowest accuracy. The colours are cividis, which
colour-blind readers see as others do. Figures of groups are in seed_figures.py.
"""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from looplab.instruments.drawing import COLOURS, FRAME, points, spread
from looplab.runs.folder import Run

from .records import EVALUATION, GRID
from .rows import KIND_WORDS

MOST_COLUMNS, MOST_ROWS = 24, 20  # of the heat map, so that its numbers can be read


def cells_of(run: Run) -> dict[tuple[int, str, int], dict]:
    """(hops, split kind, loops) -> record of the grid, without the split kind train."""
    return {
        (row["hops"], row["split_kind"], row["loops"]): row for row in run.read(GRID) if row["split_kind"] != "train"
    }


def heat_map(runs: Sequence[Run]) -> Figure:
    """Accuracy over loops x hops of one run, or mean and lowest of several runs.

    Raises ValueError if the runs were evaluated on different grids.
    """
    grids = [cells_of(run) for run in runs]
    for run, grid in zip(runs, grids, strict=True):
        if grid.keys() != grids[0].keys():
            raise ValueError(
                f"{run} and {runs[0]} were evaluated on different (loops, hops): run `looped eval` on "
                "each with the same --loops."
            )
    every = sorted({key[:2] for key in grids[0]})
    columns = shown_columns(every, set.intersection(*(set(run.summary()["trained_hops"]) for run in runs)))
    loops = spread(sorted({key[2] for key in grids[0]}), MOST_ROWS)
    values = {key: [100 * grid[key]["accuracy"] for grid in grids] for key in grids[0]}
    mean = [[sum(values[(*column, count)]) / len(runs) for column in columns] for count in loops]

    figure = Figure(figsize=(2.4 + 0.44 * max(len(columns), 8), 1.9 + 0.38 * len(loops)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(mean, cmap=COLOURS, vmin=0, vmax=100, origin="lower", aspect="auto")
    size = points(figure, 9.5)
    for y, count in enumerate(loops):
        for x, column in enumerate(columns):
            colour = "white" if mean[y][x] < 55 else "black"
            lift = 0 if len(runs) == 1 else 0.14
            axes.text(x, y + lift, f"{mean[y][x]:.0f}", ha="center", va="center", color=colour, fontsize=size)
            if len(runs) > 1:
                lowest = f"{min(values[(*column, count)]):.0f}"
                axes.text(x, y - 0.26, lowest, ha="center", va="center", color=colour, fontsize=0.75 * size)
    axes.set_xticks(range(len(columns)), [hops for hops, _ in columns])
    axes.set_yticks(range(len(loops)), loops)
    axes.tick_params(length=0)
    axes.tick_params(labelsize=points(figure, 9))
    axes.set_ylabel("loops at inference", fontsize=points(figure, 10))
    axes.set_xlabel("hops", fontsize=points(figure, 10))
    mark_kinds(axes, columns)
    mark_training(axes, columns, loops, runs)
    names = ", ".join(run.name for run in runs)
    title = f"{names}: accuracy in %" if len(runs) == 1 else f"accuracy in %, mean (small: lowest) of {names}"
    some = f"; {len(columns)} of {len(every)} hop counts" if len(columns) < len(every) else ""
    axes.set_title(title + some, fontsize=points(figure, 11), pad=24)
    draw_scale(figure, image, axes, 100 * runs[0].read(EVALUATION)["chance"])
    return figure


def shown_columns(columns: Sequence[tuple[int, str]], trained: set[int]) -> list[tuple[int, str]]:
    """The columns of the grid; of more than `MOST_COLUMNS`, some of the trained hop counts and some of the others."""
    if len(columns) <= MOST_COLUMNS:
        return list(columns)
    inside = spread([column for column in columns if column[0] in trained], MOST_COLUMNS // 3)
    outside = [column for column in columns if column[0] not in trained]
    return sorted(inside + spread(outside, MOST_COLUMNS - len(inside)))


def mark_kinds(axes, columns: Sequence[tuple[int, str]]) -> None:
    """Write each split kind above its columns, and draw a white line between split kinds."""
    kinds = [kind for _, kind in columns]
    start = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[start]:
            word = KIND_WORDS.get(kinds[start], kinds[start])
            middle = (start + end - 1) / 2
            axes.annotate(
                word, (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                ha="center", fontsize=points(axes.figure, 9),
            )  # fmt: skip
            if end < len(kinds):
                axes.axvline(end - 0.5, color="white", linewidth=2)
            start = end


def mark_training(axes, columns, loops, runs: Sequence[Run]) -> None:
    """Frame the cells whose hop count and loop count were in the training of all runs."""
    low = max(run.trained_loops()[0] for run in runs)
    high = min(run.trained_loops()[1] for run in runs)
    trained_hops = set.intersection(*(set(run.summary()["trained_hops"]) for run in runs))
    xs = [x for x, (hops, _) in enumerate(columns) if hops in trained_hops]
    ys = [y for y, count in enumerate(loops) if low <= count <= high]
    if xs and ys:
        trained_loops = f"{low} loops" if low == high else f"{low} to {high} loops"
        label = f"in training: up to {max(trained_hops)} hops, {trained_loops}"
        width, height = xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1
        corner = (xs[0] - 0.5, ys[0] - 0.5)
        frame = Rectangle(corner, width, height, fill=False, edgecolor=FRAME, linewidth=3, label=label)
        frame.set(clip_on=False, zorder=3)  # above the white lines and the axes' own border
        axes.add_patch(frame)
        axes.figure.legend(
            handles=[frame], loc="outside lower center", frameon=False, fontsize=points(axes.figure, 10)
        )


def draw_scale(figure: Figure, image, axes, chance: float) -> None:
    """Draw the colour bar in %, with the chance level on it."""
    bar = figure.colorbar(image, ax=axes, ticks=range(0, 101, 20))
    bar.set_label(f"accuracy (%); white line: chance, {chance:.1f}", fontsize=points(figure, 10))
    bar.ax.tick_params(labelsize=points(figure, 9))
    bar.ax.axhline(chance, color="white", linewidth=1.5)


def training_curves(run: Run) -> Figure:
    """Loss in nats and held-out accuracy in % over minutes; by the held-out accuracy, hop counts are added."""
    rows = run.metrics()
    steps, gates = [row for row in rows if "loss" in row], [row for row in rows if "gate" in row]
    if not steps:
        raise ValueError(f"{run}/metrics.jsonl has no training rows yet; wait for the first ones.")
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    minutes, losses = [row["seconds"] / 60 for row in steps], [row["loss"] for row in steps]
    upper.plot(minutes, losses, ".", color="0.8", markersize=3, label="logged batches")
    upper.plot(minutes, smooth(losses), color="black", linewidth=1.5, label="smoothed")
    upper.set_ylabel("loss (nats)")
    upper.set_ylim(0, 1.05 * max(losses))
    upper.set_title(f"{run.name}: {steps[-1]['step']:,} updates of the training", fontsize=11, pad=32)

    hops = sorted({int(count) for row in gates for count in row["gate"]})
    if hops:
        norm = BoundaryNorm([count - 0.5 for count in [*hops, hops[-1] + 1]], len(hops))
        # The lightest part of the map does not show on white.
        lightness = [0.8 * index / max(len(hops) - 1, 1) for index in range(len(hops))]
        shades = ScalarMappable(norm, ListedColormap(colormaps[COLOURS](lightness)))
        for count in hops:
            seen = [row for row in gates if str(count) in row["gate"]]
            points = [row["seconds"] / 60 for row in seen], [100 * row["gate"][str(count)] for row in seen]
            lower.plot(*points, "o-", color=shades.to_rgba(count), markersize=3, linewidth=1.8)
        figure.colorbar(shades, ax=[upper, lower], label="hops", ticks=spread(hops, 20), aspect=40)
    lower.set_ylabel("held-out accuracy (%)")
    lower.set_ylim(-3, 103)
    lower.set_xlabel("wall time (minutes)")
    mark_stages(upper, lower, steps)
    upper.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def mark_stages(upper, lower, steps: Sequence[dict]) -> None:
    """Draw a dashed line where the curriculum added a hop count, and write the hop count above it."""
    label = "hop count added"
    height = 3  # points above the axes; every second number is higher, since stages can follow each other closely
    for before, after in pairwise(steps):
        if after["stage"] > before["stage"]:
            minute = before["seconds"] / 60
            for axes in (upper, lower):
                axes.axvline(minute, color=FRAME, linestyle="--", linewidth=1, label=label)
            label = None
            upper.annotate(
                f"+{after['stage']}", (minute, 1), xycoords=("data", "axes fraction"), xytext=(0, height),
                textcoords="offset points", ha="center", color=FRAME, fontsize=9,
            )  # fmt: skip
            height = 16 - height
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)


def smooth(values: Sequence[float], memory: float = 0.95) -> list[float]:
    """Exponential average, with Adam's correction of the bias at its start."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = memory * average + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        smoothed.append(average / weight)
    return smoothed
