"""What all figures share: colours, panels, bands, and the folders they are saved in."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from looplab.runs.folder import RecordFile, Run
from looplab.runs.writing import below, write_whole

# The name of a group of seeds, and its runs.
SeedGroup = tuple[str, Sequence[Run]]


def own_folder(run: Run, runs: Sequence[Run], output: str | Path | None) -> Path:
    """Folder of the figures of `run`: `output` if it is the only run, otherwise RUN/figures."""
    return below(run.folder, "figures") if output is None or len(runs) > 1 else Path(output)


def groups_folder(runs: Sequence[Run], groups: Sequence[SeedGroup], output: str | Path | None) -> Path:
    """Folder of the figures of all groups: `output`, or figures/NAME_and_NAME beside the first run."""
    names = "_and_".join(name for name, _ in groups)
    return below(runs[0].folder.parent, "figures", names) if output is None else Path(output)


def all_have(runs: Sequence[Run], record: RecordFile) -> bool:
    """Whether every run has been measured so."""
    return all(run.has(record) for run in runs)


COLOURS = "cividis"
FRAME = "#d55e00"  # vermilion of Okabe and Ito, apart from every colour of cividis


PAGE_WIDTH = 800  # pixels that a page gives a picture, however wide it is


def save(figure: Figure, path: Path, format: str = "png") -> Path:
    """Write a figure whole, in one of the formats `PICTURES`, which its ending becomes; returns its path.

    The same figure gives the same bytes.
    """
    return write_whole(path.with_suffix(f".{format}"), picture_of(figure, format))


def picture_of(figure: Figure, format: str) -> bytes:
    """The figure in a format."""
    picture = io.BytesIO()
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[format]
    with rc_context({"svg.hashsalt": "looped"}):  # names in an SVG are random otherwise
        figure.savefig(picture, format=format, dpi=160, metadata=undated)
    return picture.getvalue()


def points(figure: Figure, pixels: float) -> float:
    """Size of a font that is so many pixels high where a page shows the figure, and at least 6.5 points."""
    return max(6.5, pixels * 72 * figure.get_figwidth() / PAGE_WIDTH)


def spread(values: Sequence, most: int) -> list:
    """At most `most` of the values, evenly spread from the first to the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


# Okabe and Ito, without the yellow that does not show on white and the vermilion that marks the training; and a brown.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#8c564b")
STYLES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colours: no two of many lines are alike


def band_words(groups: Sequence[SeedGroup], alone: str = "95 % Wilson interval of one run's rows") -> str:
    """The words of a caption that say what the bands are; `alone` is said of a group of one run."""
    seeds = sorted({len(runs) for _, runs in groups})
    several = [str(count) for count in seeds if count > 1]
    words = [f"95 % t-interval over {' or '.join(several)} seeds"] if several else []
    return "band: " + "; ".join(words + ([alone] if 1 in seeds else []))


def tidy(axes, ylabel: str, xlabel: str) -> None:
    """Name the axes, and leave out the frame's upper and right line."""
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bars(axes, x: Sequence[float], points: Sequence[tuple], index: int, label: str) -> None:
    """(middle, low, high) `points` with error bars."""
    middle, low, high = np.array(points).T
    style = {"fmt": MARKS[index % len(MARKS)], "markersize": 4.5, "capsize": 3, "color": PALETTE[index % len(PALETTE)]}
    axes.errorbar(x, middle, [middle - low, high - middle], label=label, **style)


def draw_band(axes, x: Sequence[float], points: Sequence[tuple], index: int, label: str, *, shaded: bool) -> None:
    """A line through (middle, low, high) `points` with its band, if `shaded`; a single point gets an error bar."""
    if len(points) == 1:
        draw_bars(axes, x, points, index, label)
        return
    middle, low, high = zip(*points, strict=True)
    colour, mark = PALETTE[index % len(PALETTE)], MARKS[index % len(MARKS)]
    axes.plot(x, middle, marker=mark, markersize=4.5, linewidth=1.8, color=colour, label=label)
    if shaded:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


NAN = math.nan


def call_of(row: dict) -> tuple[str, int, int]:
    """The layer call that a row of a measurement is of: (section, loop, layer)."""
    return row["section"], row["loop"], row["layer"]


def call_labels(calls: Sequence[tuple[str, int, int]]) -> list[str]:
    """A name for each layer call (section, loop, layer); a number that is the same in all core calls is left out."""
    loops = {loop for section, loop, _ in calls if section == "core"}
    layers = {layer for section, _, layer in calls if section == "core"}

    def name(section: str, loop: int, layer: int) -> str:
        if section != "core":
            return f"{section} {layer + 1}"
        parts = []
        if len(loops) > 1:
            parts.append(f"loop {loop + 1}")
        if len(layers) > 1:
            parts.append(f"layer {layer + 1}")
        return ", ".join(parts) or "core"

    return [name(*call) for call in calls]


def ordered(values) -> list:
    """Distinct values in order of appearance."""
    return list(dict.fromkeys(values))


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.0f} %"


def panel_grid(lines: Sequence[str], columns: Sequence[str], width: float, height: float):
    """A figure with a panel for each line and column, and its axes (lines, columns).

    width, height: inches of a panel, about; the names beside the panels get more.
    """
    size = (1.9 + width * len(columns), max(0.6 + max(height, 1.3) * len(lines), 2.9))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(len(lines), len(columns), squeeze=False)


def shade(axes, values: Sequence[Sequence[float]], numbers: bool = True):
    """Shares in [0, 1] as colours and, if `numbers`, as numbers in %; nan, not measured, stays white."""
    percent = [[100 * value for value in across] for across in values]
    image = axes.imshow(percent, cmap=COLOURS, vmin=0, vmax=100, origin="lower", aspect="auto")
    axes.tick_params(length=0)
    size = points(axes.figure, 8)
    for y, across in enumerate(percent):
        for x, value in enumerate(across):
            if numbers and not math.isnan(value):
                colour = "white" if value < 55 else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=size)
    return image


def name_lines(across, name: str, labels: Sequence[str]) -> None:
    """Write `name` and the `labels` of its layer calls beside the left panel of `across`, and none on the others."""
    across[0].set_yticks(range(len(labels)), labels, fontsize=points(across[0].figure, 8))
    across[0].set_ylabel(name, fontsize=points(across[0].figure, 9))
    for axes in across[1:]:
        axes.set_yticks([])
