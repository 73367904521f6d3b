"""Text as one stream of tokens, cut into blocks of one length, and batches of blocks."""

import functools
import json

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from .depth import DepthSampler
from .epochs import ShuffledEpochs, check_share


def spread_blocks(total: int, limit: int | None) -> torch.Tensor:
    """Numbers (N,) of at most `limit` of `total` blocks, evenly spread with the first and the last among them."""
    if limit is None or limit >= total:
        return torch.arange(total)
    return torch.linspace(0, total - 1, limit, dtype=torch.float64).long()  # strictly rising


def encode_text(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The split's documents as one column input_ids (int32), the end-of-text token after each.

    Tokenised once, with a progress bar, into the `datasets` cache; later runs map the file into memory. A special
    token that is spelt out in the text is read as text. Raises ValueError if the tokenizer has no end-of-text token,
    and, where it has no token for what is unknown, for a row with a word or a character that it lacks.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which goes between documents: set one and save it again.")

    vocabulary, normalizer = tokenizer.get_vocab(), tokenizer.backend_tokenizer.normalizer

    @functools.cache
    def is_lost(character: str) -> bool:
        """Whether the tokenizer drops a character without a word, as BPE does with what is not in its alphabet."""
        meant = character if normalizer is None else normalizer.normalize_str(character)
        shown = meant.isprintable() and not meant.isspace() and meant != ""
        return shown and not tokenizer(character, add_special_tokens=False)["input_ids"]

    def encode(batch: dict) -> dict:
        if tokenizer.unk_token is None and isinstance(tokenizer.backend_tokenizer.model, BPE):
            lost = {character for character in set().union(*batch["text"]) if is_lost(character)}
            for i, text in enumerate(batch["text"] if lost else []):
                if lost & set(text):
                    raise ValueError(lacking(min(lost & set(text)), batch, i, split))
        try:
            encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)
        except Exception as error:  # `tokenizers` has no class of its own for it
            words = tokenizer.backend_tokenizer.pre_tokenizer
            for i, text in enumerate(batch["text"] if words else []):
                unknown = [word for word, _ in words.pre_tokenize_str(text) if word not in vocabulary]
                if unknown:
                    raise ValueError(lacking(unknown[0], batch, i, split)) from error
            raise
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    features = Features({"input_ids": List(Value("int32"))})
    if not len(split):  # `map` would return it as it is
        return Dataset.from_dict({"input_ids": []}, features=features)
    # Not the hash of the object: it changes with use, as do the padding and truncation of the last call.
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    made_of = (split._fingerprint, json.dumps(parts), tokenizer.eos_token_id)
    return split.map(
        encode,
        batched=True,
        batch_size=100,
        remove_columns=split.column_names,
        features=features,
        new_fingerprint=Hasher.hash(made_of),
        desc="Tokenize",
    )


def lacking(what: str, batch: dict, i: int, split: Dataset) -> str:
    """What is wrong with row `i` of a batch of the split: the tokenizer has no token for a part of its text."""
    text = batch["text"][i]
    at = max(0, text.index(what) - 40)
    shown = text if len(text) <= 120 else f"... {text[at : at + 80]} ..."
    place = "".join(f", {name} {batch[name][i]}" for name in ("source", "line") if name in batch)
    return (
        f"the tokenizer has no token for {what!r} in {shown!r} (split {split.split}{place}): the rows it was made "
        "from have none. Take the row out, or add one like it to those."
    )


class TokenStream:
    """The tokens of a split's documents one after the other, the end-of-text token after each.

    starts (N + 1,): where each of the N documents begins, and where the last one ends. Tokens are mapped into memory.
    """

    def __init__(self, split: Dataset, tokenizer: PreTrainedTokenizerBase):
        column = encode_text(split, tokenizer).with_format("arrow")[:]["input_ids"]
        lengths = [pc.list_value_length(chunk).to_numpy() for chunk in column.chunks]
        self.starts = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        # Views of the file, not copies: a chunk's tokens are contiguous in it.
        self._parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
        self._part_starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._part_starts[-1])

    def between(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop of the stream."""
        first = int(np.searchsorted(self._part_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._part_starts, stop, side="left"))
        parts = zip(self._part_starts[first:last], self._parts[first:last], strict=True)
        return np.concatenate([part[max(0, start - at) : stop - at] for at, part in parts])


class TextBlocks:
    """Blocks of `sequence_length` tokens and the token that follows each, cut from all documents in a row.

    Block i predicts tokens i T + 1 .. (i + 1) T of the stream, so that every token but the first is predicted once;
    the last tokens, too few for a block, are left out. Attention does not stop at the end of a document.

    split: `encode_text` of it is mapped into memory. Raises ValueError if there is not one block.
    """

    def __init__(self, split: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int):
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be >= 1, got {sequence_length}.")
        self._stream = TokenStream(split, tokenizer)
        self.sequence_length, self.num_tokens = sequence_length, len(self._stream)
        if len(self) < 1:
            raise ValueError(
                f"the split {split.split} has {self.num_tokens} tokens, too few for a block of {sequence_length} and "
                "the token after it: add text, give the split a larger share, or lower sequence_length."
            )

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self.sequence_length

    @property
    def mean_length(self) -> float:
        """Tokens that are predicted per block."""
        return self.sequence_length

    def rows(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"input_ids": (N, T) long, "shift_labels": (N, T) long} of the blocks `numbers` (N,)."""
        length = self.sequence_length
        blocks = [self._stream.between(at, at + length + 1) for at in (numbers * length).tolist()]
        tokens = torch.from_numpy(np.stack(blocks).astype(np.int64))  # (N, T + 1)
        return {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].contiguous()}


class TextBatches(torch.utils.data.Dataset):
    """Batches of blocks of text and of one depth; item `step` is this rank's share of the step-th *global* batch:

        {"input_ids": (b, T) long, "shift_labels": (b, T) long, "num_loops": int}

    A pure function of (seed, step), as `HopBatches`: training resumed at a step goes on as if never interrupted, every
    rank has the same depth, and `world` ranks see the batches of one. Blocks come in shuffled epochs, each once per
    epoch. There is no last step.

    split: rows with the column text, see `TextBlocks`. batch_size: blocks of the global batch. depth: draws
    `num_loops`. Raises ValueError for a batch size that does not divide, or less text than a block.
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
    ):
        check_share(batch_size, rank, world)
        self.blocks = TextBlocks(split, tokenizer, sequence_length)
        self.batch_size, self.depth, self.rank, self.world = batch_size, depth, rank, world
        self._epochs = ShuffledEpochs(len(self.blocks), batch_size, seed, "blocks of epochs")

    def __getitem__(self, step: int) -> dict:
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}.")
        share = self.batch_size // self.world
        chosen = self._epochs.between(step * self.batch_size + self.rank * share, share)
        return self.blocks.rows(chosen) | {"num_loops": self.depth(step)}
