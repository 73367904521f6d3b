"""Mano: arithmetic modulo 23 in prefix notation (Allen-Zhu 2025, Physics of Language Models 4.1;
Ouro, arXiv 2510.25741).

+ * 3 9 - 1 20 =  ->  8       (3 * 9) + (1 - 20) = 27 - 19 = 8

grade     how many operators; each number of them is equally likely before an operator's second operand
answer    one number, from 0 to modulus - 1
"""

from dataclasses import dataclass

import numpy as np

from ..fields import number
from .graded import GradedConfig, GradedGenerator

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclass
class ManoConfig(GradedConfig):
    """The modulus, and sizes of the splits."""

    modulus: int = number(23, at_least=2, whole=True)


class Mano(GradedGenerator):
    """Expressions of sums, differences and products modulo 23, to be worked out in one go.

    Configs: `cpu` (trained to 6 operators, tested to 16) and `paper` (to 24, as in Ouro, and 32). One example:

    >>> load_task("mano", "cpu", train_per_grade=1)["test"][200]
    {'prompt': '* 16 * 7 8 =', 'answer': '22', 'grade': 2, 'kind': ''}
    """

    TOKENIZER = "words"
    BUILDER_CONFIG_CLASS = ManoConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        ManoConfig(
            name="cpu",
            description="1 to 6 operators in training, to 16 in the test.",
            train_grade=6,
            far_grades=[7, 8, 10, 12, 16],
        ),
        ManoConfig(
            name="paper",
            description="1 to 24 operators in training, to 32 in the test (arXiv 2510.25741).",
            train_grade=24,
            far_grades=[28, 32],
            train_per_grade=50_000,
        ),
    ]

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        draws = iter(random.random(3 * grade + 1).tolist())
        names, modulus = list(OPERATORS), self.config.modulus

        def expression(operators: int) -> tuple[str, int]:
            """Text and value of an expression of so many operators."""
            if operators == 0:
                value = int(next(draws) * modulus)
                return str(value), value
            name = names[int(next(draws) * len(names))]
            before = int(next(draws) * operators)
            first, a = expression(before)
            second, b = expression(operators - 1 - before)
            return f"{name} {first} {second}", OPERATORS[name](a, b) % modulus

        text, value = expression(grade)
        return f"{text} =", str(value)
