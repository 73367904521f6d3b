"""Rows of tokens packed into sequences of one length, so that none is padded to the longest; none sees another.

transformers' masks let a row attend to itself only: they see where it begins by the position 0. This holds under sdpa,
eager, flex and flash attention, without a KV cache (`use_cache=False`).
"""

from collections.abc import Sequence

import numpy as np
import torch

IGNORED = -100  # the label that torch's cross-entropy leaves out


def pack(rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows, (tokens, labels) (T,) each, packed into as few sequences of `length` tokens as first fit finds.

    Returns {"input_ids", "position_ids", "shift_labels": (r, length) long}; padding has the token `pad` and no label.
    """
    places = first_fit([len(tokens) for tokens, _ in rows], length)
    shape = 1 + max(number for number, _ in places), length
    input_ids, shift_labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    begins = np.zeros(shape, dtype=np.int64)  # for each token, where its row begins
    # From left to right: a row that is placed later overwrites the begin of the padding behind the one before.
    for (number, start), (tokens, labels) in sorted(zip(places, rows, strict=True), key=lambda placed: placed[0]):
        stop = start + len(tokens)
        input_ids[number, start:stop], shift_labels[number, start:stop] = tokens, labels
        begins[number, start:stop], begins[number, stop:] = start, stop
    packed = {"input_ids": input_ids, "position_ids": np.arange(length) - begins, "shift_labels": shift_labels}
    return {name: torch.from_numpy(values) for name, values in packed.items()}


def first_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """(sequence, start) of each row: the longest first, each in the first sequence with room (Johnson 1973).

    lengths: tokens of each row. capacity: tokens of a sequence.
    """
    leaves = 1 << (len(lengths) - 1).bit_length()
    # A tree over sequences: node i has the children 2 i and 2 i + 1, and the most room below it.
    room, places = [capacity] * (2 * leaves), [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[i] else 2 * node + 1
        places[i] = node - leaves, capacity - room[node]
        room[node] -= lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return places
