"""Batches of one length and one depth; every draw is a pure function of (seed, step), so that resuming replays them.

    num_loops = depth(step)                                    the same on every rank
    hops      = one hop count, drawn by the rows each has
    rows      = the next global batch of that hop count's shuffled epochs; a rank takes its contiguous share

Text has no hops; its rows are blocks of T tokens, cut from all documents one after the other. Molecules are packed,
several to a row: packing.py.

Legend: N rows, b rows of a rank's batch, T tokens.
"""

import functools
import json
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.data_loader import DataLoaderDispatcher
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from tokenizers.models import BPE
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import has_length

from .fields import MOST_LOOPS, Range
from .hop_rows import hop_table, stream

# Nodes of the Gauss-Hermite rule over the log-normal rate; 64 give the mean to about 1e-12 for sigma <= 1.
NODES = 64

# Steps whose depths, or hop counts, are drawn at once.
CHUNK = 4096


class DepthSampler:
    """Number of loops of a training step: `sampler(step)` depends on (seed, step) only.

    kind                 draws                                                       takes
    fixed                `mean` loops                                                mean
    uniform              any of minimum .. maximum                                   minimum, maximum
    poisson              clip(Poisson(rate), minimum, maximum)                       rate or mean, minimum, maximum
    lognormal_poisson    as poisson, the rate itself log-normal: E rate = `rate`,    the same, and sigma
                         sd of log rate = `sigma` (Geiping et al. 2025, arXiv 2502.05171)

    Poisson (4; 2, 8) is Kohli et al. 2026 (arXiv 2604.07822): mean 4.08, P(2) = 24 %, P(8) = 5 %. Given `mean` instead
    of `rate`, the rate is solved for, so that the mean *after* clipping is the one asked for.

    depths (M,), probabilities (M,): the distribution; expected: its exact mean.
    Raises ValueError for a field that is missing, superfluous or out of range.
    """

    def __init__(
        self,
        kind: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "poisson",
        *,
        rate: float | None = None,
        mean: float | None = None,
        minimum: int | None = None,
        maximum: int | None = None,
        sigma: float | None = None,
        seed: int = 0,
    ):
        given = {"rate": rate, "mean": mean, "minimum": minimum, "maximum": maximum, "sigma": sigma}
        takes = {
            "fixed": ["mean"],
            "uniform": ["minimum", "maximum"],
            "poisson": ["rate" if mean is None else "mean", "minimum", "maximum"],
            "lognormal_poisson": ["rate" if mean is None else "mean", "minimum", "maximum", "sigma"],
        }
        ranges = dict.fromkeys(("mean", "minimum", "maximum"), Range(at_most=MOST_LOOPS))
        # The quadrature has too few nodes for a larger sigma.
        ranges |= {"rate": Range(above=0, at_most=MOST_LOOPS), "sigma": Range(above=0, at_most=4)}
        if kind not in takes:
            raise ValueError(f"kind must be one of {', '.join(takes)}, got {kind!r}.")
        for name, value in given.items():
            if (value is not None) != (name in takes[kind]):
                raise ValueError(f"depth {kind} takes {', '.join(takes[kind])}; {name} is {value}.")
            if value is not None:
                ranges[name].check(name, value)
        Range(at_least=0, whole=True).check("seed", seed)
        if kind == "fixed":
            minimum = maximum = mean
        if minimum != int(minimum) or maximum != int(maximum) or not 1 <= minimum <= maximum:
            said = "mean: " if kind == "fixed" else ""
            raise ValueError(
                f"{said}loops must be whole numbers with 1 <= minimum <= maximum, got {minimum} and {maximum}."
            )
        self.kind, self.seed = kind, seed
        self.depths = np.arange(int(minimum), int(maximum) + 1)
        if kind in ("fixed", "uniform"):
            self.rate = None
            self.probabilities = np.full(len(self.depths), 1 / len(self.depths))
        else:
            self.rate = rate if mean is None else self._rate_of(mean, sigma or 0.0)
            self.probabilities = self._clipped_poisson(self.rate, sigma or 0.0)
        self.expected = float(self.probabilities @ self.depths)
        self._chunk = (-1, self.depths)  # number of the chunk drawn last, and its depths

    def __call__(self, step: int) -> int:
        """Loops of update `step`."""
        chunk, offset = divmod(step, CHUNK)
        if self._chunk[0] != chunk:
            drawn = stream(self.seed, "depths of steps", chunk).choice(self.depths, size=CHUNK, p=self.probabilities)
            self._chunk = (chunk, drawn)
        return int(self._chunk[1][offset])

    def _clipped_poisson(self, rate: float, sigma: float) -> np.ndarray:
        """Probability of each depth; sigma 0 is the plain Poisson."""
        if len(self.depths) == 1:
            return np.ones(1)
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES if sigma else 1)
        rates = rate * np.exp(sigma * nodes - sigma**2 / 2)  # their mean is `rate`
        counts = np.arange(self.depths[-1])
        log_factorial = np.array([math.lgamma(count + 1) for count in counts])
        below = np.exp(counts * np.log(rates)[:, None] - rates[:, None] - log_factorial)  # (nodes, maximum)
        below = weights / weights.sum() @ below
        return np.array([*[below[: self.depths[0] + 1].sum()], *below[self.depths[0] + 1 :], 1 - below.sum()])

    def _rate_of(self, mean: float, sigma: float) -> float:
        """The rate whose clipped mean is `mean`, by bisection: the mean grows with the rate."""
        if not self.depths[0] < mean < self.depths[-1]:
            raise ValueError(f"mean {mean} must lie between minimum {self.depths[0]} and maximum {self.depths[-1]}.")
        low, high = 0.0, float(self.depths[-1])
        while self._clipped_poisson(high, sigma) @ self.depths < mean:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self._clipped_poisson(middle, sigma) @ self.depths < mean else (low, middle)
        return high


