"""The word problem of S5: what do permutations make, one after the other?

    21345 23451 =  ->  32451      1 goes to 2, and 2 to 3; 2 goes to 1, and 1 to 2; ..

    word      a permutation: its i-th digit is where i goes
    answer    the permutation that all words make, the first one first
    grade     how many words

The word problem of S5 is complete for NC1: no stack of layers of one depth solves it at every length, a depth that
grows with the logarithm of the length does (Merrill and Sabharwal 2025, arXiv 2503.03961).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np

from ..fields import number
from .graded import GradedConfig, GradedGenerator


@dataclass
class PermutationsConfig(GradedConfig):
    """The group, and sizes of the splits."""

    degree: int = number(5, at_least=2, at_most=6, whole=True)  # how many digits are permuted


class Permutations(GradedGenerator):
    """Products of permutations of five digits, each a word of its own.

    Configs: `cpu` (trained to 12 words, tested to 200) and `paper` (to 100 and 500). One example:

    >>> load_task("permutations", "cpu", train_per_grade=1)["test"][20]
    {'prompt': '12543 53142 =', 'answer': '53241', 'grade': 2, 'kind': ''}
    """

    TOKENIZER = "words"
    BUILDER_CONFIG_CLASS = PermutationsConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        PermutationsConfig(
            name="cpu",
            description="1 to 12 permutations in training, to 200 in the test.",
            train_grade=12,
            far_grades=[16, 24, 32, 48, 64, 100, 200],
        ),
        PermutationsConfig(
            name="paper",
            description="1 to 100 permutations in training, to 500 in the test.",
            train_grade=100,
            far_grades=[128, 192, 256, 384, 500],
        ),
    ]

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        words = random.integers(len(self.elements), size=grade).tolist()
        made = list(range(self.config.degree))
        for word in words:
            element = self.elements[word]
            made = [element[place] for place in made]
        return f"{' '.join(self.words[word] for word in words)} =", spelt(made)

    @cached_property
    def elements(self) -> list[tuple[int, ...]]:
        """The permutations of 0, 1, .., in the order of their words."""
        return list(permutations(range(self.config.degree)))

    @cached_property
    def words(self) -> list[str]:
        return [spelt(element) for element in self.elements]


def spelt(element) -> str:
    """The word of a permutation of 0, 1, ..: its digits count from 1."""
    return "".join(str(place + 1) for place in element)
