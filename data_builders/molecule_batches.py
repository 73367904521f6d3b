"""Molecules packed into sequences of one length. No molecule is padded to the longest, and none sees another.

    sequence   <bos> C C O  <bos> c 1 c c c c c 1  <bos> C N  <pad> <pad>
    predicts   C C O <eos>  c 1 c c c c c 1 <eos>  C N <eos>    -     -
    position   0 1 2 3      0 1 2 3 4 5 6 7 8      0 1 2        0     1

transformers' masks let a molecule attend to itself only: they see where it begins by the position 0. This holds under
sdpa, eager, flex and flash attention, without a KV cache (`use_cache=False`). A packed molecule therefore has the same
logits as the molecule alone.

Legend: N molecules, r packed sequences, T tokens of a sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .depth import DepthSampler
from .epochs import ShuffledEpochs, check_share
from .molecules import augment
from .packing import pack
from .text_batches import TokenStream


class PackedMolecules:
    """The molecules of a split; `rows(numbers)` packs some of them.

    split: rows with the column text, see `encode_text`. sequence_length: T, at least the tokens of the longest
    molecule and one for `<eos>`.

    lengths (N,): tokens that each molecule predicts, its own and `<eos>`. num_tokens: their sum.
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
        """Tokens that a molecule predicts on average."""
        return self.num_tokens / len(self)

    def tokens(self, number: int) -> np.ndarray:
        """Tokens (L,) of molecule `number`; the last one is `<eos>`."""
        return self._stream.between(*self._stream.starts[number : number + 2])

    def rows(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """The molecules `numbers` (N,), packed into as few sequences as first fit finds:

        {"input_ids": (r, T) long, "position_ids": (r, T) long, "shift_labels": (r, T) long, -100 at padding}
        """
        return self.pack([self.tokens(number) for number in numbers.tolist()])

    def pack(self, molecules: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Molecules, each as its tokens (L,) with `<eos>` at the end, packed as by `rows`."""
        rows = [(np.concatenate([[self._bos], tokens[:-1]]), tokens) for tokens in molecules]
        return pack(rows, self.sequence_length, self._pad)


class MoleculeBatches(torch.utils.data.Dataset):
    """Batches of packed molecules with one loop count; item `step` is this rank's share of the *global* batch `step`:

        {"input_ids", "position_ids", "shift_labels": (r, T) long, "num_loops": int, "num_labels": int}

    `num_labels` counts the labels of the global batch: a loss divided by it weighs every token alike, however many
    tokens a rank has. An item is a pure function of (seed, step), as in `HopBatches`. Molecules come in shuffled
    epochs, each molecule once per epoch.

    batch_size: molecules of the global batch. spellings: number of spellings of each molecule; epoch e trains on
    spelling e mod `spellings`, see `augment`. None leaves the SMILES as they are. spelling_seed: seed of `augment`.
    Raises ValueError as `PackedMolecules` and `augment`, and for a batch size that does not divide.
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
        """The molecules in the spelling of an epoch. The last two spellings are kept: a batch may reach over both."""
        spelling = epoch % (self._spellings or 1)
        if spelling not in self._spelt:
            split = self._split if self._spellings is None else augment(self._split, self._spelling_seed, spelling)
            if len(self._spelt) > 1:
                self._spelt.pop(next(iter(self._spelt)))
            self._spelt[spelling] = PackedMolecules(split, self._tokenizer, self._sequence_length)
        return self._spelt[spelling]

    def chosen(self, step: int) -> np.ndarray:
        """Numbers (batch_size,) in the split of the molecules of the global batch `step`."""
        return self._epochs.between(step * self.batch_size, self.batch_size).numpy()

    def __getitem__(self, step: int) -> dict:
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}.")
        first = step * self.batch_size
        numbers = self._epochs.between(first, self.batch_size).tolist()
        spelt = [self.molecules(at // self.num_molecules) for at in range(first, first + self.batch_size)]
        share = self.batch_size // self.world
        own = slice(self.rank * share, (self.rank + 1) * share)
        sequences = [molecules.tokens(i) for molecules, i in zip(spelt[own], numbers[own], strict=True)]
        rows = spelt[0].pack(sequences)
        num_labels = sum(int(molecules.lengths[i]) for molecules, i in zip(spelt, numbers, strict=True))
        return rows | {"num_loops": self.depth(step), "num_labels": num_labels}
