"""Every data set of the package reasoning-gym, by its name (Stojanovski et al. 2025, arXiv 2505.24760).

    name      load_task("reasoning_gym", "cpu", dataset="chain_sum"); in a recipe `generator: reasoning_gym/chain_sum`
    grade     level of the data set's curriculum: all its attributes at this level, or at their last where they have
              fewer; 0 alone where it has no curriculum
    answer    the entry's own, or the example in its metadata; an entry whose answer its verifier rejects is left out
    entry     a column of its own: the metadata of the entry as a Python literal, which the verifier asks for

A question that an easier grade has is left out of the harder ones, which may draw it again.
"""

import json
import re
from ast import literal_eval
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from itertools import count

import datasets
import numpy as np

from ..fields import number, numbers
from ..seeding import stream
from ..sequences import FEATURES, Verifier
from .graded import GradedConfig, GradedGenerator

# Data sets are made so many entries at a time: some draw all of them at the start.
ENTRIES = 100
# Where the metadata has an answer that the entry has not.
EXAMPLES = ("example_correct_answer", "possible_answer", "example_answer")
# Data sets of other data sets.
COMPOSED = {"composite"}

# Their verifiers run an answer as Python, and as an expression of sympy.
PYTHON = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
SYMPY = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
FUNCTIONS = {"exp", "log", "ln", "sqrt", "pi", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"}


@dataclass
class ReasoningGymConfig(GradedConfig):
    """The data set, and sizes of the splits. Without grades, train has the easier half of its levels, test all."""

    dataset: str = ""
    options: dict = field(default_factory=dict)  # fields of the data set's own configuration, above its curriculum
    train_grade: int | None = number(None, at_least=0, whole=True)
    far_grades: list[int] | None = numbers(None, at_least=0, whole=True, distinct=True)
    train_per_grade: int = number(1_000, at_least=1, whole=True)


class ReasoningGym(GradedGenerator):
    """Questions of a data set of reasoning-gym, each with an answer that the package's verifier accepts.

    Configs: `cpu` (1,000 training rows a grade) and `paper` (10,000). Needs the extra `gym`. One example:

    >>> load_task("reasoning_gym", "cpu", dataset="gcd", train_per_grade=1)["test"][0]
    {'prompt': 'Find the Greatest Common Divisor (GCD) of these numbers: 910, 623. Give only the GCD as your final
    answer.', 'answer': '7', 'grade': 0, 'kind': '', 'entry': "{'source_dataset': 'gcd', 'source_index': 0, 'numbers':
    [910, 623], 'result': 7, 'num_terms': 2, 'difficulty': {'num_terms': (2, 2), 'value': (100, 1000)}}"}

    Raises ValueError where the package is missing, for an unknown data set, for a grade that it lacks, and for one
    that has no answers to learn from.
    """

    PART, EASIEST = "dataset", 0
    BUILDER_CONFIG_CLASS = ReasoningGymConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        ReasoningGymConfig(
            name="cpu", description="1,000 training rows for each level of a data set of reasoning-gym."
        ),
        ReasoningGymConfig(
            name="paper",
            description="10,000 training rows for each level of a data set of reasoning-gym.",
            train_per_grade=10_000,
        ),
    ]

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features(FEATURES | {"entry": datasets.Value("string")})
        return datasets.DatasetInfo(features=features, description=self.config.description)

    def check(self) -> None:
        config, known = self.config, sorted(gym().DATASETS.keys() - COMPOSED)
        if config.dataset not in known:
            nearest = get_close_matches(config.dataset, known, n=1, cutoff=0)[0]
            given = f"got {config.dataset!r}. Did you mean {nearest!r}?"
            raise ValueError(f"dataset must be one of the {len(known)} data sets of reasoning-gym, {given}")
        last = len(self.levels) - 1
        if config.train_grade is None:
            config.train_grade = last // 2
        if config.far_grades is None:
            config.far_grades = list(range(config.train_grade + 1, last + 1))
        if config.hardest > last:
            raise ValueError(
                f"train_grade and far_grades must be at most {last} for {config.dataset}, got {config.hardest}."
            )
        super().check()
        if taken := sorted({"seed", "size"} & config.options.keys()):
            raise ValueError(f"options.{taken[0]} is what `seed` and the rows per grade say: leave it out.")
        try:
            self.entries(0, 0)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"options {config.options} do not fit {config.dataset}: {error}") from error

    @cached_property
    def levels(self) -> list[dict]:
        """The configuration of each level; levels that the package itself refuses are left out."""
        name, found = self.config.dataset, []
        if gym().has_curriculum(name):
            curriculum = gym().create_curriculum(name)
            attributes = curriculum.attributes.values()
            for level in range(max((len(attribute.levels) for attribute in attributes), default=1)):
                curriculum.set_global_level(level)
                configuration = vars(curriculum.generate_configuration())
                with suppress(AssertionError):
                    gym().create_dataset(name, **configuration | {"seed": 0, "size": 1})
                    found.append(configuration)
        return found or [{}]

    def entries(self, grade: int, chunk: int):
        """A data set of ENTRIES entries of the package: all chunks of a grade have different seeds."""
        name = self.config.dataset
        seed = int(stream(self.config.seed, f"reasoning_gym {name}", grade, chunk).integers(2**31))
        given = self.levels[grade] | self.config.options | {"seed": seed, "size": ENTRIES}
        return gym().create_dataset(name, **given)

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        raise NotImplementedError  # the package draws entries by numbers, see `draw`

    def draw(self, grade: int) -> Iterator[dict]:
        found = 0
        for chunk in count():
            entries = self.entries(grade, chunk)
            for i in range(ENTRIES):
                row = self.row_of(entries, i)
                if row is not None:
                    found += 1
                    yield row
            if not found:
                options = self.config.options
                given, other = (f" with options {options}", "set of options") if options else ("", "data set")
                raise ValueError(f"{self.config.dataset} has no answers to learn from{given}: take another {other}.")

    def row_of(self, entries, i: int) -> dict | None:
        """Entry i of a data set of the package as a row; None if the verifier rejects its answer, or there is none."""
        try:
            entry = entries[i]
        except Exception:  # the package draws some entries in vain, and says so by errors of many kinds
            return None
        row = {
            "prompt": entry["question"].strip(),
            "answer": answer_of(entry),
            "entry": repr(plain(entry["metadata"])),
        }
        return row if row["answer"] and worth(entries, row, row["answer"]) == 1 else None

    def easier(self, grade: int) -> set[str]:
        """Prompts of the grades below, whatever their split."""
        rows = (row for below in range(grade) for split in self.deal(below).values() for row in split)
        return {row["prompt"] for row in rows}

    def verifier(self) -> Verifier:
        return GymVerifier(self)


