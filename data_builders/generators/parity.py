"""Parity: is the number of ones odd?

    1 0 1 1 =  ->  1

    grade     how many bits

Fan et al. 2024, arXiv 2409.15647, train looped transformers to 20 bits and test them beyond 50.
"""

import numpy as np

from .graded import GradedConfig, GradedGenerator


class Parity(GradedGenerator):
    """Whether the number of ones among the bits is odd.

    Configs: `cpu` (trained to 16 bits, tested to 128) and `paper` (to 20 and 100). One example:

    >>> load_task("parity", "cpu", train_per_grade=1)["test"][40]
    {'prompt': '0 1 1 0 0 1 0 0 =', 'answer': '1', 'grade': 8, 'kind': ''}
    """

    TOKENIZER = "words"
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        GradedConfig(
            name="cpu",
            description="1 to 16 bits in training, to 128 in the test.",
            train_grade=16,
            far_grades=[20, 24, 32, 48, 64, 96, 128],
        ),
        GradedConfig(
            name="paper",
            description="1 to 20 bits in training, to 100 in the test (arXiv 2409.15647).",
            train_grade=20,
            far_grades=[30, 40, 50, 60, 80, 100],
            train_per_grade=50_000,
        ),
    ]

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        bits = random.integers(2, size=grade)
        return f"{' '.join(map(str, bits.tolist()))} =", str(bits.sum() % 2)
