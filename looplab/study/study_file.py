"""The file of a study, studies/NAME.yaml: what is compared, on which seeds, and what counts as success.

question: Do fresh seeds reach 80 hops?
arms:
  quickstart: {recipe: quickstart}
  short: {recipe: quickstart, overrides: {max_steps: 2400}}
seeds: [10, 11, 12, 13, 14]
tuned_on: [0, 100]
evaluate: {loops: [16, 80], limit: 100}
keep: {loops: [80]}
table: {columns: hops, value: accuracy, scale: 100}
success:
  - {arm: quickstart, where: {hops: 80}, at_least: 0.99}
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import Number, check_fields, number, numbers
from looplab.runs.recipes import STUDY, TRAIN, read_recipe_file
from looplab.runs.sections import build, check_name, flatten
from looplab.shipped import find_study


@strict
@dataclass
class Arm:
    """What is trained once per seed."""

    recipe: str  # a file, or a name of `looped recipes`
    # Fields of the recipe put over it, such as optim.lr. In their text, {ARM} is the run of an earlier arm at the same
    # seed, as in init_from: "{teacher}/model".
    overrides: dict = field(default_factory=dict)
    data: dict | None = None  # in place of the recipe's section `data`
    evaluate: dict = field(default_factory=dict)  # options of the measurement, over those of the study
    where: dict = field(default_factory=dict)  # field -> value of its rows that are shown and judged, such as loops


@strict
@dataclass
class Table:
    """What is shown of the rows: a line per arm, a column per value of a field."""

    columns: str  # field of the rows whose values are the columns
    value: str = "accuracy"  # field of the rows that is shown
    where: dict = field(default_factory=dict)  # field -> value of the rows that are shown
    shown: list | None = None  # values of `columns` that the table has; all, unless given. The figure has all
    scale: Number = number(1, above=0)  # every value is multiplied by it
    digits: int = number(1, at_least=0, at_most=9)  # after the point


@strict
@dataclass
class Success:
    """What was asked for before the runs. Of several rows that `where` leaves, the mean counts."""

    arm: str  # the arm that is judged
    where: dict = field(default_factory=dict)  # field -> value of the rows that are judged
    at_least: Number | None = number()  # the value, or the difference to `over`, has to be
    at_most: Number | None = number()  # instead of `at_least`
    over: str | None = None  # another arm, or the same, whose value of the same seed is subtracted
    of: Literal["every seed", "mean", "interval"] = "every seed"  # which value: interval, its end that is nearer
    over_where: dict | None = None  # rows that are subtracted: those of `where` unless given
    value: str | None = None  # field of the rows that is judged: that of the table unless given


@strict
@dataclass
class Study:
    """Fields of the file, see the module docstring."""

    question: str  # one sentence
    arms: dict[str, Arm]
    seeds: list[int] = numbers(at_least=0, distinct=True)  # that are reported
    tuned_on: list[int] = numbers(at_least=0, distinct=True)  # that choices were made on: never reported
    seed_fields: list[str] = field(default_factory=lambda: ["seed", "data.seed"])  # of the recipe, that get the seed
    folder: str | None = None  # of runs/ that has the trainings, for studies that share them; the study's own name
    measure: Literal["eval", "halting", "memory"] = "eval"  # verb of `looped` that measures a run
    evaluate: dict = field(default_factory=dict)  # options of the verb, such as max_loops
    record: str = "grid.jsonl"  # file of the run whose lines become rows
    keep: dict = field(default_factory=dict)  # field -> values of the lines that become rows; all, unless given
    table: Table = field(default_factory=lambda: Table("hops"))
    success: list[Success] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)  # pages that show the table, see page.py

    def __post_init__(self):
        check_fields(self)
        if not self.seeds or not self.arms:
            raise ValueError("a study has at least one arm and one seed: fill in `arms` and `seeds`.")
        for name in [*self.arms, *([] if self.folder is None else [self.folder])]:
            check_name(name)
        known = set()
        for name, arm in self.arms.items():
            if later := sorted(named(arm.overrides) - known):
                raise ValueError(f"arms.{name} uses {{{later[0]}}}: write an arm of this name before it.")
            known.add(name)
        both = sorted(set(self.seeds) & set(self.tuned_on))
        if both:
            raise ValueError(f"seed {both[0]} is in tuned_on and in seeds: report on seeds without choices.")
        for index, asked in enumerate(self.success):
            for arm in filter(None, (asked.arm, asked.over)):
                if arm not in self.arms:
                    raise ValueError(f"success[{index}] names {arm!r}: the arms are {', '.join(self.arms)}.")
            if asked.over is None and asked.over_where is not None:
                raise ValueError(f"success[{index}].over_where needs `over`: name the arm that is subtracted.")
            for name, arm in (("where", asked.arm), ("over_where", asked.over)):
                where = vars(asked)[name] or {}
                for key, own in ({} if arm is None else self.arms[arm].where).items():
                    if where.get(key, own) != own:
                        raise ValueError(
                            f"success[{index}].{name} has {key} {where[key]}, and arms.{arm}.where has {own}: "
                            "leave one of them out."
                        )
            if (asked.at_least is None) == (asked.at_most is None):
                raise ValueError(f"success[{index}] needs at_least or at_most, and one of them.")


def listed(values, name: str, form: type, of: type) -> list | dict:
    """Sections `form` of a list, or of a dict if `of` is dict. Raises ValueError, with the place, for other values."""
    if not isinstance(values, of):
        raise ValueError(f"{name} must be {'fields and values' if of is dict else 'a list'}, got {values!r}.")
    if isinstance(values, dict):
        return {str(key): build(value, form, prefix=f"{name}.{key}.") for key, value in values.items()}
    return [build(value, form, prefix=f"{name}[{index}].") for index, value in enumerate(values)]


def read_study(name: str) -> tuple[str, Study]:
    """(name, study) of a file, or of a study of this package.

    Raises:
        ValueError: what is wrong and where.
    """
    path, values = read_recipe_file(find_study(name), STUDY)
    try:
        values = dict(values)
        values["arms"] = listed(values.get("arms", {}), "arms", Arm, dict)
        values["success"] = listed(values.get("success", []), "success", Success, list)
        study = build(values, Study)
        check_name(path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return path.stem, study


REFERENCE = re.compile(r"\{([^{}]+)\}")


def named(overrides: Mapping) -> set[str]:
    """The arms whose runs are named in the text of some field."""
    values = flatten(overrides).values()
    return {name for value in values if isinstance(value, str) for name in REFERENCE.findall(value)}


def folder_of(arm: str, seed: int) -> str:
    """The name of a run within the folder of the trainings."""
    return f"{arm}-seed{seed}"


def flags_of(study: Study, arm: Arm, seed: int, trainings: Path) -> list[str]:
    """The flags of `looped train` for one arm and seed. trainings: the folder of the runs of all arms."""

    def placed(value):
        if not isinstance(value, str):
            return value
        return REFERENCE.sub(lambda found: str(trainings / folder_of(found[1], seed)), value)

    values = {} if arm.data is None else {"data": arm.data}
    values |= {name: placed(value) for name, value in flatten(arm.overrides).items()}
    values |= dict.fromkeys(study.seed_fields, seed)
    return [f"--{name}={json.dumps(value)}" for name, value in values.items()]


def digests_of(study: Study) -> dict[str, str]:
    """Name of every arm -> its digest. A recipe of several arms is read once."""
    recipes = {name: read_recipe_file(name, TRAIN)[1] for name in {what.recipe for what in study.arms.values()}}
    digests = {}
    for name, what in study.arms.items():
        digests[name] = digest_of(
            study, what, recipes[what.recipe], [digests[arm] for arm in sorted(named(what.overrides))]
        )
    return digests


def digest_of(study: Study, arm: Arm, recipe: Mapping, before: Sequence[str]) -> str:
    """What the rows of an arm depend on, as it is written: recipe, overrides, seeds' fields, evaluation.

    Args:
        recipe: the fields of the file `arm.recipe`.
        before: digests of the arms whose runs it uses.
    """
    said = [recipe, arm.overrides, study.seed_fields, study.evaluate | arm.evaluate, study.record, study.keep]
    said += [] if arm.data is None else [arm.data]
    said += [] if study.measure == "eval" else [study.measure]
    said += [list(before)] if before else []
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def matches(row: Mapping, where: Mapping) -> bool:
    """Whether a row has these values, or one of a list of values."""
    return all(row.get(name) in (value if isinstance(value, list) else [value]) for name, value in where.items())