def encode_hops(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, hops: list[int] | None = None
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Hop count -> (input_ids (N, T) long, its last column the readout, answers (N,) long); of `hops`, or of all.

    The same ids as calling the tokenizer row by row, many times faster. Raises ValueError for an unknown word, and as
    `hop_table`.
    """
    table = hop_table(split)
    if hops is not None:
        table = table.filter(pc.is_in(table["hops"], pa.array(hops, table["hops"].type)))
    return {group[0]: rows for group, rows in _encode(table, tokenizer, ["hops"]).items()}


def encode_groups(
    split: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(hops, split_kind) -> (input_ids (N, T), answers (N,)), as `encode_hops`: the groups of results."""
    return _encode(hop_table(split, ["split_kind"]), tokenizer, ["hops", "split_kind"])


def encode_rows(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The split with columns input_ids (T,) and shift_labels (1,), for stock Trainer with `LoopCollator`.

    Raises ValueError as `encode_hops`.
    """
    encode_hops(split, tokenizer)  # says what is wrong with a row, as the tokenizer does not

    def encode(batch: dict) -> dict:
        answers = tokenizer.convert_tokens_to_ids(batch["answer"])
        return {"input_ids": tokenizer(batch["text"])["input_ids"], "shift_labels": [[answer] for answer in answers]}

    return split.map(encode, batched=True)


def _encode(table: pa.Table, tokenizer: PreTrainedTokenizerBase, columns: list[str]) -> dict[tuple, tuple]:
    # What the tokenizer's template appends to every row: the readout token, or nothing.
    readout = torch.tensor(tokenizer("")["input_ids"], dtype=torch.long)
    groups = {}
    for key in table.group_by(columns).aggregate([]).sort_by([(name, "ascending") for name in columns]).to_pylist():
        chosen = [pc.equal(table[name], key[name]) for name in columns]
        rows = table.filter(chosen[0] if len(chosen) == 1 else pc.and_(*chosen))
        words = _token_ids(pc.list_flatten(pc.utf8_split_whitespace(rows["text"])), tokenizer)
        input_ids = torch.cat([words.view(len(rows), -1), readout.expand(len(rows), -1)], dim=1)  # (N, T)
        groups[tuple(key[name] for name in columns)] = input_ids, _token_ids(rows["answer"], tokenizer)
    return groups


def _token_ids(words: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Ids (M,) of words: the tokenizer is asked once per distinct word."""
    coded = words.combine_chunks().dictionary_encode()
    vocabulary = tokenizer.get_vocab()
    distinct = [vocabulary.get(word) for word in coded.dictionary.to_pylist()]
    if None in distinct:
        unknown = coded.dictionary[distinct.index(None)]
        raise ValueError(f"the tokenizer has no token for '{unknown}': it was made for another graph.")
    return torch.tensor(distinct)[torch.from_numpy(coded.indices.to_numpy().astype(np.int64))]


class HopBatches(torch.utils.data.Dataset):
    """Batches of one hop count and one depth; item `step` is this rank's share of the step-th *global* batch:

        {"input_ids": (b, T) long, "shift_labels": (b, 1) long, "logits_to_keep": 1, "num_loops": int, "hops": int}

    A pure function of (seed, step), so that training resumed at a step goes on as if never interrupted, and training
    on `world` ranks sees the batches of one. Within a hop count the rows come in shuffled epochs, each row once per
    epoch. There is no last step: index it, or use a DataLoader with `batch_size=None, sampler=range(start, stop)`.

    split: rows with the columns text, answer, hops. batch_size: rows of the global batch. depth: draws `num_loops`.
    hops: the hop counts to draw from, all by default. weighting: how often a hop count is drawn, in proportion to its
    "rows" or "uniform". at_least_hops: a depth below the batch's hop count is raised to it. (The paper draws the two
    apart, which asks a core that follows one relation per loop for answers it cannot reach.) pad_to: length to which
    rows are filled up with masked copies of the readout token before the one that is read, with an "attention_mask";
    the answer is the same and the work is that of the paper's code, which pads to 50.

    Raises ValueError for a batch size that does not divide, a hop count without rows, or rows longer than pad_to.
    """

    def __init__(
        self,
        split: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        depth: DepthSampler,
        hops: list[int] | None = None,
        rank: int = 0,
        world: int = 1,
        weighting: Literal["rows", "uniform"] = "rows",
        at_least_hops: bool = False,
        pad_to: int | None = None,
    ):
        check_share(batch_size, rank, world)
        if weighting not in ("rows", "uniform"):
            raise ValueError(f"weighting must be rows or uniform, got {weighting!r}.")
        self._rows = encode_hops(split, tokenizer, hops)
        missing = sorted(set(hops or []) - set(self._rows))
        if missing or not self._rows:
            raise ValueError(f"the split has no rows of {missing or 'any'} hops; it has {sorted(set(split['hops']))}.")
        self.hops = list(self._rows)
        longest = max(input_ids.shape[1] for input_ids, _ in self._rows.values())
        if pad_to is not None and (pad_to < longest or not tokenizer("")["input_ids"]):
            raise ValueError(
                f"pad_to must be at least {longest}, the longest row, and needs a readout token; got {pad_to}."
            )
        self.pad_to = pad_to
        self.num_rows = {k: len(answers) for k, (_, answers) in self._rows.items()}
        self.batch_size, self.seed, self.depth, self.rank, self.world = batch_size, seed, depth, rank, world
        self.at_least_hops = at_least_hops
        weights = np.array([self.num_rows[k] if weighting == "rows" else 1 for k in self.hops])
        self._weights = weights / weights.sum()
        # How often each hop count came before each chunk of steps, as far as it is known; and the chunk in use.
        self._counts = [np.zeros(len(self.hops), dtype=np.int64)]
        self._chunk = (-1, np.empty(0), np.empty(0))
        self._epochs = {k: ShuffledEpochs(n, batch_size, seed, "rows of epochs", k) for k, n in self.num_rows.items()}

    def __getitem__(self, step: int) -> dict:
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}.")
        k, earlier = self._hops_of(step)
        share = self.batch_size // self.world
        chosen = self._epochs[k].between(earlier * self.batch_size + self.rank * share, share)
        input_ids, answers = self._rows[k]
        batch = {
            # Four times as fast as input_ids[chosen].
            "input_ids": input_ids.index_select(0, chosen),
            "shift_labels": answers.index_select(0, chosen)[:, None],
            "logits_to_keep": 1,
            "num_loops": max(self.depth(step), k if self.at_least_hops else 1),
            "hops": k,
        }
        return batch if self.pad_to is None else batch | pad_rows(batch["input_ids"], self.pad_to)

    def _hops_of(self, step: int) -> tuple[int, int]:
        """Hop count of a step, and how many earlier steps had the same."""
        chunk, offset = divmod(step, CHUNK)
        if self._chunk[0] != chunk:
            while len(self._counts) <= chunk:
                drawn = self._draw_chunk(len(self._counts) - 1)
                self._counts.append(self._counts[-1] + np.bincount(drawn, minlength=len(self.hops)))
            drawn = self._draw_chunk(chunk)
            earlier = np.empty(CHUNK, dtype=np.int64)
            for i, count in enumerate(self._counts[chunk]):
                earlier[drawn == i] = count + np.arange((drawn == i).sum())
            self._chunk = (chunk, drawn, earlier)
        _, drawn, earlier = self._chunk
        return self.hops[drawn[offset]], int(earlier[offset])

    def _draw_chunk(self, chunk: int) -> np.ndarray:
        """Indices into `hops` (CHUNK,) of one chunk of steps."""
        return stream(self.seed, "hops of steps", chunk).choice(len(self.hops), size=CHUNK, p=self._weights)


class ShuffledEpochs:
    """The endless sequence of shuffled epochs of `num_rows` rows, each row once per epoch: a function of the seed.

    purpose, key: name the stream of random numbers, see `hop_rows.stream`.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, purpose: str, *key: int):
        self.num_rows, self.seed, self.purpose, self.key = num_rows, seed, purpose, key
        # Short epochs are shuffled several at a time: a batch meets two blocks at most, and mostly one it has met.
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
        """Row numbers (epochs * N,): every N of them are a shuffled epoch. The last two blocks are kept."""
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


def pad_rows(input_ids: torch.Tensor, length: int) -> dict:
    """Rows (b, T) with their last token, the readout, repeated up to `length`; all copies but the last are masked."""
    num_copies = length - input_ids.shape[1]
    mask = torch.ones(len(input_ids), length, dtype=torch.long)
    mask[:, input_ids.shape[1] - 1 : -1] = 0
    return {"input_ids": torch.cat([input_ids, input_ids[:, -1:].expand(-1, num_copies)], 1), "attention_mask": mask}


def stack_rows(rows: list[dict]) -> dict:
    """Rows of `encode_rows` as {"input_ids": (b, T), "shift_labels": (b, 1), "logits_to_keep": 1}; nothing is padded.

    Raises ValueError for rows of different lengths.
    """
    lengths = sorted({len(row["input_ids"]) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"a batch holds rows of one length, got {lengths}: keep one hop count, or use HopBatches.")
    return {
        "input_ids": torch.tensor([row["input_ids"] for row in rows]),
        "shift_labels": torch.tensor([row["shift_labels"] for row in rows]),
        "logits_to_keep": 1,
    }


class LoopCollator:
    """Adds a sampled `num_loops` to the batches of `collate`: sampled depth for stock Trainer.

    All micro-batches of an update share its depth, `depth(update)`, on every rank. Calls are counted from `start_at`.
    With a Trainer, add `LoopCollatorCallback(collator)`, which keeps the count through resumes and evaluations. For
    hop rows set `TrainingArguments(label_names=["shift_labels"])` too: it drops columns that it does not know.
    """

    def __init__(self, depth: DepthSampler, collate: Callable[[list], dict] = stack_rows):
        self.depth, self.collate = depth, collate
        self.drawing, self.label_smoothing = True, 0.0
        self.start_at(0)

    def start_at(self, update: int, accumulation_steps: int = 1, passed_over: int = 0):
        """The next batch is the first micro-batch of `update`, after `passed_over` ones that nobody will see."""
        self._next, self._accumulation_steps = update * accumulation_steps - passed_over, accumulation_steps
        self._calls = 0

    def __call__(self, rows: list) -> dict:
        batch = self.collate(rows)
        if self.label_smoothing and "labels" not in batch:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing} smooths `labels`, which these rows do not have: give "
                "them `labels` instead of `shift_labels`, or leave it out."
            )
        if not self.drawing:
            return batch
        worker = torch.utils.data.get_worker_info()
        # Each worker of a DataLoader has its own copy of this object and collates every num_workers-th batch.
        micro_batch = self._calls if worker is None else self._calls * worker.num_workers + worker.id
        self._calls += 1
        return batch | {"num_loops": self.depth((self._next + micro_batch) // self._accumulation_steps)}


class LoopCollatorCallback(TrainerCallback):
    """Keeps a `LoopCollator` in step with the Trainer: resumed training replays the depths of uninterrupted training.

    Evaluation batches draw no depth (the model's default is used) and do not move the count. ValueError for what would
    lose it: persistent workers, a stream that one process reads for others, `label_smoothing_factor` without `labels`.
    """

    def __init__(self, collator: LoopCollator):
        self.collator = collator
        self._in_epoch = self._resumes = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers must be off: such workers never learn the update they are at."
            )
        if args.world_size > 1 and isinstance(train_dataloader, DataLoaderDispatcher):
            raise ValueError(
                "dispatch_batches must be off: one process would read the stream, and draw depths, for all. Set "
                'accelerator_config={"dispatch_batches": False}.'
            )
        self.collator.drawing = self._in_epoch = False
        self.collator.label_smoothing = args.label_smoothing_factor
        self._resumes = state.global_step > 0 and not args.ignore_data_skip

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        streams = train_dataloader is not None and isinstance(train_dataloader.dataset, IterableDataset)
        passed_over = self._passed_over(args, state, train_dataloader) if streams and self._resumes else 0
        self.collator.start_at(state.global_step, args.gradient_accumulation_steps, passed_over)
        self.collator.drawing = self._in_epoch = True
        self._resumes = False

    def _passed_over(self, args, state, train_dataloader) -> int:
        """Micro-batches of a stream that Trainer collates, and throws away, to resume within an epoch."""
        accumulated = args.gradient_accumulation_steps
        updates = math.ceil(len(train_dataloader) / accumulated) if has_length(train_dataloader) else state.max_steps
        return state.global_step % updates * accumulated

    def on_step_end(self, args, state, control, **kwargs):
        self.collator.drawing = not control.should_evaluate

    def on_evaluate(self, args, state, control, **kwargs):
        self.collator.drawing = self._in_epoch

    def on_epoch_end(self, args, state, control, **kwargs):
        self.collator.drawing = self._in_epoch = False