class GymVerifier(Verifier):
    """What the package's verifier says of an answer."""

    def __init__(self, builder: ReasoningGym):
        self.builder, self.entries = builder, {}

    def score(self, row: Mapping[str, object], text: str) -> float:
        grade, dataset = row["grade"], self.builder.config.dataset
        if grade not in self.entries:
            self.entries[grade] = self.builder.entries(grade, 0)
        return worth(self.entries[grade], row, text) if text == row["answer"] or harmless(dataset, text) else 0.0


def gym():
    """The module reasoning_gym.factory. Raises ValueError, with the extra to install, if there is none."""
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ValueError("this needs reasoning-gym: pip install 'looped-transformers[gym]'.") from error
    return factory


def answer_of(entry: dict) -> str:
    """The answer of an entry as text, "" if there is none."""
    given = [entry["answer"], *(entry["metadata"].get(name) for name in EXAMPLES)]
    answer = next((each for each in given if each is not None), "")
    return answer.strip() if isinstance(answer, str) else json.dumps(answer)


def plain(value):
    """Metadata of plain types, whose `repr` is a literal."""
    if isinstance(value, Mapping):
        return {plain(name): plain(each) for name, each in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(plain, value))
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def worth(entries, row: Mapping[str, object], text: str) -> float:
    """The worth in [0, 1] of an answer; 0 for one that the verifier cannot read."""
    try:
        entry = {"question": row["prompt"], "answer": row["answer"], "metadata": literal_eval(row["entry"])}
        return min(1.0, max(0.0, float(entries.score_answer(text, entry))))
    except Exception:  # verifiers read an answer in ways of their own, and fail in as many
        return 0.0


def harmless(dataset: str, text: str) -> bool:
    """Whether an answer may be given to a verifier that runs it: a literal of Python, or plain arithmetic."""
    if dataset in PYTHON:
        try:
            literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
    if dataset in SYMPY:
        names = set(re.findall(r"[^\W\d]\w+", text))
        # A power of a power, or one of three digits, may keep sympy busy for ever.
        towers = re.search(r"\*\*\s*\(?[^()]*\*\*|\*\*\s*\(?\s*-?\d{3}", text)
        return names <= FUNCTIONS and not towers and re.fullmatch(r"[\w\s+\-*/().]*", text) is not None
    return True
