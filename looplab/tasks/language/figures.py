"""Figures of the training of runs on text or molecules: losses over training tokens.

    training     batch losses, and the held-out loss at each loop count that was checked      one run
    held_out     held-out loss                                                                all groups

A band is the 95 % t-interval over the runs of a group; a single run has none.
"""

from collections.abc import Sequence
from statistics import fmean

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from looplab.instruments.drawing import COLOURS, FRAME, SeedGroup, band_words, draw_band, tidy
from looplab.runs.folder import Run
from looplab.runs.intervals import t_interval

TOKENS_LABEL = "training tokens"


def check_rows(run: Run) -> list[dict]:
    """The records of metrics.jsonl with a held-out loss, with `tokens` added: step x mean tokens of an update.

    Raises:
        ValueError: there are no such records, or no training records, yet.
    """
    rows = run.metrics()
    trained = [row for row in rows if "loss" in row]
    checks = [row for row in rows if "held_out" in row]
    if not trained or not checks:
        raise ValueError(f"{run}/metrics.jsonl has no training and held-out rows yet; wait for the first ones.")
    per_step = trained[0]["tokens"] / trained[0]["step"]
    return [row | {"tokens": row["step"] * per_step} for row in checks]


def label_tokens(axes) -> None:
    """Write the numbers of tokens as 1 k, 1 M, 1 G."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def training_figure(run: Run) -> Figure:
    """Batch losses and held-out losses over training tokens: vermilion at the run's own loop count, shades of cividis
    at the recipe's eval_loops."""
    checks = check_rows(run)
    steps = [row for row in run.metrics() if "loss" in row]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    # Batch losses are not smoothed: an average lags behind a falling loss, and would look worse than held-out losses.
    batches = [row["tokens"] for row in steps], [row["loss"] for row in steps]
    axes.plot(*batches, ".", color="0.75", markersize=3, label="logged batches")
    x = [row["tokens"] for row in checks]
    held_out = [row["held_out"]["loss"] for row in checks]
    axes.plot(x, held_out, "o-", color=FRAME, markersize=5, linewidth=3, label="held out, own loops")
    counts = sorted({int(count) for row in checks for count in row.get("held_out_at_loops", {})})
    for index, count in enumerate(counts):
        # The lightest part of the map does not show on white.
        shade = colormaps[COLOURS](0.8 * index / max(len(counts) - 1, 1))
        seen = [row for row in checks if str(count) in row.get("held_out_at_loops", {})]
        points = [row["tokens"] for row in seen], [row["held_out_at_loops"][str(count)]["loss"] for row in seen]
        axes.plot(*points, "o-", color=shade, markersize=3, linewidth=1.4, label=f"held out, {loops_word(count)}")
    label_tokens(axes)
    tidy(axes, "loss (nats per token)", TOKENS_LABEL)
    axes.set_title(f"{run.name}: {steps[-1]['step']:,} updates", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def loops_word(count: int) -> str:
    return f"{count} loop" if count == 1 else f"{count} loops"


def held_out_figure(groups: Sequence[SeedGroup]) -> Figure:
    """Held-out loss at the runs' own loop counts, over training tokens, at steps where all runs of a group have it."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, runs) in enumerate(groups):
        # Runs are paired by step, since seeds draw molecules of different lengths.
        by_step = [{row["step"]: row for row in check_rows(run)} for run in runs]
        shared = sorted(set.intersection(*map(set, by_step)))
        if not shared:
            raise ValueError(f"the runs of {name} have no check after the same steps: wait, or plot them one by one.")
        points = [t_interval([rows[step]["held_out"]["loss"] for rows in by_step]) for step in shared]
        tokens = [fmean(rows[step]["tokens"] for rows in by_step) for step in shared]
        draw_band(axes, tokens, points, index, name, shaded=len(runs) > 1)
    label_tokens(axes)
    tidy(axes, "held-out loss (nats per token)", TOKENS_LABEL)
    several = [group for group in groups if len(group[1]) > 1]
    if several:
        axes.set_title(band_words(several), fontsize=9, color="0.3", loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
