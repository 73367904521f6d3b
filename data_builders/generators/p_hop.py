"""p-hop induction (Sanford et al. 2024, arXiv 2402.09268; Saunshi et al. 2025, arXiv 2502.17416).

A hop goes from a letter to where the same letter stood last before, and one place on:

    + + - c d a c b d a =  ->  d      two hops, of at most three: the last a; after the a before it, c; after the c
                                      before that, d

    length    the same for every p: marks for the largest p, then `length` letters. p is hidden from the length
    letters   no letter stands twice in a row, where a hop would stay in its place. Of these texts, each that p hops do
              not leave is equally likely
    answer    the letter where p hops end
    grade     p
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from ..fields import number
from .graded import GradedConfig, GradedGenerator

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HOP, NO_HOP = "+", "-"


@dataclass
class PHopConfig(GradedConfig):
    """Sizes of the text and of the splits."""

    length: int = number(64, at_least=3, whole=True)  # letters
    num_letters: int = number(4, at_least=3, at_most=len(LETTERS), whole=True)  # different letters


class PHop(GradedGenerator):
    """Hops through a text by its repeated letters, whose number is told by marks and not by the length.

    Configs: `cpu` (64 letters, p to 8 in training and to 32 in the test) and `paper` (256 letters, p to 32 and to 64;
    the papers train and test on one p). One example:

    >>> load_task("p_hop", "cpu", train_per_grade=1)["test"][200]
    {'prompt': '+ + - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - d a d a c d c a c b a b c d c b d a b c
    a b d a b a d a c d a c a b a b d c d c b d a b c a c d c d a b c a c b c a d b d c a c =', 'answer': 'd', 'grade':
    2, 'kind': ''}
    """

    TOKENIZER = "words"
    BUILDER_CONFIG_CLASS = PHopConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        PHopConfig(
            name="cpu",
            description="64 letters of 4 kinds, 1 to 8 hops in training, to 32 in the test.",
            train_grade=8,
            far_grades=[10, 12, 16, 20, 24, 32],
        ),
        PHopConfig(
            name="paper",
            description="256 letters of 4 kinds, 1 to 32 hops in training, to 64 in the test.",
            length=256,
            train_grade=32,
            far_grades=[40, 48, 64],
            train_per_grade=50_000,
        ),
    ]

    def check(self) -> None:
        super().check()
        most = self.config.length - 2
        if self.config.hardest > most:
            raise ValueError(
                f"train_grade and far_grades must be at most {most}, the hops that {most + 2} letters have."
            )

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        length, kinds = self.config.length, self.config.num_letters
        draws = iter(random.random(grade + length).tolist())

        def other(*taken: int) -> int:
            """A letter that is none of `taken`."""
            rest = [letter for letter in range(kinds) if letter not in taken]
            return rest[int(next(draws) * len(rest))]

        letters = [int(next(draws) * kinds)]  # from the last one on
        here, before = letters[0], None  # the letter that hops, and what the hop before says of its left neighbour
        room = length - 2
        for hops in range(grade, 0, -1):
            jump = self.jump(next(draws), hops, room)
            room -= jump
            for step in range(jump):
                # The place left of where the last hop ended holds the letter that hopped there.
                letters.append(before if step == 0 and before is not None else other(here, letters[-1]))
            here, before = letters[-1], here
        if before is not None:
            letters.append(before)
        while len(letters) < length:
            letters.append(other(letters[-1]))
        marks = HOP * grade + NO_HOP * (self.config.hardest - grade)
        text = "".join(LETTERS[letter] for letter in reversed(letters))
        return f"{' '.join(marks + text)} =", LETTERS[here]

    def jump(self, draw: float, hops: int, room: int) -> int:
        """How far the first of `hops` hops goes, from a number in [0, 1), if they go at most `room` places in all."""
        texts = self.texts
        draw *= texts[hops][room]
        jump = 1
        while jump < room - hops + 1:
            draw -= self.ratio ** (jump - 1) * texts[hops - 1][room - jump]
            if draw < 0:
                break
            jump += 1
        return jump

    @property
    def ratio(self) -> float:
        """How many fewer letters may stand at a place that a hop passes over than elsewhere."""
        return (self.config.num_letters - 2) / (self.config.num_letters - 1)

    @cached_property
    def texts(self) -> list[list[float]]:
        """[hops][room]: share of the texts in which the hops go at most `room` places, up to a factor of the hops."""
        rooms = self.config.length - 1
        found = [[1.0] * rooms]
        for _ in range(self.config.hardest):
            # A jump of 1 leaves found[-1][room - 1]; a longer one passes over a place, and then is a shorter one.
            sums = [0.0, *accumulate(found[-1], lambda total, ways: self.ratio * total + ways)]
            found.append(sums[:rooms])
        return found
