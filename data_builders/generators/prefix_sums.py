"""Prefix sums: is the number of ones so far odd, at each bit?

    1 0 1 1  ->  1 1 0 1

    grade     how many bits
    answer    a bit for each bit of the prompt, in its place

Schwarzschild et al. 2021, arXiv 2106.04537, and Bansal et al. 2022, arXiv 2202.05826, train recurrent networks to 32
bits and test them to 512.
"""

import numpy as np

from .graded import GradedConfig, GradedGenerator


class PrefixSums(GradedGenerator):
    """The parity of the bits so far, at each of them: answers are read in place.

    Configs: `cpu` (trained to 16 bits, tested to 128) and `paper` (32 bits and fewer, tested to 512). One example:

    >>> load_task("prefix_sums", "cpu", train_per_grade=1)["test"][40]
    {'prompt': '1 0 0 0 1 0 1 1', 'answer': '1 1 1 1 0 0 1 0', 'grade': 8, 'kind': ''}
    """

    TOKENIZER, ANSWERS = "words", "in_place"
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        GradedConfig(
            name="cpu",
            description="1 to 16 bits in training, to 128 in the test.",
            train_grade=16,
            far_grades=[20, 24, 32, 48, 64, 96, 128],
        ),
        GradedConfig(
            name="paper",
            description="1 to 32 bits in training, to 512 in the test (arXiv 2202.05826).",
            train_grade=32,
            far_grades=[40, 48, 64, 128, 256, 512],
        ),
    ]

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        bits = random.integers(2, size=grade)
        return " ".join(map(str, bits.tolist())), " ".join(map(str, (bits.cumsum() % 2).tolist()))
