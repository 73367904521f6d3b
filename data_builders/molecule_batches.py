"""Molecules packed into rows of one length: no padding to the longest, and none sees another.

    row        <bos> C C O  <bos> c 1 c c c c c 1  <bos> C N  <pad> <pad>
    predicts   C C O <eos>  c 1 c c c c c 1 <eos>  C N <eos>    -     -
    position   0 1 2 3      0 1 2 3 4 5 6 7 8      0 1 2        0     1

Positions that begin anew tell transformers' masks where a molecule begins, under sdpa, eager, flex and flash attention
alike, provided there is no KV cache (`use_cache=False`): each attends to itself. A packed row therefore gives the
logits of its molecules one by one.

Legend: N molecules, r rows, T tokens of a row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .depth import DepthSampler
from .epochs import ShuffledEpochs, check_share
from .molecules import augment
from .text_batches import TokenStream

IGNORED = -100  # the label that torch's cross-entropy leaves out


class PackedMolecules:
    """The molecules of a split, packed on demand: `rows(numbers)`.

    split: rows with the column text, `encode_text` of it is mapped into memory. sequence_length: T, at least the
    tokens of the longest molecule and one for `<eos>`.

    lengths (N,): tokens that each molecule predicts, its own and `<eos>`; num_tokens: their sum.
    Raises ValueError for an empty split, a molecule that is too long, and a tokenizer without `<bos>` or `<pad>`.
    """

    def __init__(self, split: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int):
        if tokenizer.bos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("packed molecules need a bos_token and a pad_token: use a smiles_tokenizer.")
        if not len(split):
            raise ValueError(f"the split {split.split} has no molecules: give it a larger share, or more files.")
        self._stream = TokenStream(split, tokenizer)
        self.lengths = np.diff(self._stream.starts)
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > sequence_length:
            raise ValueError(
                f"sequence_length must be at least {self.lengths[longest]}, the tokens of {split[longest]['text']!r} "
                f"and one for its end, got {sequence_length}."
            )
        self.sequence_length, self.num_tokens = sequence_length, len(self._stream)
        self._bos, self._pad = tokenizer.bos_token_id, tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mean_length(self) -> float:
        """Tokens that are predicted per molecule."""
        return self.num_tokens / len(self)

    def tokens(self, number: int) -> np.ndarray:
        """Tokens (L,) of a molecule, the last one `<eos>`."""
        return self._stream.between(*self._stream.starts[number : number + 2])

    def rows(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """The molecules `numbers` (N,) in as few rows as first fit finds:

        {"input_ids": (r, T) long, "position_ids": (r, T) long, "shift_labels": (r, T) long, -100 where nothing is}
        """
        return pack([self.tokens(number) for number in numbers.tolist()], self.sequence_length, self._bos, self._pad)


def pack(sequences: Sequence[np.ndarray], length: int, bos: int, pad: int) -> dict[str, torch.Tensor]:
    """Rows (r, `length`) of token sequences that end in `<eos>`, see the module docstring."""
    places = first_fit([len(tokens) for tokens in sequences], length)
    num_rows = 1 + max(row for row, _ in places)
    input_ids = np.full((num_rows, length), pad, dtype=np.int64)
    shift_labels = np.full((num_rows, length), IGNORED, dtype=np.int64)
    begins = np.zeros((num_rows, length), dtype=np.int64)  # of the molecule a token is in
    # From left to right: what lies behind the molecule placed last is padding.
    for (row, start), tokens in sorted(zip(places, sequences, strict=True), key=lambda placed: placed[0]):
        stop = start + len(tokens)
        input_ids[row, start] = bos
        input_ids[row, start + 1 : stop] = tokens[:-1]
        shift_labels[row, start:stop] = tokens
        begins[row, start:stop] = start
        begins[row, stop:] = stop
    rows = {"input_ids": input_ids, "position_ids": np.arange(length) - begins, "shift_labels": shift_labels}
    return {name: torch.from_numpy(values) for name, values in rows.items()}


def first_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """(row, start) of each sequence: the longest first, each in the first row that has room (Johnson 1973)."""
    places, filled = [(0, 0)] * len(lengths), np.zeros(len(lengths), dtype=np.int64)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = int((filled + lengths[i] <= capacity).argmax())
        places[i] = row, int(filled[row])
        filled[row] += lengths[i]
    return places


class MoleculeBatches(torch.utils.data.Dataset):
    """Batches of packed molecules and of one depth; item `step` is this rank's share of the step-th *global* batch:

        {"input_ids", "position_ids", "shift_labels": (r, T) long, "num_loops": int, "num_labels": int}

    `num_labels` counts the labels of the global batch: dividing by it weighs every token alike, however many a rank
    has. A pure function of (seed, step), as `HopBatches`; molecules come in shuffled epochs, each once per epoch.

    batch_size: molecules of the global batch. spellings: epoch e has spelling e mod `spellings` of each molecule, see
    `augment`, whose seed is `spelling_seed`; None leaves them as they are. Raises ValueError as `PackedMolecules` and
    `augment`, and for a batch size that does not divide.
    """

    def __init__(
        self,
        split: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        batch_size: int,
        seed: int,
        depth: DepthSampler,
        rank: int = 0,
        world: int = 1,
        spellings: int | None = None,
        spelling_seed: int = 0,
    ):
        check_share(batch_size, rank, world)
        self._split, self._tokenizer, self._sequence_length = split, tokenizer, sequence_length
        self.batch_size, self.depth, self.rank, self.world = batch_size, depth, rank, world
        self._spellings, self._spelling_seed, self._spelt = spellings, spelling_seed, {}
        self.num_molecules = len(split)
        self.num_tokens = self.molecules(0).num_tokens
        self._epochs = ShuffledEpochs(len(split), batch_size, seed, "molecules of epochs")

    def molecules(self, epoch: int) -> PackedMolecules:
        """The molecules as an epoch spells them. The last two are kept: a batch may lie in both."""
        spelling = epoch % (self._spellings or 1)
        if spelling not in self._spelt:
            split = self._split if self._spellings is None else augment(self._split, self._spelling_seed, spelling)
            if len(self._spelt) > 1:
                self._spelt.pop(next(iter(self._spelt)))
            self._spelt[spelling] = PackedMolecules(split, self._tokenizer, self._sequence_length)
        return self._spelt[spelling]

    def __getitem__(self, step: int) -> dict:
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}.")
        first = step * self.batch_size
        numbers = self._epochs.between(first, self.batch_size).tolist()
        spelt = [self.molecules(at // self.num_molecules) for at in range(first, first + self.batch_size)]
        share = self.batch_size // self.world
        own = slice(self.rank * share, (self.rank + 1) * share)
        sequences = [molecules.tokens(i) for molecules, i in zip(spelt[own], numbers[own], strict=True)]
        rows = pack(sequences, self._sequence_length, self._tokenizer.bos_token_id, self._tokenizer.pad_token_id)
        num_labels = sum(int(molecules.lengths[i]) for molecules, i in zip(spelt, numbers, strict=True))
        return rows | {"num_loops": self.depth(step), "num_labels": num_labels}
