"""Which figures a set of runs gets, and where: what `looped plot RUN...` draws.

Each run's own go to RUN/figures/, or where --output says of a run alone: grid.png and training.png (plots.py), and as
far as it has the files, hops.png and loops.png (of `looped eval`), halting.png (of `looped halting`), learning.png
(composition). Several runs are grouped by recipe, and the figures of groups (curves.py) go to one folder, with the
group in their names. Runs on text have their own (text_plots.py): training.png, and once evaluated perplexity.png; of
groups held_out.png and perplexity.png. Runs on molecules (molecule_plots.py): training.png, validity.png, faults.png,
molecules.png, and once `looped lens` ran ablations.png and readouts.png.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from looplab.instruments.drawing import Group, all_have, groups_folder, own_folder, save
from looplab.runs.folder import Run, open_run
from looplab.runs.seeds import group_runs
from looplab.runs.writing import write_whole

from .curves import halting_figure, hops_figure, learning_figure, loops_figure
from .molecule_plots import (
    ablations_figure,
    exits_figure,
    faults_figure,
    molecules_picture,
    readouts_figure,
    validity_figure,
)
from .plots import heat_map, training_curves
from .text_plots import held_out_figure, perplexity_figure, training_figure


def plot_runs(folders: Sequence[str | Path], output: str | Path | None = None) -> list[Path]:
    """Draw every run, and groups of seeds where there are several runs; returns the PNG paths.

    Args:
        output: folder for the figures of one run, or for those that show several together; unless given RUN/figures,
            or `figures/<groups>` beside the first run.

    Raises:
        ValueError: no such run, it has not been evaluated, or the runs were evaluated on different grids.
    """
    runs = [open_run(folder) for folder in folders]
    paths = []
    for run in runs:
        figures = own_folder(run, runs, output)
        own = [save(heat_map([run]), figures / "grid.png"), save(training_curves(run), figures / "training.png")]
        own += draw([(run.name, [run])], lambda kind, _, figures=figures: figures / f"{kind}.png")
        paths += run.drew(own)
    if len(runs) > 1:
        groups = list(group_runs(runs).items())
        folder = groups_folder(runs, groups, output)
        several = [(name, members) for name, members in groups if len(members) > 1]
        paths += [save(heat_map(members), folder / f"grid_{name}.png") for name, members in several]
        paths += draw(groups, lambda kind, name: folder / f"{kind}{'_' if name else ''}{name}.png")
    return paths


def plot_text_runs(runs: Sequence[Run], output: str | Path | None = None) -> list[Path]:
    """As `plot_runs`, for runs on text; those that were not evaluated, or at one loop count, get no perplexity.png.

    Raises:
        ValueError: a run has no held-out losses yet, or the runs of a group none after the same steps.
    """
    paths = []
    for run in runs:
        own = [save(training_figure(run), own_folder(run, runs, output) / "training.png")]
        paths += run.drew(own + draw_perplexity([(run.name, [run])], own_folder(run, runs, output)))
    if len(runs) > 1:
        groups = list(group_runs(runs).items())
        folder = groups_folder(runs, groups, output)
        paths += [save(held_out_figure(groups), folder / "held_out.png"), *draw_perplexity(groups, folder)]
    return paths


def plot_molecule_runs(runs: Sequence[Run], output: str | Path | None = None) -> list[Path]:
    """As `plot_runs`, for runs on molecules: of what was not measured there is no picture.

    Raises:
        ValueError: a run has no held-out losses yet, or its samples are gone.
    """
    paths = []
    for run in runs:
        figures = own_folder(run, runs, output)
        own = [save(training_figure(run), figures / "training.png")]
        if all_have([run], "molecules.jsonl"):
            own += draw_molecules([(run.name, [run])], figures)
            own.append(write_whole(figures / "molecules.png", molecules_picture(run)))
        if all_have([run], "halting.jsonl"):
            own.append(save(exits_figure(run), figures / "exits.png"))
        if all_have([run], "ablations.jsonl"):
            own.append(save(ablations_figure(run.ablations(), run.name), figures / "ablations.png"))
        if all_have([run], "readouts.jsonl"):
            own.append(save(readouts_figure(run.readouts(), run.name), figures / "readouts.png"))
        paths += run.drew(own)
    if len(runs) > 1:
        groups = list(group_runs(runs).items())
        folder = groups_folder(runs, groups, output)
        paths.append(save(held_out_figure(groups), folder / "held_out.png"))
        if all_have(runs, "molecules.jsonl"):
            paths += draw_molecules(groups, folder)
    return paths


def draw_molecules(groups: Sequence[Group], folder: Path) -> list[Path]:
    """validity.png, and faults.png of each group, with its name where there are several."""
    paths = [save(validity_figure(groups), folder / "validity.png")]
    for name, members in groups:
        file = f"faults_{name}.png" if len(groups) > 1 else "faults.png"
        paths.append(save(faults_figure(members, name), folder / file))
    return paths


def draw_perplexity(groups: Sequence[Group], folder: Path) -> list[Path]:
    """perplexity.png in `folder`, if all runs were evaluated and at more than one loop count."""
    evaluated = all_have([run for _, members in groups for run in members], "text.jsonl")
    figure = perplexity_figure(groups) if evaluated else None
    return [] if figure is None else [save(figure, folder / "perplexity.png")]


def draw(groups: Sequence[Group], path: Callable[[str, str], Path]) -> list[Path]:
    """The figures for which all runs have the files; `path` of a kind of figure and the group's name, or ''."""
    runs = [run for _, members in groups for run in members]
    paths = []
    if all_have(runs, "loops.jsonl"):
        paths.append(save(hops_figure(groups), path("hops", "")))
        paths += [save(loops_figure(group), path("loops", group[0])) for group in groups]
    if all_have(runs, "halting.jsonl"):
        paths += [save(halting_figure(group), path("halting", group[0])) for group in groups]
    if all(run.recipe().get("data", {}).get("task") == "composition" for run in runs):
        paths.append(save(learning_figure(groups), path("learning", "")))
    return paths
