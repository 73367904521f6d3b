"""Groups of seeds: runs of one recipe that differ in their seeds are grouped, averaged, and told as a Markdown table.

The recipes in a group are equal except for name, seed and data.seed. An interval over n seeds is Student's t at 95 %,
mean +- t(n - 1) * s / sqrt(n), which assumes a normal distribution; with three runs it is wide, since t(2) = 4.30.
Accuracies near 0 or 1 are not normally distributed, so tables give [lowest, highest] instead.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from statistics import fmean

from .folder import Run
from .intervals import t_interval
from .sections import flatten

# Fields that older versions wrote into the recipe.yaml of every task, with the values that say nothing.
SHARED = {
    "data.config": "cpu", "data.weighting": "rows", "data.readout": "token", "data.pad_to": None,
    "data.at_least_hops": False, "data.files": None, "data.sequence_length": None, "data.tokenizer": None,
    "data.vocab_size": None, "data.validation_tokens": None, "data.spellings": None, "data.assistant_only_loss": None,
    "curriculum.start_hops": None,
    "curriculum.stop_hops": None, "curriculum.threshold": 0.95, "curriculum.min_steps": 0,
    "curriculum.after_last": "continue", "curriculum.restart_optimizer": False,
}  # fmt: skip


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Name of the group -> its runs, in the order given. A group has the shortest name of its runs without "_seedN".

    Raises:
        ValueError: a run is given twice, or two groups have the same name.
    """
    groups = {}
    for run in runs:
        groups.setdefault(recipe_key(run), []).append(run)
    named = {}
    for members in groups.values():
        folders = [run.folder.resolve() for run in members]
        if len(set(folders)) < len(folders):
            raise ValueError(f"{members[0]} is among the runs twice: name each run once.")
        name = re.sub(r"_seed\d+$", "", min((run.name for run in members), key=len))
        if name in named:
            raise ValueError(
                f"{named[name][0]} and {members[0]} have different recipes but the same name {name}: "
                "rename one folder."
            )
        named[name] = members
    return named


def groups_against(runs: Sequence[Run], against: str | None) -> dict[str, list[Run]]:
    """`group_runs`, checked for a group called `against`, the baseline, if it is given.

    Raises:
        ValueError: there is no such group (with the nearest name), or as `group_runs`.
    """
    groups = group_runs(runs)
    if against is not None and against not in groups:
        nearest = difflib.get_close_matches(against, groups, n=1, cutoff=0)[0]
        raise ValueError(f"no group is called {against!r}; did you mean {nearest!r}? There are {', '.join(groups)}.")
    return groups


def recipe_key(run: Run) -> str:
    """The recipe without what tells seeds apart, whichever version wrote it."""
    recipe = flatten(run.recipe())
    if "curriculum.check_every" in recipe:
        recipe["check_every"] = recipe.pop("curriculum.check_every")
    same = {name: value for name, value in recipe.items() if name not in ("name", "seed", "data.seed")}
    return json.dumps({n: v for n, v in same.items() if n not in SHARED or v != SHARED[n]}, sort_keys=True)


def span(values: Iterable[float | None], digits: int = 0, scale: float = 1) -> str:
    """`mean [lowest, highest]`; one number if they print alike, and - if there are no values.

    Args:
        values: None is left out.
        digits: after the point.
        scale: every value is multiplied by it.
    """
    known = [scale * value for value in values if value is not None]
    if not known:
        return "-"
    mean, low, high = (f"{value:,.{digits}f}" for value in (fmean(known), min(known), max(known)))
    return low if low == high else f"{mean} [{low}, {high}]"


def to_markdown(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table with a line for each dict of column -> cell; a missing cell is -. A cell may have a | in it."""
    columns = list(dict.fromkeys(column for cells in rows for column in cells))
    lines = [columns, ["---"] * len(columns)] + [[cells.get(column, "-") for column in columns] for cells in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def interval(values: Sequence[float], form: str) -> str:
    """The 95 % t-interval as text; - for one value. form: format of the numbers, such as ".1f"."""
    if len(values) < 2:
        return "-"
    _, low, high = t_interval(values)
    return f"[{low:{form}}, {high:{form}}]"


def seeds_of(run: Run) -> tuple[int, int]:
    """(seed, data.seed) of a run: the two fields in which the runs of a group differ."""
    recipe = run.recipe()
    return recipe["seed"], recipe["data"]["seed"]


def by_seeds(runs: Sequence[Run]) -> dict[tuple[int, int], Run]:
    """Runs by `seeds_of`. Raises ValueError if two runs have the same seeds."""
    found = {}
    for run in runs:
        if seeds_of(run) in found:
            raise ValueError(f"{found[seeds_of(run)]} and {run} have the same recipe and seeds: leave one out.")
        found[seeds_of(run)] = run
    return found
