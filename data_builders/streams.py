"""Text that is read on the way: documents of a streamed data set, tokenised, packed and shuffled while a model trains.

    part     the shards of the data set that one process reads, and no other; there are as many as processes
    shard    a file; of Parquet with few files, a row group
    reader   torchdata's StatefulDataLoader over a part, whose workers read documents and tokenise them
    block    of T + 1 tokens, cut from the documents of a part one after the other, as `TextBlocks` cuts them
    buffer   blocks that wait to be drawn; the next block takes the place of a drawn one

The state of a stream is where the reader stands in each shard, the tokens that are too few for a block, and the
buffer. `datasets` has a shuffle buffer, too, and loses what is in it when it resumes: so the buffer is ours.

When a part is read to its end, its shards are read again in another order. Every part has its own end.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from .depth import DepthSampler
from .digested import Digested
from .epochs import check_share
from .rows import SAVED, blaming, expand_homes
from .seeding import stream
from .text_batches import Encoder, UnknownToken

DOCUMENTS = 64  # that a worker tokenises together
PIECES = 8  # a reader has at least as many shards, if its data can be cut so far: parts are then nearly equal
DRAWS = 4096  # places of the buffer that are drawn at once
HELD_OUT = ("test", "validation")  # what is named for both is in the first


def digest_of(text: str) -> bytes:
    """A short hash that tells documents apart."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class StreamedText(Digested):
    """One split of a streamed data set: its documents, one by one, but those that are held out.

    Args:
        arguments: of `datasets.load_dataset`, without split and streaming.
        split: the name of the split.
        named_by: the field that names the split, for messages.
        column: of the documents.
        held_out: `digest_of` of documents that are left out wherever they stand.
    """

    arguments: Mapping
    split: str
    named_by: str = "dataset.split"
    column: str = "text"
    held_out: frozenset[bytes] = field(default=frozenset(), repr=False)

    @property
    def name(self) -> str:
        """For messages."""
        return f"split {self.split} of dataset {dict(self.arguments)}"

    @cached_property
    def shards(self) -> datasets.IterableDataset:
        """The column of documents, by shards; nothing but the names of files, and headers, was read.

        Raises:
            MissingData: the data are not there.
            ValueError: they cannot be read, have no such split or column, or a file of this machine is empty.
        """
        arguments = expand_homes(dict(self.arguments))
        folder = Path(str(arguments.get("path")))
        if any((folder / name).is_file() for name in SAVED):
            raise ValueError(
                f"dataset: {folder} was written by save_to_disk, which is not streamed: leave streaming out."
            )
        with blaming(dict(self.arguments), self.named_by):
            builder = datasets.load_dataset_builder(**arguments)
        for file in (builder.config.data_files or {}).get(self.split, []):
            refuse_empty(file)
        with blaming(dict(self.arguments), self.named_by):
            shards = builder.as_streaming_dataset(split=self.split)
        if not isinstance(shards, datasets.IterableDataset):
            raise ValueError(f"dataset must give one split: add `split` to its arguments, one of {', '.join(shards)}.")
        columns = shards.features
        if columns is None:
            columns = dict.fromkeys(next(self.rows(shards), {self.column: None}))
        if self.column not in columns:
            raise ValueError(
                f"column must be one of {', '.join(columns)}, got {self.column!r}: {self.name} has no other."
            )
        kind = columns[self.column]
        text = isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")
        if kind is not None and not text:
            raise ValueError(f"column {self.column} of {self.name} holds {kind}, and no text: name another column.")
        return shards.select_columns(self.column)

    def rows(self, shards: datasets.IterableDataset) -> Iterator[dict]:
        """The rows of shards. Raises ValueError where they cannot be read."""
        with blaming(dict(self.arguments), self.named_by):
            yield from shards

    def documents(self) -> Iterator[str]:
        """Every document. Raises ValueError for a row that is no text, or cannot be read."""
        return self.documents_of(self.shards)

    def documents_of(self, shards: datasets.IterableDataset) -> Iterator[str]:
        """The documents of some of the shards."""
        for row in self.rows(shards):
            text = row[self.column]
            if not isinstance(text, str):
                raise ValueError(self.no_text(text))
            if text.strip() and digest_of(text) not in self.held_out:
                yield text

    def no_text(self, value) -> str:
        """The message for a row that is no text."""
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]} ..."
        return (
            f"column {self.column} of {self.name} has {shown}, which is no text: write it as one, or take the row out."
        )

    @cached_property
    def digest(self) -> str:
        """Of the number of shards and the first document. The rest is not read before it is its turn."""
        first = next(iter(replace(self, held_out=frozenset()).documents()), None)
        return hashlib.sha256(json.dumps([self.shards.num_shards, self.column, first]).encode()).hexdigest()

    @cached_property
    def row_groups(self) -> datasets.IterableDataset:
        """The shards, which are the row groups of Parquet, and files otherwise."""
        with blaming(dict(self.arguments), self.named_by):
            return self.shards.reshard()

    def cut(self, number: int) -> datasets.IterableDataset:
        """The shards, smaller ones if they are fewer than `number`."""
        return self.shards if self.shards.num_shards >= number else self.row_groups

    def part(self, part: int, parts: int, readers: int = 1) -> datasets.IterableDataset:
        """The shards of one of several parts, each of which has `readers` workers.

        Raises:
            ValueError: there are fewer shards than parts.
        """
        shards = self.cut(PIECES * parts * readers)
        if shards.num_shards < parts:
            raise ValueError(
                f"{self.name} has {shards.num_shards} shards for {parts} processes: split it into more files, start "
                "fewer processes, or tokenise it first by `looped tokenize`."
            )
        # What split_dataset_by_node does with strategy="shards", which would deal them anew in every epoch: a part
        # that is at its end would then be given what others still have to read.
        return shards.shard(parts, part, contiguous=False)


