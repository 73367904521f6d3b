"""Sudoku of 4 x 4, 6 x 6 or 9 x 9 cells, each with one solution.

    prompt    the cells row by row, a dot for an empty one
    answer    the solved grid, read in place: a digit at every cell
    grade     how many cells are empty

A solved grid is filled at random. Then cells are emptied in a random order, each if the puzzle keeps one solution.
Looped transformers on Sudoku: HRM (arXiv 2506.21734), TRM (arXiv 2510.04871), with 9 x 9 cells.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .graded import GradedConfig, GradedGenerator

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # side -> rows and columns of a box
MOST_EMPTY = {4: 11, 6: 24, 9: 54}  # beyond, hardly a grid has a puzzle
EMPTY = "."


@dataclass
class SudokuConfig(GradedConfig):
    """Sizes of the grid and of the splits."""

    side: Literal[4, 6, 9] = 4  # cells of a row


class Sudoku(GradedGenerator):
    """Grids to be filled, so that each row, column and box has every digit once: answers are read in place.

    Configs: `cpu` (4 x 4 cells, trained to 6 empty ones, tested to 10), `six` (6 x 6, to 14 and 22) and `paper`
    (9 x 9, to 45 and 54). The 288 solved grids of 4 x 4 cells are in every split; no puzzle is in two.
    One example:

    >>> load_task("sudoku", "cpu", train_per_grade=1)["test"][1000]
    {'prompt': '. . 1 3 1 3 . 4 2 4 3 . 3 . . 2', 'answer': '4 2 1 3 1 3 2 4 2 4 3 1 3 1 4 2', 'grade': 6, 'kind': ''}
    """

    TOKENIZER, ANSWERS = "words", "in_place"
    BUILDER_CONFIG_CLASS = SudokuConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        SudokuConfig(
            name="cpu",
            description="4 x 4 cells, 1 to 6 empty ones in training, to 10 in the test.",
            train_grade=6,
            far_grades=[7, 8, 9, 10],
            train_per_grade=3_000,
        ),
        SudokuConfig(
            name="six",
            description="6 x 6 cells, 1 to 14 empty ones in training, to 22 in the test.",
            side=6,
            train_grade=14,
            far_grades=[16, 18, 20, 22],
            train_per_grade=3_000,
        ),
        SudokuConfig(
            name="paper",
            description="9 x 9 cells, 1 to 45 empty ones in training, to 54 in the test.",
            side=9,
            train_grade=45,
            far_grades=[48, 51, 54],
        ),
    ]

    def check(self) -> None:
        super().check()
        side, most = self.config.side, MOST_EMPTY[self.config.side]
        if self.config.hardest > most:
            raise ValueError(f"train_grade and far_grades must be at most {most}, empty cells of {side} x {side}.")

    def row(self, random: np.random.Generator, grade: int) -> tuple[str, str]:
        cells = self.config.side**2
        while True:
            # A fresh random order of the digits at each cell.
            bits = (1 << random.permuted(np.tile(np.arange(self.config.side), (cells, 1)), axis=1)).tolist()
            solved = self.solve([0] * cells, bits)
            puzzle, empty = list(solved), 0
            for cell in random.permutation(cells).tolist():
                if empty == grade:
                    break
                digit, puzzle[cell] = puzzle[cell], 0
                # One solution is left if there is none with another digit in this cell.
                if self.solve(puzzle, bits, cell, digit) is None:
                    empty += 1
                else:
                    puzzle[cell] = digit
            if empty == grade:
                return spelt(puzzle), spelt(solved)

    def solve(
        self, puzzle: list[int], order: list[list[int]], without: int | None = None, digit: int = 0
    ) -> list[int] | None:
        """A solution of a puzzle, None if there is none. A cell is 0, or the bit 1 << (digit - 1) of its digit.

        order: for each cell, the bits in the order to be tried. without, digit: a cell, and a bit that it must not be.
        """
        every, groups = (1 << self.config.side) - 1, self.groups
        seen = [0] * (3 * self.config.side)  # the bits in each row, column and box
        for (row, column, box), bit in zip(groups, puzzle, strict=True):
            seen[row] |= bit
            seen[column] |= bit
            seen[box] |= bit
        solved = list(puzzle)
        empty = [cell for cell, bit in enumerate(puzzle) if not bit]

        def fill() -> bool:
            fewest, best, free = 99, -1, 0
            for cell in empty:
                if not solved[cell]:
                    row, column, box = groups[cell]
                    left = every & ~(seen[row] | seen[column] | seen[box])
                    if cell == without:
                        left &= ~digit
                    if left.bit_count() < fewest:
                        fewest, best, free = left.bit_count(), cell, left
                        if fewest < 2:
                            break
            if best < 0:
                return True
            row, column, box = groups[best]
            for bit in order[best]:
                if free & bit:
                    solved[best] = bit
                    seen[row] |= bit
                    seen[column] |= bit
                    seen[box] |= bit
                    if fill():
                        return True
                    seen[row] ^= bit
                    seen[column] ^= bit
                    seen[box] ^= bit
            solved[best] = 0
            return False

        return solved if fill() else None

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """The row, the column and the box of each cell, in one numbering."""
        side = self.config.side
        height, width = BOXES[side]
        return [
            (row, side + column, 2 * side + row // height * height + column // width)
            for row in range(side)
            for column in range(side)
        ]


def spelt(grid: list[int]) -> str:
    """Cells as words: a digit from 1 for a bit, a dot for an empty cell."""
    return " ".join(str(bit.bit_length()) if bit else EMPTY for bit in grid)
