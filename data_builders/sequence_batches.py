"""Batches of questions with answers, see `sequence_rows.py`.

    packed       several rows share a sequence, and none sees another: they begin at position 0, as molecules do
    one_length   all rows of a batch read equally many tokens, so that nothing is padded or masked

Every draw is a pure function of (seed, step), so that a resumed training sees the same batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from .depth import DepthSampler
from .epochs import GroupedEpochs, ShuffledEpochs, check_share
from .packing import pack
from .sequence_rows import EncodedRows


class SequenceBatches(torch.utils.data.Dataset, ABC):
    """Batches of rows with one loop count; item `step` is this rank's share of the *global* batch `step`:

        {"input_ids", "shift_labels": (r, T) long, "num_loops": int, "num_labels": int, "grade": int}

    `num_labels` counts the labels of the global batch, and `grade` is its highest one. An item is a pure function of
    (seed, step): a resumed training sees the same batches, and `world` ranks together see the rows that one would.
    Rows come in shuffled epochs, each row once per epoch. There is no last item.

    Args:
        grades: train on rows of these grades alone; all unless given.
        learn_all: the next token of every token is a label, not those of the answer alone.
        at_least_grade: raise `num_loops` to the batch's grade where it is smaller.
        token_types: a batch also has `token_type_ids` (r, T), for a model whose prompts see themselves.

    Raises:
        ValueError: a batch size that does not divide, or grades without rows.
    """

    def __init__(
        self,
        rows: EncodedRows,
        batch_size: int,
        seed: int,
        depth: DepthSampler,
        *,
        grades: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
        learn_all: bool = False,
        at_least_grade: bool = False,
        token_types: bool = False,
    ):
        check_share(batch_size, rank, world)
        chosen = np.ones(len(rows), dtype=bool) if grades is None else np.isin(rows.grades, grades)
        if not chosen.any():
            raise ValueError(f"no row has one of the grades {list(grades or [])}.")
        self.rows, self.numbers = rows, np.flatnonzero(chosen)
        self.batch_size, self.seed, self.depth, self.rank, self.world = batch_size, seed, depth, rank, world
        self.learn_all, self.at_least_grade, self.token_types = learn_all, at_least_grade, token_types
        self.labels = rows.num_labels(learn_all)

    def __getitem__(self, step: int) -> dict:
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}.")
        chosen = self.chosen(step)
        share = self.batch_size // self.world
        own = chosen[self.rank * share : (self.rank + 1) * share]
        batch = self.together(own)
        if self.token_types:
            batch["token_type_ids"] = self.types(own)
        grade = int(self.rows.grades[chosen].max())
        num_loops = max(self.depth(step), grade if self.at_least_grade else 1)
        return batch | {"num_loops": num_loops, "num_labels": int(self.labels[chosen].sum()), "grade": grade}

    @abstractmethod
    def chosen(self, step: int) -> np.ndarray:
        """Numbers (batch_size,) in the split of the rows of the global batch `step`."""

    @abstractmethod
    def together(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        """The tensors of rows."""

    @abstractmethod
    def types(self, numbers: np.ndarray) -> torch.Tensor:
        """`token_type_ids` (r, T) of `together`."""


class PackedSequences(SequenceBatches):
    """Rows of all lengths, packed into sequences of `sequence_length` tokens; a batch also has `position_ids` (r, T).

    Raises ValueError as `SequenceBatches`, and for a row that is longer.
    """

    def __init__(self, rows: EncodedRows, sequence_length: int, *args, **settings):
        super().__init__(rows, *args, **settings)
        self.sequence_length = sequence_length
        longest = int(rows.lengths[self.numbers].max())
        if longest > sequence_length:
            raise ValueError(f"sequence_length must be at least {longest}, the longest row, got {sequence_length}.")
        self._epochs = ShuffledEpochs(len(self.numbers), self.batch_size, self.seed, "questions of epochs")

    def chosen(self, step):
        return self.numbers[self._epochs.between(step * self.batch_size, self.batch_size).numpy()]

    def together(self, numbers):
        return pack([self.rows.row(number, self.learn_all) for number in numbers], self.sequence_length)

    def types(self, numbers):
        each = [self.rows.types(number) for number in numbers]
        return pack([(types, types) for types in each], self.sequence_length, pad=1)["input_ids"]


class OneLength(SequenceBatches):
    """Rows of one length, which is drawn in proportion to the rows that have it."""

    def __init__(self, rows: EncodedRows, *args, **settings):
        super().__init__(rows, *args, **settings)
        lengths = rows.lengths[self.numbers]
        self._members = {int(length): self.numbers[lengths == length] for length in np.unique(lengths)}
        num_rows = {length: len(members) for length, members in self._members.items()}
        self._epochs = GroupedEpochs(
            num_rows, list(num_rows.values()), self.batch_size, self.seed,
            groups="lengths of steps", rows="questions of lengths",
        )  # fmt: skip

    def chosen(self, step):
        length, places = self._epochs.batch(step)
        return self._members[length][places.numpy()]

    def together(self, numbers):
        return self.rows.stacked(numbers, self.learn_all)

    def types(self, numbers):
        return torch.from_numpy(np.stack([self.rows.types(number) for number in numbers]))
