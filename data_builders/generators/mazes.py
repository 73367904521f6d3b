"""Mazes without a circle: the one way from the start to the goal.

    prompt    the cells row by row: r where a way leads to the right, d where one leads down, rd, or a dot. The start
              begins with *, the goal ends in *. Ways to the left and up are those of the cells there
    answer    read in place, a word at every cell: the step that the way takes there (u up, d down, l left, r right), *
              at the goal, a dot off the way
    grade     cells of a row, and of a column

The walls are drawn by a depth-first walk that never enters a cell twice. Schwarzschild et al. 2021, arXiv 2106.04537,
and Bansal et al. 2022, arXiv 2202.05826, train recurrent networks on such mazes as pictures and test them on
larger ones.
"""

import numpy as np

from .graded import GradedConfig, GradedGenerator

STEPS = {"u": (-1, 0), "d": (1, 0), "l": (0, -1), "r": (0, 1)}
BACK = {"u": "d", "d": "u", "l": "r", "r": "l"}
END, OFF = "*", "."


class Mazes(GradedGenerator):
    """Square mazes with one way from a random start to a random goal: answers are read in place.

    Configs: `cpu` (sides of 2 to 6 cells in training, to 16 in the test) and `paper` (2 to 9, and to 59). One example:

    >>> load_task("mazes", "cpu", train_per_grade=1)["test"][200]
    {'prompt': '*r rd d d* . d r r .', 'answer': 'r r d * . d u l l', 'grade': 3, 'kind': ''}
    """

    TOKENIZER, ANSWERS, EASIEST = "words", "in_place", 2
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        GradedConfig(
            name="cpu",
            description="2 x 2 to 6 x 6 cells in training, to 16 x 16 in the test.",
            train_grade=6,
            far_grades=[8, 10, 12, 16],
        ),
        GradedConfig(
            name="paper",
            description="2 x 2 to 9 x 9 cells in training, to 59 x 59 in the test (arXiv 2202.05826).",
            train_grade=9,
            far_grades=[13, 19, 31, 59],
            train_per_grade=10_000,
        ),
    ]

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        cells = grade**2
        start, goal = random.choice(cells, size=2, replace=False).tolist()
        draws = iter(random.random(cells).tolist())
        neighbours = {
            cell: {
                name: cell + down * grade + right
                for name, (down, right) in STEPS.items()
                if 0 <= cell // grade + down < grade and 0 <= cell % grade + right < grade
            }
            for cell in range(cells)
        }
        ways, entered = {goal: ""}, {goal: ""}  # cell -> ways out of it; cell -> the way back to the goal
        walk = [goal]
        while walk:
            here = walk[-1]
            new = [name for name, cell in neighbours[here].items() if cell not in ways]
            if not new:
                walk.pop()
                continue
            name = new[int(next(draws) * len(new))]
            cell = neighbours[here][name]
            ways[here] += name
            ways[cell] = entered[cell] = BACK[name]
            walk.append(cell)
        steps, here = {goal: END}, start
        while here != goal:
            steps[here] = entered[here]
            here = neighbours[here][entered[here]]
        words = [
            END * (cell == start)
            + ("".join(name for name in "rd" if name in ways[cell]) or OFF)
            + END * (cell == goal)
            for cell in range(cells)
        ]
        return " ".join(words), " ".join(steps.get(cell, OFF) for cell in range(cells))
