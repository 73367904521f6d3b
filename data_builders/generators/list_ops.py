"""ListOps: nested lists of digits with an operation each (Nangia and Bowman 2018, arXiv 1804.06028).

[MAX 2 9 [MIN 4 7 ] 0 ] =  ->  9

MAX MIN    the largest, the smallest
MED        the median; between two middle digits, their mean, rounded down
SM         the sum modulo 10
grade      how many lists are open at the innermost place
"""

import numpy as np

from .graded import GradedConfig, GradedGenerator

OPERATIONS = {
    "MAX": max,
    "MIN": min,
    "MED": lambda digits: (sorted(digits)[(len(digits) - 1) // 2] + sorted(digits)[len(digits) // 2]) // 2,
    "SM": lambda digits: sum(digits) % 10,
}
FEWEST, MOST = 2, 5  # entries of a list
NESTED = 0.1  # of the entries that need not be lists are


class ListOps(GradedGenerator):
    """Nested lists of 2 to 5 entries, each with an operation, to be worked out to one digit.

    Configs: `cpu` (trained to 4 lists deep, tested to 10) and `paper` (to 10 and 16; 1804.06028 has depths to 20, and
    no test beyond training). One example:

    >>> load_task("list_ops", "cpu", train_per_grade=1)["test"][200]
    {'prompt': '[MED 6 [SM 9 6 7 7 ] [MAX 5 8 ] ] =', 'answer': '8', 'grade': 2, 'kind': ''}
    """

    TOKENIZER = "words"
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        GradedConfig(
            name="cpu",
            description="1 to 4 lists deep in training, to 10 in the test.",
            train_grade=4,
            far_grades=[5, 6, 8, 10],
        ),
        GradedConfig(
            name="paper",
            description="1 to 10 lists deep in training, to 16 in the test.",
            train_grade=10,
            far_grades=[12, 14, 16],
            train_per_grade=9_000,
        ),
    ]

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        names = list(OPERATIONS)

        def entries(depth: int) -> tuple[str, int]:
            """Text and value of a list with so many lists in each other."""
            operation, most, deepest, *draws = random.random(3 + 3 * MOST).tolist()
            name, count = names[int(operation * len(names))], FEWEST + int(most * (MOST - FEWEST + 1))
            texts, values = [], []
            for place in range(count):
                nested, how_deep, digit = draws[3 * place : 3 * place + 3]
                if depth > 1 and place == int(deepest * count):
                    text, value = entries(depth - 1)
                elif depth > 1 and nested < NESTED:
                    text, value = entries(1 + int(how_deep * (depth - 1)))
                else:
                    value = int(digit * 10)
                    text = str(value)
                texts.append(text)
                values.append(value)
            return f"[{name} {' '.join(texts)} ]", OPERATIONS[name](values)

        text, value = entries(grade)
        return f"{text} =", str(value)
