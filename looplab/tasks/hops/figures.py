"""`looped plot` on hops: which figures runs get, and in which folders.

Figures of one run go to RUN/figures/, or to --output if it is the only run: grid.png and training.png
(run_figures.py), hops.png and loops.png after `looped eval`, halting.png after `looped halting`, and learning.png for
the task composition. Several runs are grouped by recipe; figures of groups (seed_figures.py) go to one folder, with
the name of the group in their names.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from looplab.instruments.drawing import SeedGroup, all_have, groups_folder, own_folder, save
from looplab.runs.folder import Run
from looplab.runs.seeds import group_runs

from .records import HALTING, LOOPS
from .run_figures import heat_map, training_curves
from .seed_figures import halting_figure, hops_figure, learning_figure, loops_figure


def plot_runs(runs: Sequence[Run], output: str | Path | None = None, format: str = "png") -> list[Path]:
    """Draw every run, and groups of seeds if there are several runs; returns their paths.

    Args:
        output: folder for the figures of a single run, or of groups; unless given, RUN/figures for a run, and
            `figures/<groups>` beside the first run for groups.
        format: of the figures, see `drawing.save`.

    Raises:
        ValueError: a run has not been evaluated, or the runs were evaluated on different grids.
    """
    paths = []
    for run in runs:
        figures = own_folder(run, runs, output)
        own = [save(heat_map([run]), figures / "grid.png", format)]
        own.append(save(training_curves(run), figures / "training.png", format))
        own += draw([(run.name, [run])], lambda kind, _, figures=figures: figures / f"{kind}.png", format)
        paths += run.drew(own)
    if len(runs) > 1:
        groups = list(group_runs(runs).items())
        folder = groups_folder(runs, groups, output)
        several = [(name, members) for name, members in groups if len(members) > 1]
        paths += [save(heat_map(members), folder / f"grid_{name}.png", format) for name, members in several]
        paths += draw(groups, lambda kind, name: folder / f"{kind}{'_' if name else ''}{name}.png", format)
    return paths


def draw(groups: Sequence[SeedGroup], path: Callable[[str, str], Path], format: str) -> list[Path]:
    """Save the figures whose files all runs have. path(kind of figure, name of the group or ''): of a figure."""
    runs = [run for _, members in groups for run in members]
    paths = []
    if all_have(runs, LOOPS):
        paths.append(save(hops_figure(groups), path("hops", ""), format))
        paths += [save(loops_figure(group), path("loops", group[0]), format) for group in groups]
    if all_have(runs, HALTING):
        paths += [save(halting_figure(group), path("halting", group[0]), format) for group in groups]
    if all(run.task() == "composition" for run in runs):
        paths.append(save(learning_figure(groups), path("learning", ""), format))
    return paths
