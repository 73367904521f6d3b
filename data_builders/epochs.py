"""Row numbers of epoch after epoch, each epoch in a new random order, as a pure function of seed and position."""

import numpy as np
import torch

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


def check_share(batch_size: int, rank: int, world: int):
    """ValueError unless the rows of a batch divide among the ranks."""
    if batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size must be a positive multiple of the {world} ranks, got {batch_size}.")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0 .. {world - 1}, got {rank}.")
