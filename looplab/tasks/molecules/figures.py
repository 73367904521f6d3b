"""`looped plot` on molecules.

validity.png    validity and test loss over loops, with trained loop counts shaded
faults.png      share of samples with each fault, over loops
exits.png       validity over mean loops: halting rules against fixed loop counts (single runs)
molecules.png   a grid of valid samples, drawn by rdkit (single runs)
ablations.png   the change when the output of one attention head is replaced, by layer call (single runs)
readouts.png    each loop read by the model's own head and by a head fitted for it (single runs)
"""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import NullLocator

from data_builders.molecules import rdkit_chem
from looplab.instruments.drawing import (
    FRAME,
    SeedGroup,
    all_have,
    band_words,
    call_labels,
    draw_band,
    groups_folder,
    name_lines,
    ordered,
    own_folder,
    panel_grid,
    picture_of,
    points,
    save,
    tidy,
)
from looplab.runs.folder import Run, json_lines
from looplab.runs.intervals import t_interval
from looplab.runs.seeds import group_runs
from looplab.runs.writing import write_whole
from looplab.tasks.language.figures import held_out_figure, training_figure

from .ablations import SHOWN, VALUES, cell_of
from .records import ABLATIONS, EVALUATION, HALTING, MOLECULES, READOUTS
from .smiles import LABELS, canonical_or_none

FLOOR = 0.01  # % of the samples; a fault that no sample has is drawn here
DRAWN = 20  # molecules in molecules.png


def by_loops(run: Run) -> dict[int, dict]:
    """Loop count -> line of molecules.jsonl with the first sampling setting."""
    first = run.read(EVALUATION)["settings"][0]["name"]
    return {row["loops"]: row for row in run.read(MOLECULES) if row["setting"] == first}


def loop_axis(axes, counts: Sequence[int], runs: Sequence[Run]) -> None:
    """Mark the loop counts on the x axis, and shade the trained ones if they are the same in all runs."""
    spans = {run.trained_loops() for run in runs}
    if len(spans) == 1:
        [(first, last)] = spans
        axes.axvspan(first - 0.3, last + 0.3, color=FRAME, alpha=0.08, linewidth=0, label="loops in training")
    axes.set_xticks(counts, counts)
    axes.xaxis.set_minor_locator(NullLocator())


def shared_counts(runs: Sequence[Run]) -> list[int]:
    """Loop counts at which all runs were evaluated."""
    return sorted(set.intersection(*(set(by_loops(run)) for run in runs)))


