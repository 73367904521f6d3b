"""What the generators share: rows of one grade are drawn, distinct ones are dealt to the splits.

    row        what `row(random, grade)` makes of a random generator of its own, named by (seed, grade, index)
    grade      the distinct rows that indices 0, 1, .. give: first those of test, then validation, then train
    train      the grades from the easiest to train_grade; validation and test have them too, and those of far_grades

A grade with few rows gives validation and test at most an eighth each, and train the rest.
"""

import inspect
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import datasets
import numpy as np

from .. import sequences
from ..fields import check_fields, number, numbers
from ..seeding import source_hash, stream
from ..sequences import SequenceGenerator

VERSION = datasets.Version("1.0.0")

# Where a grade has few rows, validation and test get at most one in so many each; train gets three quarters.
HELD_OUT = 8
# So many draws in a row that give nothing new, and a grade counts as exhausted.
VAIN_DRAWS = 200


@dataclass
class GradedConfig(datasets.BuilderConfig):
    """Grades and rows of the splits; any field may be given to `load_task` by name."""

    version: datasets.Version = VERSION
    train_grade: int = number(10, at_least=0, whole=True)  # train holds the grades up to this one
    far_grades: list[int] = numbers([], at_least=0, whole=True, distinct=True)  # harder: in validation and test only
    train_per_grade: int = number(5_000, at_least=1, whole=True)
    validation_per_grade: int = number(100, at_least=1, whole=True)
    test_per_grade: int = number(200, at_least=1, whole=True)
    seed: int = number(0, at_least=0, whole=True)

    @property
    def hardest(self) -> int:
        """The largest grade of any row."""
        return max([self.train_grade, *self.far_grades])


class GradedGenerator(SequenceGenerator):
    """Base of the generators that draw one row at a time. A subclass has `row`, and presets `cpu` and `paper`.

    Attributes:
        EASIEST: the smallest grade.
    """

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = GradedConfig
    EASIEST: int = 1

    def __init__(self, *args, hash: str | None = None, **kwargs):
        made_by = __file__, sequences.__file__, inspect.getfile(type(self))
        super().__init__(*args, hash=hash or source_hash(*made_by), **kwargs)
        check_fields(self.config)
        self.check()
        self._dealt: dict[int, dict[str, list[dict]]] = {}

    @abstractmethod
    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        """Prompt and answer of a row of this grade, from `random` and the config alone."""

    def check(self) -> None:
        """Raise ValueError for fields that contradict each other."""
        config = self.config
        if config.train_grade < self.EASIEST:
            raise ValueError(f"train_grade must be at least {self.EASIEST}, the easiest, got {config.train_grade}.")
        for grade in config.far_grades:
            if grade <= config.train_grade:
                raise ValueError(
                    f"far_grades must be above train_grade {config.train_grade}, got {grade}: leave it out."
                )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        trained = list(range(self.EASIEST, self.config.train_grade + 1))
        held_out = trained + sorted(self.config.far_grades)
        grades = {"train": trained, "validation": held_out, "test": held_out}
        # `datasets` shares out the items of a list among processes and streaming workers.
        return [datasets.SplitGenerator(split, {"split": split, "grades": grades[split]}) for split in grades]

    def _generate_examples(self, split: str, grades: list[int]):
        for grade in grades:
            for i, row in enumerate(self.deal(grade)[split]):
                yield (grade, i), row

    def deal(self, grade: int) -> dict[str, list[dict]]:
        """Split -> its rows of a grade; no prompt comes twice. All splits are drawn together, for any of them."""
        if grade not in self._dealt:
            config, trained = self.config, grade <= self.config.train_grade
            sizes = {"test": config.test_per_grade, "validation": config.validation_per_grade}
            wanted = sum(sizes.values()) + (config.train_per_grade if trained else 0)
            rows = self.distinct(grade, wanted)
            cap = len(rows) // HELD_OUT if trained and len(rows) < wanted else wanted
            first, self._dealt[grade] = 0, {}
            for split, size in sizes.items():
                last = first + min(size, cap)
                self._dealt[grade][split], first = rows[first:last], last
            self._dealt[grade]["train"] = rows[first:] if trained else []
        return self._dealt[grade]

    def distinct(self, grade: int, wanted: int) -> list[dict]:
        """The first `wanted` rows of a grade with different prompts, or as many as there are."""
        rows, vain, easier = {}, 0, self.easier(grade)
        for row in self.draw(grade):
            if row["prompt"] in rows or row["prompt"] in easier:
                vain += 1
                if vain == VAIN_DRAWS:
                    break
            else:
                rows[row["prompt"]], vain = row | {"grade": grade, "kind": ""}, 0
                if len(rows) == wanted:
                    break
        return list(rows.values())

    def easier(self, grade: int) -> set[str]:
        """Prompts of easier grades that this one may have, too."""
        return set()

    def draw(self, grade: int) -> Iterator[dict]:
        """Rows of a grade, one after the other, without end; some may be equal."""
        for index in count():
            prompt, answer = self.row(stream(self.config.seed, f"{self.name} rows", grade, index), grade)
            yield {"prompt": prompt, "answer": answer}
