"""Which figures a set of runs gets, and where: what `looped plot RUN...` draws.

Figures of one run go to RUN/figures/, or to --output if the run is drawn alone: grid.png and training.png
(run_figures.py), hops.png and loops.png after `looped eval`, halting.png after `looped halting`, learning.png for the
task composition. Several runs are grouped by recipe; figures of groups (seed_figures.py) go to one folder and have the
group in their names.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from looplab.instruments.drawing import SeedGroup, all_have, groups_folder, own_folder, save
from looplab.runs.folder import Run
from looplab.runs.seeds import group_runs

from .records import HALTING, LOOPS
from .run_figures import heat_map, training_curves
from .seed_figures import halting_figure, hops_figure, learning_figure, loops_figure


def plot_runs(runs: Sequence[Run], output: str | Path | None = None) -> list[Path]:
    """Draw every run, and groups of seeds where there are several runs; returns the PNG paths.

    Args:
        output: folder for the figures of one run, or for those that show several together; unless given RUN/figures,
            or `figures/<groups>` beside the first run.

    Raises:
        ValueError: a run has not been evaluated, or the runs were evaluated on different grids.
    """
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


def draw(groups: Sequence[SeedGroup], path: Callable[[str, str], Path]) -> list[Path]:
    """The figures for which all runs have the files; `path` of a kind of figure and the group's name, or ''."""
    runs = [run for _, members in groups for run in members]
    paths = []
    if all_have(runs, LOOPS):
        paths.append(save(hops_figure(groups), path("hops", "")))
        paths += [save(loops_figure(group), path("loops", group[0])) for group in groups]
    if all_have(runs, HALTING):
        paths += [save(halting_figure(group), path("halting", group[0])) for group in groups]
    if all(run.task() == "composition" for run in runs):
        paths.append(save(learning_figure(groups), path("learning", "")))
    return paths