def validity_figure(groups: Sequence[SeedGroup]) -> Figure:
    """Validity in % above, test loss below, over loops. Bands: Wilson's interval for a run, t-interval for seeds."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    counts = sorted({count for _, runs in groups for count in shared_counts(runs)})
    for index, (name, runs) in enumerate(groups):
        own = shared_counts(runs)
        rows = [[by_loops(run)[count] for run in runs] for count in own]
        if len(runs) == 1:
            points = [
                tuple(100 * v for v in (row["validity"]["share"], *row["validity"]["interval"])) for [row] in rows
            ]
        else:
            points = [t_interval([100 * row["validity"]["share"] for row in members]) for members in rows]
        draw_band(upper, own, points, index, name, shaded=True)
        losses = [t_interval([row["loss"] for row in members]) for members in rows]
        draw_band(lower, own, losses, index, name, shaded=len(runs) > 1)
    for axes in (upper, lower):
        loop_axis(axes, counts, [run for _, runs in groups for run in runs])
    tidy(upper, "valid molecules (%)", "")
    tidy(lower, "test loss (nats per token)", "loops at inference")
    upper.set_ylim(-3, 103)
    upper.set_title(band_words(groups, "95 % interval over one run's samples"), fontsize=9, color="0.3", loc="left")
    upper.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def faults_figure(runs: Sequence[Run], name: str) -> Figure:
    """Share of samples with each fault over loops, on a logarithmic scale; means over the runs."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes, counts = figure.add_subplot(), shared_counts(runs)
    for index, label in enumerate(LABELS):
        shares = [
            sum(100 * by_loops(run)[count]["faults"][label]["share"] for run in runs) / len(runs) for count in counts
        ]
        if any(shares):
            points = [(max(share, FLOOR),) * 3 for share in shares]
            draw_band(axes, counts, points, index, label, shaded=False)
    loop_axis(axes, counts, runs)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR * 0.8, 130)
    tidy(axes, "samples with the fault (%)", "loops at inference")
    seeds = f", mean of {len(runs)} runs" if len(runs) > 1 else ""
    axes.set_title(f"{name}{seeds}; a sample may have several; {FLOOR} stands for none", fontsize=9, loc="left")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def exits_figure(run: Run) -> Figure:
    """Validity in % over mean loops per token: a line per halting rule, and a line for fixed loop counts."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    samples = [row for row in run.read(HALTING) if row["measure"] == "sample"]
    rules = ["fixed", *dict.fromkeys(row["rule"] for row in samples if row["rule"] != "fixed")]
    for index, rule in enumerate(rules):
        rows = sorted((row for row in samples if row["rule"] == rule), key=lambda row: row["loops"])
        points = [
            tuple(100 * share for share in (row["validity"]["share"], *row["validity"]["interval"])) for row in rows
        ]
        label = "fixed counts" if rule == "fixed" else rule
        draw_band(axes, [row["loops"] for row in rows], points, index, label, shaded=rule == "fixed")
    tidy(axes, "valid molecules (%)", "mean loops per token")
    number = samples[0]["n"]
    axes.set_title(f"{run.name}; band: 95 % interval of {number:,} samples", fontsize=9, color="0.3", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def ablations_figure(rows: Sequence[dict], name: str) -> Figure:
    """Heads x layer calls of one run: a line of panels for each of `SHOWN`, a column for each of `VALUES`.

    rows: lines of ablations.jsonl.
    """
    heads = sorted({row["head"] for row in rows})
    calls, cells = ordered(cell_of(row)[:3] for row in rows), {cell_of(row): row for row in rows}
    figure, panels = panel_grid(list(SHOWN), VALUES, 0.8 + 0.52 * len(calls), 0.55 + 0.3 * len(heads))
    size = points(figure, 7)
    for (title, shown), across in zip(SHOWN.items(), panels, strict=True):
        changes = {cell: shown(row)[0]["change"] * shown(row)[1] for cell, row in cells.items()}
        largest = max(map(abs, changes.values())) or 1.0
        for value, axes in zip(VALUES, across, strict=True):
            table = [[changes[*call, head, value] for call in calls] for head in heads]
            # Most changes are ten times smaller than those of the first loop.
            norm = SymLogNorm(largest / 30, vmin=-largest, vmax=largest)
            axes.imshow(table, cmap="PuOr_r", norm=norm, aspect="auto")
            axes.tick_params(length=0)
            for y, line in enumerate(table):
                for x, change in enumerate(line):
                    colour = "white" if abs(norm(change) - 0.5) > 0.37 else "black"
                    text = f"{change:+.1f}" if largest > 20 else f"{change:+.3f}"
                    axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=size)
            axes.set_xticks(range(len(calls)), call_labels(calls), fontsize=points(figure, 8),
                            rotation=90 if len(calls) > 8 else 0)  # fmt: skip
            axes.set_title(f"{title}, by {value}", fontsize=points(figure, 8))
        name_lines(across, "head", [str(head + 1) for head in heads])
    figure.suptitle(
        f"{name}: change with the output of one attention head replaced; the scale of colours is logarithmic",
        fontsize=points(figure, 9),
    )
    return figure


def readouts_figure(rows: Sequence[dict], name: str) -> Figure:
    """Validity above, test loss below, over loops, with 95 % intervals: own head and fresh head of one run."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    counts = ordered(row["loops"] for row in rows)
    for index, (head, label) in enumerate((("own", "the model's own head"), ("fresh", "a head fitted for the loop"))):
        own = [row for row in rows if row["head"] == head]
        valid = [[100 * v for v in (row["validity"]["share"], *row["validity"]["interval"])] for row in own]
        draw_band(upper, counts, valid, index, label, shaded=True)
        draw_band(lower, counts, [(row["loss"], *row["loss_interval"]) for row in own], index, label, shaded=True)
    lower.set_xticks(counts, counts)
    tidy(upper, "valid molecules (%)", "")
    tidy(lower, "test loss (nats per token)", "loops")
    upper.set_ylim(-3, 103)
    upper.set_title(f"{name}, {rows[0]['n']} samples each", fontsize=9, loc="left")
    upper.legend(frameon=False, fontsize=9)
    return figure