def refuse_empty(file: str) -> None:
    """Raise ValueError for a file of this machine that holds nothing."""
    path = Path(file)
    if not path.is_file():
        return
    if not path.stat().st_size or (path.suffix == ".parquet" and not pq.read_metadata(path).num_rows):
        raise ValueError(f"{path} is empty: restore it, or leave it out of dataset.data_files.")


def load_streams(
    arguments: Mapping,
    *,
    column: str = "text",
    validation_split: str | None = None,
    test_split: str | None = None,
    held_out_documents: int = 1000,
    held_out: Mapping[str, datasets.Dataset] | None = None,
) -> dict[str, StreamedText | datasets.Dataset]:
    """The splits train, which is streamed, and validation and test, which are read now.

    Args:
        arguments: of `datasets.load_dataset`, `path` and `split` among them.
        validation_split, test_split: splits of the data set to hold out, in place of the first documents of train.
        held_out_documents: most documents of each.
        held_out: rows of validation and test that were read before.

    Raises:
        ValueError: as `StreamedText`; a split that is held out has no document.
    """
    source = {name: value for name, value in arguments.items() if name not in ("split", "streaming")}
    if not isinstance(arguments.get("split"), str):
        raise ValueError("dataset must give one split: add `split` to its arguments, such as split: train.")
    train = StreamedText(source, arguments["split"], column=column)
    if held_out is None:
        held_out, known = {}, set()
        first = iter(train.documents())
        for split, named in zip(HELD_OUT, (test_split, validation_split), strict=True):
            own = first if named is None else StreamedText(source, named, f"{split}_split", column).documents()
            new = (text for text in own if not (digest_of(text) in known or known.add(digest_of(text))))
            held_out[split] = held_out_rows(list(islice(new, held_out_documents)), split)
    digests = frozenset(digest_of(text) for rows in held_out.values() for text in rows["text"])
    return {"train": replace(train, held_out=digests), **held_out}


def held_out_rows(texts: list[str], split: str) -> datasets.Dataset:
    """Rows as `Text` makes them. Raises ValueError if there are none."""
    if not texts:
        raise ValueError(
            f"the split {split} has no documents and needs one at least: add text, or name a split for it."
        )
    features = datasets.Features({"text": datasets.Value("string"), "source": datasets.Value("string")})
    rows = {"text": texts, "source": [str(number) for number in range(len(texts))]}
    return datasets.Dataset.from_dict(rows, features=features, split=split)


class Tokenizing:
    """What a worker makes of rows: (the tokens of their documents one after the other, what is wrong with one)."""

    def __init__(self, text: StreamedText, tokenizer: PreTrainedTokenizerBase):
        self.text, self.encoder = text, Encoder(tokenizer)

    def __call__(self, rows: list[dict]) -> tuple[np.ndarray, str | None]:
        found = [row[self.text.column] for row in rows]
        wrong = [value for value in found if not isinstance(value, str)]
        if wrong:
            return np.empty(0, dtype=np.int32), self.text.no_text(wrong[0])
        kept = [text for text in found if text.strip() and digest_of(text) not in self.text.held_out]
        try:
            ids = self.encoder(kept) if kept else []
        except UnknownToken as error:
            return np.empty(0, dtype=np.int32), error.sentence(self.text.name)
        return np.array([token for document in ids for token in document], dtype=np.int32), None


