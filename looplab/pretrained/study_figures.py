"""Figures of `looped frozen`: the depth profile and the sweep."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from looplab.instruments.drawing import FRAME

UNITS = {"text": "per token of text"}  # of tasks without choices


def profile_figure(rows: Sequence[dict]) -> Figure:
    """For each layer how much it writes; for each window of layers, drawn at its middle, how much looping it changes.

    Looping is safe for a window that moves its output but hardly changes the loss. rows: of `study.run_profile`.
    """
    layers = [row for row in rows if "layer" in row]
    windows = [row for row in rows if "window" in row]
    middles = [sum(row["window"]) / 2 for row in windows]
    width = windows[0]["window"][1] - windows[0]["window"][0] + 1
    centre = 0.48 * len(layers)
    panels = (
        (
            [row["layer"] for row in layers],
            [row["update"] for row in layers],
            "one layer writes\n|L(x) - x| / |x|",
            "o",
        ),
        (
            middles,
            [row["shift"] for row in windows],
            "the loop moves the output by\n(1 = what the window writes)",
            "s",
        ),
        (middles, [row["kl"] for row in windows], "KL from the base model\nnats per token", "s"),
    )
    figure = Figure(figsize=(7.5, 9), layout="constrained")
    all_axes = figure.subplots(4, 1, sharex=True)
    for axes, (x, y, label, marker) in zip(all_axes, panels, strict=False):
        axes.plot(x, y, marker=marker, markersize=3, color="black")
        axes.set_yscale("log")
        axes.set_ylabel(label)
    changes = all_axes[3]
    changes.plot(middles, [row["nll_change"] for row in windows], marker="s", markersize=3, color=FRAME)
    changes.axhline(0, color="black", linewidth=0.8)
    changes.set_yscale("symlog", linthresh=1e-3)
    changes.set_ylabel("change of the loss\nnats per token (below 0: better)")
    changes.set_xlabel("layer, or middle of the window, counted from 0")
    for axes in all_axes:
        axes.axvspan(int(centre) - 1.5, int(centre) + 2.5, color="0.9", zorder=0)
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].set_title(f"Depth profile: windows of {width} layers, the depth rule's window shaded", fontsize=10)
    return figure


def sweep_figure(gains: dict[str, tuple[dict, float]], task: str) -> Figure:
    """Windows x ways to loop, coloured by the gain over the base model in 1/1000 nats. gains: of `study.gains`."""
    cells = {}
    for setting, gain in gains.values():
        window = "default" if setting["window"] is None else "{}-{}".format(*setting["window"])
        way = f"{setting['method']}\nK {setting['num_loops']}"
        way += "" if setting["method"] == "naive" else f", T {setting['horizon']:g}"
        way += "" if setting["beta"] is None else f"\nbeta {setting['beta']:g}"
        cells[window, way] = 1000 * gain
    windows = sorted(
        {window for window, _ in cells}, key=lambda w: (int(w.split("-")[0]), w) if w[0].isdigit() else (-1, w)
    )
    ways = list(dict.fromkeys(way for _, way in cells))
    values = [[cells.get((window, way), math.nan) for way in ways] for window in windows]
    # The colours span the other ways: naive looping may lose a hundred times more than any way gains.
    bound = max(abs(value) for (_, way), value in cells.items() if not way.startswith("naive"))
    figure = Figure(figsize=(2.2 + 0.95 * len(ways), 1.6 + 0.36 * len(windows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                dark = abs(value) > 0.6 * bound
                axes.text(
                    column, row, f"{value:+.0f}", ha="center", va="center", fontsize=8, color="w" if dark else "k"
                )
    axes.set_xticks(range(len(ways)), ways, fontsize=8)
    axes.set_yticks(range(len(windows)), windows, fontsize=8)
    axes.set_ylabel("window of layers")
    unit = UNITS.get(task, "on the right choice")
    axes.set_title(f"{task}, validation: gain over the base model, 1/1000 nats {unit}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
