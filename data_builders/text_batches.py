"""Text as one stream of tokens, cut into blocks of one length, and batches of blocks."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from .depth import DepthSampler
from .epochs import ShuffledEpochs, WindowedEpochs, check_share
from .tokenizers import SMILES_SPLIT, SMILES_TOKEN

PRIVATE_USE = 0xE000  # the first of 6,400 characters that Unicode leaves to its users


def spread_blocks(total: int, limit: int | None) -> torch.Tensor:
    """Numbers (N,) of at most `limit` of `total` blocks, evenly spread from the first to the last."""
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.linspace(0, total - 1, limit, dtype=torch.float64).long()  # strictly rising


def backend_parts(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer splits text by, as JSON, to know cached tokens by.

    The tokenizer object hashes differently after use, since a call leaves its padding and truncation there.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: part for name, part in parts.items() if name not in ("padding", "truncation")})


class LostCharacters:
    """`lost(characters)` are those that the tokenizer drops silently, as BPE drops what its alphabet lacks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._drops = tokenizer.unk_token is None and isinstance(tokenizer.backend_tokenizer.model, BPE)
        self._known: dict[str, bool] = {}  # character -> whether it is lost

    def __call__(self, characters: set[str]) -> set[str]:
        return {character for character in characters if self._drops and self._is_lost(character)}

    def _is_lost(self, character: str) -> bool:
        if character not in self._known:
            normalizer = self.tokenizer.backend_tokenizer.normalizer
            meant = character if normalizer is None else normalizer.normalize_str(character)
            shown = meant.isprintable() and not meant.isspace() and meant != ""
            self._known[character] = shown and not self.tokenizer(character, add_special_tokens=False)["input_ids"]
        return self._known[character]


class UnknownToken(Exception):
    """The tokenizer has no token for the part `what` of `text`, which is text `index` of those it was given."""

    def __init__(self, what: str, text: str, index: int):
        super().__init__(what, text, index)
        self.what, self.text, self.index = what, text, index

    def sentence(self, place: str) -> str:
        """The message for a user. place: where the text is."""
        at = max(0, self.text.index(self.what) - 40)
        shown = self.text if len(self.text) <= 120 else f"... {self.text[at : at + 80]} ..."
        return (
            f"the tokenizer has no token for {self.what!r} in {shown!r} ({place}): it was made from rows without one. "
            "Take the row out, or make the tokenizer from rows that have one."
        )


class Encoder:
    """`encoder(texts)` is a list of the ids of each text, the end-of-text token last. A special token that is spelt
    out in a text is read as text.

    Raises ValueError for a tokenizer without an end-of-text token. A call raises UnknownToken for a text with a
    character or word that the tokenizer has no token for, if it has none for unknown words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos_token, which goes between documents: set one and save it again."
            )
        self.tokenizer, self._vocabulary, self._lost = tokenizer, tokenizer.get_vocab(), LostCharacters(tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        lost = self._lost(set().union(*texts))
        for index, text in enumerate(texts if lost else []):
            if lost & set(text):
                raise UnknownToken(min(lost & set(text)), text, index)
        try:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        except Exception as error:  # `tokenizers` raises plain Exceptions
            words = self.tokenizer.backend_tokenizer.pre_tokenizer
            for index, text in enumerate(texts if words else []):
                for word, _ in words.pre_tokenize_str(text):
                    if word not in self._vocabulary:
                        raise UnknownToken(word, text, index) from error
            raise
        return [[*ids, self.tokenizer.eos_token_id] for ids in encoded["input_ids"]]


def encode_text(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The split's documents as one column input_ids (int32), the end-of-text token after each.

    The tokens are written once into the `datasets` cache, with a progress bar; later runs map the file into memory.
    Raises ValueError as `Encoder`, with the row that has an unknown word or character.
    """
    encoder = Encoder(tokenizer)

    def encode(batch: dict) -> dict:
        try:
            return {"input_ids": encoder(batch["text"])}
        except UnknownToken as error:
            row = {name: batch[name][error.index] for name in ("source", "line") if name in batch}
            place = "".join(f", {name} {value}" for name, value in row.items())
            raise ValueError(error.sentence(f"split {split.split}{place}")) from error

    smiles = SmilesTable.of(tokenizer)

    def encode_smiles(batch: pa.Table) -> pa.Table:
        ids = None if smiles is None else smiles.encode(batch["text"].to_pylist())
        if ids is None:  # what is wrong is said below
            ids = pa.array(encode(batch.to_pydict())["input_ids"], pa.list_(pa.int32()))
        return pa.table({"input_ids": ids})

    features = Features({"input_ids": List(Value("int32"))})
    if not len(split):  # `map` would not change the columns of an empty split
        return Dataset.from_dict({"input_ids": []}, features=features)
    made_of = (split._fingerprint, backend_parts(tokenizer), tokenizer.eos_token_id)
    return (
        split.with_format("arrow")
        .map(
            encode_smiles,
            batched=True,
            batch_size=100 if smiles is None else 10_000,
            remove_columns=split.column_names,
            features=features,
            new_fingerprint=Hasher.hash(made_of),
            desc="Tokenize",
        )
        .with_format(None)
    )


