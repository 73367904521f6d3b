"""Reversed addition: "3 2 1 + 6 5 4 =" is 123 + 456, and "9 7 5" is 579. The digits of least weight come first.

    grade     digits of either number; the first of them is not 0, unless it is the only one
    answer    the digits of the sum, from the lowest on; there may be one more than the numbers have

Reversed digits: Lee et al. 2023, arXiv 2307.03381. Lengths beyond training: McLeish et al. 2024, arXiv 2405.17399,
who train to 20 digits and test to 100; Fan et al. 2024, arXiv 2409.15647, with looped transformers.
"""

import numpy as np

from .graded import GradedConfig, GradedGenerator


class Addition(GradedGenerator):
    """Sums of two numbers of equally many digits, written from the lowest digit on.

    Configs: `cpu` (trained to 10 digits, tested to 40) and `paper` (to 20 and 100). One example, 9160 + 6433 = 15593:

    >>> load_task("addition", "cpu", train_per_grade=1)["test"][457]
    {'prompt': '0 6 1 9 + 3 3 4 6 =', 'answer': '3 9 5 5 1', 'grade': 4, 'kind': ''}
    """

    TOKENIZER = "words"
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        GradedConfig(
            name="cpu",
            description="Numbers of 1 to 10 digits in training, to 40 in the test.",
            train_grade=10,
            far_grades=[12, 15, 20, 30, 40],
        ),
        GradedConfig(
            name="paper",
            description="Numbers of 1 to 20 digits in training, to 100 in the test (arXiv 2405.17399).",
            train_grade=20,
            far_grades=[25, 30, 40, 50, 60, 80, 100],
            train_per_grade=50_000,
        ),
    ]

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        digits = random.integers(10, size=(2, grade))
        if grade > 1:
            digits[:, 0] = random.integers(1, 10, size=2)
        first, second = ("".join(map(str, number)) for number in digits.tolist())
        total = str(int(first) + int(second))
        return f"{' '.join(first[::-1])} + {' '.join(second[::-1])} =", " ".join(total[::-1])
