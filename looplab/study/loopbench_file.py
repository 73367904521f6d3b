"""The file of a LoopBench, studies/benches/NAME.yaml: tasks x architectures, all with the budget of one recipe.

question: Which architecture learns which task?
recipe: loopbench
tasks:
  parity: {data: {task: sequence, generator: parity, overrides: {train_grade: 8}}}
architectures:
  plain: {}
  unrolled: {overrides: {model.num_core_layers: 4, model.num_loops: 1}, measure: {loops: [1], kept: []}}
rates:
  middle: {optim.lr: 3e-3}
  low: {optim.lr: 1e-3}
seeds: [10, 11, 12]
tuned_on: [100]
measure: {loops: [1, 2, 4, 8], kept: [50, 1000], limit: 50}

A pair of task and architecture is an arm, TASK.ARCHITECTURE, of a study on the seeds. Its learning rate is the best of
`rates` on the seeds `tuned_on`: each is an arm TASK.ARCHITECTURE.RATE of another study; one rate is taken untried.
Names that the file does not have are looked up, see `task_named` and `architecture_named`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

from huggingface_hub.dataclasses import strict

from data_builders.fields import MOST_LOOPS, check_fields, number, numbers
from looplab.runs.recipes import BENCH, TRAIN, read_recipe_file
from looplab.runs.sections import build, check_name, flatten
from looplab.shipped import find_bench, find_recipe

from .study_file import Arm, Study, Success, Table, digests_of, listed, matches

RIGHT = "right"  # the field of the rows that success and rates are judged by


@strict
@dataclass
class Measure:
    """How a cell is measured."""

    loops: list[int] = numbers(at_least=1, at_most=MOST_LOOPS, distinct=True)  # of all rows; the best is taken
    kept: list[int] = numbers(at_least=1, at_most=MOST_LOOPS, distinct=True)  # of the test rows of trained grades
    limit: int = number(50, at_least=1)  # most rows of a grade
    kept_limit: int = number(10, at_least=1)  # the same for `kept`
    halting_limit: int = number(8, at_least=1)  # the same for the halting rules


@strict
@dataclass
class Choice:
    """What a task, or an architecture, puts over the recipe."""

    data: dict | None = None  # of a task: in place of the recipe's section `data`
    overrides: dict = field(default_factory=dict)  # fields of the recipe, such as model.loop_connection
    measure: dict = field(default_factory=dict)  # fields of `measure`, over those of the file
    without: list[str] = field(default_factory=list)  # of a task: architectures that it cannot have


@strict
@dataclass
class Bench:
    """Fields of the file, see the module docstring."""

    question: str  # one sentence
    recipe: str  # of all cells: sizes, depth, budget
    tasks: dict[str, Choice]
    architectures: dict[str, Choice]
    rates: dict[str, dict]  # name -> fields of the recipe; of equally good ones the first is taken
    seeds: list[int] = numbers(at_least=0, distinct=True)  # that are reported
    tuned_on: list[int] = numbers(at_least=0, distinct=True)  # that the rates are chosen on
    measure: Measure = field(default_factory=Measure)
    success: list[Success] = field(default_factory=list)  # arms are TASK.ARCHITECTURE; of `right`

    def __post_init__(self):
        check_fields(self)
        for name in ("tasks", "architectures", "rates", "seeds", "tuned_on"):
            if not vars(self)[name]:
                raise ValueError(f"a bench has at least one of each: fill in `{name}`.")
        for name in (*self.tasks, *self.architectures, *self.rates):
            check_name(name)
        for part, place in (("tasks", self.tasks), ("architectures", self.architectures)):
            for name, choice in place.items():
                replace(self.measure, **choice.measure)
                for other in choice.without:
                    if part == "architectures" or other not in self.architectures:
                        raise ValueError(
                            f"{part}.{name}.without: a task names architectures of the file there, got {other!r}: one "
                            f"of {', '.join(self.architectures)}."
                        )
        arms = {
            arm_name(task, name): Arm(self.recipe)
            for task, choice in self.tasks.items()
            for name in self.architectures
            if name not in choice.without
        }
        study_of(self, arms, self.seeds, self.success)  # which refuses seeds and success that cannot be


def read_bench(name: str) -> tuple[str, Bench]:
    """(name, bench) of a file, or of a bench of this package.

    Raises:
        ValueError: what is wrong and where.
    """
    path, values = read_recipe_file(find_bench(name), BENCH)
    try:
        values = dict(values)
        for part in ("tasks", "architectures"):
            values[part] = listed(values.get(part, {}), part, Choice, dict)
        values["success"] = listed(values.get("success", []), "success", Success, list)
        bench = build(values, Bench)
        check_name(path.stem)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return path.stem, bench


def task_named(bench: Bench, name: str) -> Choice:
    """The task of this name in the file; or the generator NAME or NAME/PART; or the data and the curriculum of a
    recipe. Raises ValueError, with the names there are."""
    from data_builders.builders import GENERATORS, generator_of

    if name in bench.tasks:
        return bench.tasks[name]
    if name.partition("/")[0] in GENERATORS:
        generator_of(name)
        return Choice({"task": "sequence", "generator": name})
    recipe = recipe_named(name)
    if recipe is None or "data" not in recipe:
        raise ValueError(
            f"there is no task {name}: name one of {', '.join(bench.tasks)}; a generator, "
            f"{', '.join(GENERATORS)}/NAME; or a recipe."
        )
    return Choice(recipe["data"], {"curriculum": recipe.get("curriculum", {})})


def architecture_named(bench: Bench, name: str) -> Choice:
    """The architecture of this name in the file; or the loop connection of this name; or the section `model` of a
    recipe, over that of the bench. Raises ValueError, with the names there are."""
    from modeling_looped.connections_looped import CONNECTIONS

    if name in bench.architectures:
        return bench.architectures[name]
    if name in CONNECTIONS:
        return Choice(overrides={"model": {"loop_connection": name}})
    recipe = recipe_named(name)
    if recipe is None or not recipe.get("model"):
        raise ValueError(
            f"there is no architecture {name}: name one of {', '.join(bench.architectures)}; a loop connection, "
            f"{', '.join(CONNECTIONS)}; or a recipe."
        )
    return Choice(overrides={"model": recipe["model"]})


def recipe_named(name: str) -> dict | None:
    """The fields of a recipe; None if there is none of this name."""
    try:
        path = find_recipe(name)
    except ValueError:
        return None
    return read_recipe_file(path, TRAIN)[1] if Path(path).is_file() else None


@dataclass(frozen=True)
class Pair:
    """A task and an architecture, by the names that the user gave, and what they put over the recipe."""

    task: str
    architecture: str
    choices: tuple[Choice, Choice]

    @property
    def arm(self) -> str:
        """Its name as an arm, and in folders."""
        return arm_name(self.task, self.architecture)


def arm_name(task: str, architecture: str) -> str:
    """The arm of a pair. A name may be a path, or NAME/PART, and the arm is the name of a folder."""
    return ".".join(name.removesuffix(".yaml").strip("./").replace("/", "-") for name in (task, architecture))


def pairs_of(bench: Bench, tasks: Iterable[str], architectures: Iterable[str]) -> list[Pair]:
    """Every task with every architecture that it can have, task by task. Raises ValueError for a name that nobody
    knows."""
    known, pairs = {name: architecture_named(bench, name) for name in architectures}, []
    for task in tasks:
        choice = task_named(bench, task)
        pairs += [Pair(task, name, (choice, known[name])) for name in known if name not in choice.without]
    for pair in pairs:
        check_name(pair.arm)
    return pairs


def arm_of(bench: Bench, pair: Pair, rate: Mapping) -> Arm:
    """What is trained of a pair, with the overrides `rate`."""
    task, architecture = pair.choices
    measure = replace(bench.measure, **(task.measure | architecture.measure))
    overrides = flatten(task.overrides) | flatten(architecture.overrides) | flatten(rate)
    return Arm(bench.recipe, overrides, task.data, asdict(measure))


def study_of(bench: Bench, arms: dict[str, Arm], seeds: Sequence[int], success: Sequence[Success] = ()) -> Study:
    """The arms as a study that is reported. Raises ValueError for seeds that the rates are chosen on."""
    table = Table("task", RIGHT)
    return Study(bench.question, arms, list(seeds), bench.tuned_on, table=table, success=list(success))


def tuning(bench: Bench, pairs: Sequence[Pair]) -> Study:
    """Every pair at every rate, on the tuning seeds."""
    arms = {f"{pair.arm}.{name}": arm_of(bench, pair, rate) for pair in pairs for name, rate in bench.rates.items()}
    return Study(bench.question, arms, bench.tuned_on, table=Table("task", RIGHT))


def chosen_rates(bench: Bench, pairs: Sequence[Pair], rows: Sequence[Mapping]) -> dict[str, str]:
    """Arm -> the rate with most right answers, a mean over the tuning seeds; only arms that have rows."""
    if len(bench.rates) == 1:
        return dict.fromkeys((pair.arm for pair in pairs), next(iter(bench.rates)))
    digests, chosen = digests_of(tuning(bench, pairs)), {}
    for pair in pairs:
        found = {}
        for name in bench.rates:
            arm = f"{pair.arm}.{name}"
            mine = [row[RIGHT] for row in rows if matches(row, {"arm": arm, "recipe": digests[arm]})]
            if mine:
                found[name] = fmean(mine)
        if found:
            chosen[pair.arm] = max(found, key=found.__getitem__)
    return chosen


def reporting(bench: Bench, pairs: Sequence[Pair], seeds: Sequence[int], rows: Sequence[Mapping]) -> Study | None:
    """Every pair at its rate, on the seeds; None if no pair has a rate yet."""
    rates = chosen_rates(bench, pairs, rows)
    arms = {pair.arm: arm_of(bench, pair, bench.rates[rates[pair.arm]]) for pair in pairs if pair.arm in rates}
    success = [each for each in bench.success if {each.arm, each.over or each.arm} <= arms.keys()]
    return study_of(bench, arms, seeds, success) if arms else None