@dataclass(frozen=True)
class SmilesTable:
    """The ids of a `smiles_tokenizer`, by a table of characters: its ids, a hundred times as fast.

    Tokens of several characters are first replaced by characters of their own, which no SMILES has. No such token
    begins within another one, so that the order in which they are replaced does not matter, but for the brackets:
    [Cl-] is one token, and has Cl in it.

    Args:
        stands_for: token of several characters -> the character in its place.
        ids: (65536,) int32, the id of every character of two bytes; -1 of those that are no token.
    """

    stands_for: dict[str, str]
    ids: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self | None:
        """The table of a tokenizer; None if it splits text otherwise than `smiles_tokenizer`."""
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        words, added = parts["model"].get("vocab"), [token["content"] for token in parts["added_tokens"]]
        plain = parts["model"]["type"] == "WordLevel" and parts["normalizer"] is None
        if not plain or parts["pre_tokenizer"] != SMILES_SPLIT or set(added) - set(tokenizer.all_special_tokens):
            return None
        tokens = [word for word in words if re.fullmatch(SMILES_TOKEN, word)]
        long = sorted((token for token in tokens if len(token) > 1), key=lambda token: token[0] != "[")
        stands_for = {token: chr(PRIVATE_USE + i) for i, token in enumerate(long)}
        ids = np.full(2**16, -1, dtype=np.int32)
        for token in tokens:
            ids[ord(stands_for.get(token, token))] = words[token]
        ids[ord("\n")] = tokenizer.eos_token_id
        return cls(stands_for, ids)

    def encode(self, texts: Sequence[str]) -> pa.ListArray | None:
        """The ids of each text, the end-of-text token last; None if one has a character that is in no token."""
        joined = "".join(f"{text}\n" for text in texts)
        if not joined.isascii() or joined.count("\n") != len(texts):
            return None
        for token, character in self.stands_for.items():
            joined = joined.replace(token, character)
        codes = np.frombuffer(joined.encode("utf-16-le"), dtype="<u2")
        ids = self.ids[codes]
        if ids.min(initial=0) < 0:
            return None
        ends = 1 + np.flatnonzero(codes == ord("\n"))
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), pa.array(ids))


class TokenStream:
    """The tokens of a split's documents one after the other, the end-of-text token after each; mapped into memory.

    starts (N + 1,): positions in the stream where each of the N documents begins, and where the last one ends.
    """

    def __init__(self, split: Dataset, tokenizer: PreTrainedTokenizerBase):
        self._take(encode_text(split, tokenizer).with_format("arrow")[:]["input_ids"])

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> Self:
        """The stream of documents that are tokens already, a list each."""
        stream = cls.__new__(cls)
        stream._take(column)
        return stream

    def _take(self, column: pa.ChunkedArray) -> None:
        self._column = column
        # Views of the file, not copies: the tokens of an Arrow chunk are contiguous in it.
        self._parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
        self._part_starts = np.cumsum([0, *map(len, self._parts)])

    @functools.cached_property
    def starts(self) -> np.ndarray:
        lengths = [pc.list_value_length(chunk).to_numpy() for chunk in self._column.chunks]
        return np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._part_starts[-1])

    def between(self, start: int, stop: int) -> np.ndarray:
        """Tokens (stop - start,) of the stream, from `start` to before `stop`."""
        first = int(np.searchsorted(self._part_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._part_starts, stop, side="left"))
        parts = zip(self._part_starts[first:last], self._parts[first:last], strict=True)
        return np.concatenate([part[max(0, start - at) : stop - at] for at, part in parts])


