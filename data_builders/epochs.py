"""Row numbers of epoch after epoch, each epoch in a new random order, as a pure function of seed and position; and
groups of rows, of which every batch has one."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .depth import UPDATES_AT_ONCE
from .seeding import stream


class ShuffledEpochs:
    """The endless sequence of shuffled epochs of `num_rows` rows: each epoch has each row once.

    batch_size: rows that are usually asked for at once. purpose, key: name of the random stream, see `seeding.stream`.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, purpose: str, *key: int):
        self.num_rows, self.seed, self.purpose, self.key = num_rows, seed, purpose, key
        # Short epochs are shuffled several at a time: a batch needs two shuffles at most, and rarely a new one.
        self._epochs = -(-8 * batch_size // num_rows)
        self._orders = {}

    def between(self, start: int, count: int) -> torch.Tensor:
        """Row numbers (count,) at positions start .. start + count of the sequence."""
        block, offset = divmod(start, self._epochs * self.num_rows)
        order = self._order(block)[offset : offset + count]
        if len(order) < count:
            order = torch.cat([order, self._order(block + 1)[: count - len(order)]])
        return order

    def _order(self, block: int) -> torch.Tensor:
        """Row numbers (epochs * N,) of one shuffle, epoch after epoch. The last two shuffles are kept."""
        if block not in self._orders:
            rows = np.tile(np.arange(self.num_rows), (self._epochs, 1))
            shuffled = stream(self.seed, self.purpose, *self.key, block).permuted(rows, axis=1)
            if len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            self._orders[block] = torch.from_numpy(shuffled.ravel())
        return self._orders[block]


class WindowedEpochs:
    """As `ShuffledEpochs`, in memory that does not grow with the rows, and near each other on the disk.

    An epoch takes windows of `window` neighbouring rows in random order, and the rows of each in random order.
    """

    def __init__(self, num_rows: int, seed: int, purpose: str, window: int = 2**18):
        self.num_rows, self.seed, self.purpose, self.window = num_rows, seed, purpose, window
        self._kept: dict[tuple[int, ...], np.ndarray] = {}  # the orders that were used last

    def between(self, start: int, count: int) -> torch.Tensor:
        """Row numbers (count,) at positions start .. start + count of the sequence."""
        found = []
        while count > 0:
            epoch, place = divmod(start, self.num_rows)
            windows = self._order(-(-self.num_rows // self.window), epoch)
            sizes = np.minimum(self.window, self.num_rows - windows * self.window)
            ends = np.cumsum(sizes)
            index = int(np.searchsorted(ends, place, side="right"))
            rows = self._order(int(sizes[index]), epoch, int(windows[index]))
            chosen = rows[place - int(ends[index]) + len(rows) :][:count]
            found.append(chosen + windows[index] * self.window)
            start, count = start + len(chosen), count - len(chosen)
        return torch.from_numpy(np.concatenate(found))

    def _order(self, number: int, *key: int) -> np.ndarray:
        """The numbers 0 .. `number` in the random order of an epoch, or of one of its windows."""
        if key not in self._kept:
            if len(self._kept) > 3:  # of two epochs, each with a window in use
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = stream(self.seed, self.purpose, *key).permutation(number)
        return self._kept[key]


class GroupedEpochs:
    """Batches of one group of rows each; within a group the rows come in shuffled epochs.

    num_rows: group -> number of its rows. weights: of the groups, which are drawn in proportion. groups, rows: names
    of the random streams, see `seeding.stream`.
    """

    def __init__(
        self,
        num_rows: Mapping[int, int],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        *,
        groups: str,
        rows: str,
    ):
        self.names, self.batch_size, self.seed, self.purpose = list(num_rows), batch_size, seed, groups
        self._weights = np.array(weights) / np.sum(weights)
        # How often each group was drawn before draw 0, 1 .., as far as known; and the draw in use.
        self._counts = [np.zeros(len(self.names), dtype=np.int64)]
        self._drawn = (-1, np.empty(0), np.empty(0))
        self._epochs = {name: ShuffledEpochs(n, batch_size, seed, rows, name) for name, n in num_rows.items()}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[int, torch.Tensor]:
        """The group of update `step`, and the row numbers (batch_size / world,) in it that are a rank's share."""
        group, earlier = self._group_of(step)
        share = self.batch_size // world
        return group, self._epochs[group].between(earlier * self.batch_size + rank * share, share)

    def _group_of(self, step: int) -> tuple[int, int]:
        """Group of update `step`, and how many earlier updates had the same group."""
        draw, offset = divmod(step, UPDATES_AT_ONCE)
        if self._drawn[0] != draw:
            while len(self._counts) <= draw:
                drawn = self._draw(len(self._counts) - 1)
                self._counts.append(self._counts[-1] + np.bincount(drawn, minlength=len(self.names)))
            drawn = self._draw(draw)
            earlier = np.empty(UPDATES_AT_ONCE, dtype=np.int64)
            for i, count in enumerate(self._counts[draw]):
                earlier[drawn == i] = count + np.arange((drawn == i).sum())
            self._drawn = draw, drawn, earlier
        _, drawn, earlier = self._drawn
        return self.names[drawn[offset]], int(earlier[offset])

    def _draw(self, draw: int) -> np.ndarray:
        """Indices into `names` (UPDATES_AT_ONCE,) of the updates that are drawn together."""
        return stream(self.seed, self.purpose, draw).choice(len(self.names), size=UPDATES_AT_ONCE, p=self._weights)


def check_share(batch_size: int, rank: int, world: int):
    """ValueError unless the rows of a batch divide among the ranks."""
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size must be a positive multiple of the {world} ranks, got {batch_size}.")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0 .. {world - 1}, got {rank}.")