def molecules_picture(run: Run, format: str = "png") -> bytes:
    """Picture of the first valid samples at the model's own loop count, with their SMILES."""
    rdkit_chem()
    from rdkit import Chem
    from rdkit.Chem.Draw import rdMolDraw2D

    facts = run.read(EVALUATION)
    path = run.folder / "samples" / f"{facts['settings'][0]['name']}-loops{facts['num_loops']}.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}: run `looped eval {run}` again.")
    valid = []
    for row in json_lines(path.read_text(encoding="utf-8")):
        smiles = canonical_or_none(row["smiles"]) if row["finished"] else None
        if smiles is not None:
            valid.append(smiles)
        if len(valid) == DRAWN:
            break
    columns, side = 5, 260
    size = (columns * side, max(1, -(-len(valid) // columns)) * side)
    canvas = rdMolDraw2D.MolDraw2DSVG if format == "svg" else rdMolDraw2D.MolDraw2DCairo
    drawing = canvas(*size, side, side)
    drawing.drawOptions().legendFontSize = 14
    drawing.DrawMolecules([Chem.MolFromSmiles(smiles) for smiles in valid], legends=valid)
    drawing.FinishDrawing()
    drawn = drawing.GetDrawingText()
    if format != "pdf":
        return drawn.encode() if format == "svg" else drawn
    figure = Figure(figsize=(size[0] / 160, size[1] / 160))  # rdkit draws no PDF
    figure.figimage(imread(io.BytesIO(drawn)))
    return picture_of(figure, format)


def plot_runs(runs: Sequence[Run], output: str | Path | None = None, format: str = "png") -> list[Path]:
    """`Task.plot`. A figure is left out if its file was not measured.

    Raises:
        ValueError: a run has no held-out loss yet, or its samples are gone.
    """
    paths = []
    for run in runs:
        figures = own_folder(run, runs, output)
        own = [save(training_figure(run), figures / "training.png", format)]
        if all_have([run], MOLECULES):
            own += draw_molecules([(run.name, [run])], figures, format)
        # A published model comes without its samples.
        if all_have([run], MOLECULES) and ((run.folder / "samples").is_dir() or not run.copied):
            own.append(write_whole(figures / f"molecules.{format}", molecules_picture(run, format)))
        if all_have([run], HALTING):
            own.append(save(exits_figure(run), figures / "exits.png", format))
        if all_have([run], ABLATIONS):
            own.append(save(ablations_figure(run.read(ABLATIONS), run.name), figures / "ablations.png", format))
        if all_have([run], READOUTS):
            own.append(save(readouts_figure(run.read(READOUTS), run.name), figures / "readouts.png", format))
        paths += run.drew(own)
    if len(runs) > 1:
        groups = list(group_runs(runs).items())
        folder = groups_folder(runs, groups, output)
        paths.append(save(held_out_figure(groups), folder / "held_out.png", format))
        if all_have(runs, MOLECULES):
            paths += draw_molecules(groups, folder, format)
    return paths


def draw_molecules(groups: Sequence[SeedGroup], folder: Path, format: str) -> list[Path]:
    """Save validity.png, and faults.png for each group, with its name if there are several."""
    paths = [save(validity_figure(groups), folder / "validity.png", format)]
    for name, members in groups:
        file = f"faults_{name}.png" if len(groups) > 1 else "faults.png"
        paths.append(save(faults_figure(members, name), folder / file, format))
    return paths