class TextBlocks:
    """Blocks of T = `sequence_length` tokens, cut from the documents of a split one after the other.

    Block i predicts tokens i T + 1 .. (i + 1) T of the stream, so that every token but the first is predicted once.
    The last tokens are left out where they are too few for a block. Attention does not stop at the end of a document.

    split: rows with the column text, see `encode_text`. Raises ValueError if the text is too short for one block.
    """

    def __init__(self, split: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int):
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be >= 1, got {sequence_length}.")
        self.sequence_length = sequence_length
        self._stream = self.read(split, tokenizer)
        self.num_tokens = len(self._stream)
        if len(self) < 1:
            raise ValueError(
                f"the split {split.split} has {self.num_tokens} tokens, too few for a block of {sequence_length} and "
                "the token after it: add text, give the split a larger share, or lower sequence_length."
            )

    def read(self, split: Dataset, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
        """The tokens that blocks are cut from."""
        return TokenStream(split, tokenizer)

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.sequence_length

    def epochs(self, batch_size: int, seed: int) -> ShuffledEpochs | WindowedEpochs:
        """The order in which batches take the blocks."""
        return ShuffledEpochs(len(self), batch_size, seed, "blocks of epochs")

    @property
    def mean_length(self) -> float:
        """Tokens that a block predicts."""
        return self.sequence_length

    def rows(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """The blocks `numbers` (N,) as {"input_ids": (N, T) long, "shift_labels": (N, T) long}."""
        return self.all_rows(numbers)

    def documents(self, numbers: torch.Tensor) -> np.ndarray:
        """Numbers (M,) in the split, ascending, of the documents that the blocks `numbers` (N,) have tokens of."""
        firsts = self.places(numbers).numpy() * self.sequence_length  # where each block begins in the stream
        starts = self._stream.starts[1:]  # where each next document begins
        begin, end = (np.searchsorted(starts, at, side="right") for at in (firsts, firsts + self.sequence_length))
        return np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(begin, end, strict=True)]))

    def places(self, numbers: torch.Tensor) -> torch.Tensor:
        """Places (N,) of the blocks `numbers` (N,) in the stream, counted in blocks."""
        return numbers

    def num_labels(self, numbers: torch.Tensor) -> int:
        """Labels of the blocks `numbers` (N,), of which `rows` says -100 for the others."""
        return len(numbers) * self.sequence_length

    def all_rows(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `rows`, where every next token is a label."""
        length = self.sequence_length
        starts = (self.places(numbers) * length).tolist()
        blocks = [self._stream.between(at, at + length + 1) for at in starts]
        tokens = torch.from_numpy(np.stack(blocks).astype(np.int64))  # (N, T + 1)
        return {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].contiguous()}


class TextBatches(torch.utils.data.Dataset):
    """Batches of blocks of text with one loop count; item `step` is this rank's share of the *global* batch `step`:

        {"input_ids": (b, T) long, "shift_labels": (b, T) long, "num_loops": int, "num_labels": int}

    `num_labels` counts the labels of the global batch. An item is a pure function of (seed, step), as in `HopBatches`:
    a resumed training sees the same batches, every
    rank has the same loop count, and `world` ranks together see the batches that one would. Blocks come in shuffled
    epochs, each block once per epoch. There is no last item.

    split: rows with the column text, see `TextBlocks`; or blocks. batch_size: blocks of the global batch. depth: draws
    `num_loops`. Raises ValueError for a batch size that does not divide, or text that is too short for one block.
    """

    def __init__(
        self,
        split: Dataset | TextBlocks,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        batch_size: int,
        seed: int,
        depth: DepthSampler,
        rank: int = 0,
        world: int = 1,
    ):
        check_share(batch_size, rank, world)
        self.blocks = split if isinstance(split, TextBlocks) else TextBlocks(split, tokenizer, sequence_length)
        self.batch_size, self.depth, self.rank, self.world = batch_size, depth, rank, world
        self._epochs = self.blocks.epochs(batch_size, seed)

    def chosen(self, step: int) -> np.ndarray:
        """Numbers (M,) in the split, ascending, of the documents that the global batch `step` has tokens of."""
        return self.blocks.documents(self._epochs.between(step * self.batch_size, self.batch_size))

    def __getitem__(self, step: int) -> dict:
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}.")
        share = self.batch_size // self.world
        chosen = self._epochs.between(step * self.batch_size, self.batch_size)
        rows = self.blocks.rows(chosen[self.rank * share : (self.rank + 1) * share])
        return rows | {"num_loops": self.depth(step), "num_labels": self.blocks.num_labels(chosen)}