def quiet_tokenizers(worker: int) -> None:
    """In a worker, before `tokenizers` warns of threads that a fork has left behind."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Reader:
    """An endless iterator over the tokens of a part, those of DOCUMENTS documents at a time.

    workers: processes that read and tokenise; 0 for this one. prefetch: batches of documents that each reads ahead.
    Raises ValueError for a part without documents, and as `StreamedText`.
    """

    def __init__(
        self,
        text: StreamedText,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        *,
        part: int = 0,
        parts: int = 1,
        workers: int = 0,
        prefetch: int = 2,
    ):
        self.text, self.seed, self.number = text, seed, part
        self.part = text.part(part, parts, max(1, workers))
        workers = min(workers, self.part.num_shards)
        ahead = {"prefetch_factor": prefetch, "worker_init_fn": quiet_tokenizers} if workers else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
            self.loader = StatefulDataLoader(
                self.part,
                DOCUMENTS,
                num_workers=workers,
                collate_fn=Tokenizing(text, tokenizer),
                generator=torch.Generator(),  # and not the random numbers of the model
                **ahead,
            )
        self.epoch, self.tokens, self._batches = 0, 0, None  # tokens: of this epoch so far

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> np.ndarray:
        if self._batches is None:
            self._begin()
        while True:
            with blaming(dict(self.text.arguments), self.text.named_by):
                found = next(self._batches, None)
            if found is not None:
                tokens, wrong = found
                if wrong is not None:
                    raise ValueError(wrong)
                self.tokens += len(tokens)
                return tokens
            if not self.tokens:
                raise ValueError(
                    f"the shards of part {self.number} of {self.text.name} have no documents but those that are held "
                    "out: add text, or lower held_out_documents."
                )
            self.epoch, self.tokens = self.epoch + 1, 0
            self._begin()

    def _begin(self) -> None:
        """Read the epoch from its beginning, or from the state that was loaded."""
        order = stream(self.seed, "shards of a stream", self.epoch).integers(1, 2**31)
        self.part.set_epoch(int(order))  # `datasets` orders the shards by this number
        with blaming(dict(self.text.arguments), self.text.named_by):
            self._batches = iter(self.loader)

    def state_dict(self) -> dict:
        if self._batches is None:
            self._begin()
        return {"epoch": self.epoch, "tokens": self.tokens, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.tokens = state["epoch"], state["tokens"]
        self.loader.load_state_dict(state["loader"])
        self._begin()


class Lane:
    """The blocks of one part, shuffled in a buffer.

    buffer: blocks that wait to be drawn. part: the number of the part.
    """

    def __init__(self, reader: Reader, sequence_length: int, buffer: int, seed: int, part: int):
        self.reader, self.sequence_length, self.seed, self.part = reader, sequence_length, seed, part
        self._drawn, self._draw = (-1, np.empty(0, dtype=np.int64)), 0  # places that were drawn at once; draws so far
        self._rest = np.empty(0, dtype=np.int32)  # tokens that are not in a block yet
        self._buffer, self._filled = np.empty((buffer, sequence_length + 1), dtype=np.int32), 0

    def fill(self) -> None:
        """Read until the buffer is full."""
        while self._filled < len(self._buffer):
            self._buffer[self._filled] = self._next_block()
            self._filled += 1

    def take(self) -> np.ndarray:
        """A block of the buffer, (T + 1,), whose place gets the next block of the part."""
        draw, offset = divmod(self._draw, DRAWS)
        if self._drawn[0] != draw:
            random = stream(self.seed, "blocks of a stream", self.part, draw)
            self._drawn = draw, random.integers(len(self._buffer), size=DRAWS)
        place = self._drawn[1][offset]
        block = self._buffer[place].copy()
        self._buffer[place] = self._next_block()
        self._draw += 1
        return block

    def _next_block(self) -> np.ndarray:
        """Tokens (T + 1,), the last of which is the first of the next block."""
        length, parts = len(self._rest), [self._rest]
        while length <= self.sequence_length:
            parts.append(next(self.reader))
            length += len(parts[-1])
        tokens = np.concatenate(parts)
        self._rest = tokens[self.sequence_length :]
        return tokens[: self.sequence_length + 1]

    def state_dict(self) -> dict:
        """All that the next blocks depend on, of plain values and tensors."""
        tensors = {"rest": torch.from_numpy(self._rest.copy()), "buffer": torch.from_numpy(self._buffer.copy())}
        return {"draw": self._draw, "reader": self.reader.state_dict()} | tensors

    def load_state_dict(self, state: dict) -> None:
        self._draw, self._rest = state["draw"], state["rest"].numpy().copy()
        self._buffer[:], self._filled = state["buffer"].numpy(), len(self._buffer)
        self.reader.load_state_dict(state["reader"])


class StreamBatches(torch.utils.data.Dataset):
    """Batches of a stream with one loop count, as `TextBatches` makes them; item `step` must be the next one.

    The stream has as many parts as there are processes when it begins, or `parts`; each gives a batch the same number
    of blocks. Fewer processes go on with several parts each: together they see the same batches.

    Args:
        text: the split that is streamed.
        batch_size: blocks of the global batch, over all processes.
        buffer: blocks of each part that wait to be drawn.
        workers, prefetch: of the `Reader` of each part.
        parts: of the stream.

    Raises:
        ValueError: as `Reader`, for a batch size that does not divide, and for parts that do not.
    """

    def __init__(
        self,
        text: StreamedText,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        batch_size: int,
        seed: int,
        depth: DepthSampler,
        *,
        rank: int = 0,
        world: int = 1,
        buffer: int = 1024,
        workers: int = 0,
        prefetch: int = 2,
        parts: int | None = None,
    ):
        check_share(batch_size, rank, world)
        self.text, self.tokenizer, self.sequence_length = text, tokenizer, sequence_length
        self.batch_size, self.seed, self.depth, self.rank, self.world = batch_size, seed, depth, rank, world
        self.buffer, self.workers, self.prefetch = buffer, workers, prefetch
        self.step = 0  # the next
        self.parts = parts or world
        self.lanes: list[Lane] = []  # of this process, once it has begun

    def begin(self, states: Sequence[dict] = ()) -> None:
        """Read until the first batch can be drawn, which finds most mistakes in the data before the first update.

        states: what every process kept (`state_dict`), to go on from; none to begin.
        """
        if states:
            self.parts, self.step = states[0]["parts"], states[0]["step"]
        if self.parts % self.world:
            raise ValueError(
                f"the stream has {self.parts} parts, which {self.world} processes cannot share equally: start as many "
                "as divide it, set data.parts when a run begins, or tokenise the text first by `looped tokenize`."
            )
        if self.batch_size % self.parts:
            raise ValueError(f"batch_size must be a multiple of the {self.parts} parts, got {self.batch_size}.")
        kept = {part: lane for state in states for part, lane in state["lanes"].items()}
        self.lanes = [self._lane(part) for part in range(self.rank, self.parts, self.world)]
        for lane in self.lanes:
            if kept:
                lane.load_state_dict(kept[lane.part])
            lane.fill()

    def _lane(self, part: int) -> Lane:
        reader = Reader(
            self.text, self.tokenizer, self.seed,
            part=part, parts=self.parts, workers=self.workers, prefetch=self.prefetch,
        )  # fmt: skip
        return Lane(reader, self.sequence_length, self.buffer, self.seed, part)

    def chosen(self, step: int) -> np.ndarray:
        """None, (0,): the documents of a stream have no numbers."""
        return np.zeros(0, dtype=np.int64)

    def __getitem__(self, step: int) -> dict:
        if step != self.step:
            raise IndexError(f"a stream is read in order: step {self.step} is next, got {step}.")
        if not self.lanes:
            self.begin()
        blocks = [lane.take() for lane in self.lanes for _ in range(self.batch_size // self.parts)]
        tokens = torch.from_numpy(np.stack(blocks).astype(np.int64))
        self.step += 1
        rows = {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].contiguous()}
        return rows | {"num_loops": self.depth(step), "num_labels": self.batch_size * self.sequence_length}

    def state_dict(self) -> dict:
        """All that the next batches of this process depend on, of plain values and tensors."""
        if not self.lanes:
            self.begin()
        lanes = {lane.part: lane.state_dict() for lane in self.lanes}
        return {"step": self.step, "parts": self.parts, "lanes": lanes}
