"""Token shards: text that `looped tokenize` tokenised once, and that a run maps into memory.

    FOLDER/tokens.json              what they were made of; of every shard its split, documents, tokens and digest
    FOLDER/tokenizer/               the tokenizer
    FOLDER/train-00000.arrow        documents, a list of ids each: of 16 bits for up to 65,536 words, otherwise of 32
    FOLDER/validation.arrow         the documents that are held out, as are those of test.arrow

A shard appears whole, and then tokens.json names it: an interrupted call goes on with the shards that it lacks.
`datasets.Dataset.from_file` reads a shard.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .digested import Digested
from .epochs import WindowedEpochs
from .files import find_files
from .streams import DOCUMENTS, StreamedText, load_streams
from .text_batches import Encoder, TextBlocks, TokenStream, UnknownToken

NOTE, TOKENIZER, LOCK = "tokens.json", "tokenizer", "lock"
FORMAT = 1
SHARDS = 64  # that a source of fewer files is cut into, if its files can be cut
TOKENS = 2**22  # of a record batch: a run keeps a few hundred bytes for each of them
SMALL = 2**16  # words that fit ids of 16 bits


@dataclass(frozen=True)
class TokenSplit(Digested):
    """One split of a folder of token shards.

    Args:
        name: of the split.
        rows: the documents, mapped into memory.
        sha256: of the digests of its shards.
        tokenizer: the digest of the tokenizer.
    """

    name: str
    rows: datasets.Dataset
    sha256: str
    tokenizer: str

    @property
    def split(self) -> str:
        """The name, as a split of `datasets` has it."""
        return self.name

    @property
    def digest(self) -> str:
        return self.sha256


class TokenBlocks(TextBlocks):
    """Blocks of documents that are tokens already, as `TextBlocks` are of text.

    What a process keeps in memory does not grow with the number of tokens, but for a few bytes for every million.
    """

    def read(self, split: TokenSplit, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
        return TokenStream.of_column(split.rows.with_format("arrow")[:]["input_ids"])

    def epochs(self, batch_size: int, seed: int) -> WindowedEpochs:
        return WindowedEpochs(len(self), seed, "blocks of windows")


def load_tokens(folder: Path) -> dict[str, TokenSplit]:
    """The splits train, validation and test of a folder that `write_tokens` filled.

    Raises:
        ValueError: there are no token shards, some of them are missing, or one is damaged.
    """
    note = read_note(folder)
    if not note:
        raise ValueError(f"there are no token shards in {folder}: write them by `looped tokenize`.")
    if not note["complete"]:
        raise ValueError(
            f"{folder} lacks token shards, since `looped tokenize` was interrupted: run it again to go on."
        )
    splits = {}
    for split in ("train", "validation", "test"):
        shards = {name: shard for name, shard in sorted(note["shards"].items()) if shard["split"] == split}
        rows = datasets.concatenate_datasets([open_shard(folder / name, shard) for name, shard in shards.items()])
        sha256 = hashlib.sha256("".join(shard["sha256"] for shard in shards.values()).encode()).hexdigest()
        splits[split] = TokenSplit(split, rows, sha256, note["tokenizer"])
    return splits


def open_shard(path: Path, shard: Mapping) -> datasets.Dataset:
    """The documents of a shard. Raises ValueError if it is not what was written."""
    remedy = "run `looped tokenize` again, which writes this shard anew."
    if not path.is_file():
        raise ValueError(f"{path} is missing: {remedy}")
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and had {shard['bytes']} when it was written: {remedy}"
        )
    try:
        return datasets.Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}): delete it, and {remedy}") from error


# Ending of a file -> how `datasets` reads it.
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"}


def named_source(sources: list[str], name: str | None = None, split: str = "train") -> dict:
    """Arguments of `load_dataset` for what a user names: files and globs of one kind, or a data set of the Hub.

    name: of the part of a data set. A file of plain text is one document.

    Raises:
        MissingData: a file is not there.
        ValueError: files of several kinds, or of none.
    """
    if len(sources) == 1 and not any(sources[0].removesuffix(".gz").endswith(kind) for kind in KINDS):
        return {"path": sources[0], "split": split} | ({} if name is None else {"name": name})
    packed = tuple(f"{kind}{end}" for kind in KINDS for end in ("", ".gz"))
    files = [str(path) for path in find_files("the files to tokenise", sources, packed)]
    kinds = sorted({KINDS[Path(file.removesuffix(".gz")).suffix] for file in files})
    if len(kinds) > 1:
        raise ValueError(f"the files to tokenise are of several kinds, {' and '.join(kinds)}: name those of one.")
    if name is not None or split != "train":
        raise ValueError("files have no parts and no splits of a data set: leave --name and --split out.")
    whole = {"sample_by": "document"} if kinds == ["text"] else {}
    return {"path": kinds[0], "data_files": {"train": files}, "split": "train"} | whole


def read_note(folder: Path) -> dict:
    """tokens.json, {} if there is none. Raises ValueError if it is damaged."""
    path = folder / NOTE
    if not path.is_file():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(note, dict) or note["format"] != FORMAT:
            raise ValueError("it is of another version")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete {folder}, and write it again by `looped tokenize`."
        ) from error
    return note


def write_note(folder: Path, note: Mapping) -> None:
    partial = folder / f".{NOTE}.partial"
    partial.unlink(missing_ok=True)  # it may be a link
    partial.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / NOTE)


def write_tokens(
    arguments: Mapping,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    folder: Path,
    *,
    column: str = "text",
    validation_split: str | None = None,
    test_split: str | None = None,
    held_out_documents: int = 1000,
    processes: int | None = None,
) -> dict:
    """Tokenise a data set into a folder, or go on with it; returns what tokens.json holds.

    Args:
        arguments and the fields below it: as `load_streams` takes them.
        tokenizer_digest: tells tokenizers apart.
        processes: as many as there are cores unless given, and at most one for each shard.

    Raises:
        ValueError: as `load_streams`; the folder holds something else, or tokens of another source.
    """
    splits = load_streams(
        arguments,
        column=column,
        validation_split=validation_split,
        test_split=test_split,
        held_out_documents=held_out_documents,
    )
    text = splits["train"]
    number = min(text.cut(SHARDS).num_shards, max(SHARDS, text.shards.num_shards))
    small = len(tokenizer) <= SMALL
    made_of = {
        "dataset": {name: value for name, value in arguments.items() if name != "streaming"},
        "column": column,
        "validation_split": validation_split,
        "test_split": test_split,
        "held_out_documents": held_out_documents,
        "source": text.digest,
        "pieces": number,
        "tokenizer": tokenizer_digest,
    }
    with claimed(folder):
        note = begun(folder, made_of | {"ids": "uint16" if small else "int32"}, tokenizer)
        return complete(folder, note, splits, tokenizer, processes)


def complete(
    folder: Path,
    note: dict,
    splits: Mapping[str, StreamedText | datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
    processes: int | None,
) -> dict:
    """Write the shards that the note of a folder lacks; returns the note."""
    text, number = splits["train"], note["pieces"]
    writer = ShardWriter(folder, tokenizer, note["ids"])
    for split in ("test", "validation"):
        if f"{split}.arrow" not in note["shards"]:
            note["shards"][f"{split}.arrow"] = writer.write(f"{split}.arrow", split, splits[split]["text"])
            write_note(folder, note)
    names = {f"train-{index:05d}.arrow": index for index in range(number)}
    missing = {name: index for name, index in names.items() if name not in note["shards"]}
    with tqdm(
        desc="Tokenize",
        unit="token",
        unit_scale=True,
        initial=sum(shard["tokens"] for shard in note["shards"].values()),
    ) as bar:
        bar.set_postfix_str(f"{number - len(missing)} of {number} shards")
        for name, shard in written(text, writer, missing, number, processes, bar):
            note["shards"][name] = shard
            write_note(folder, note)
            bar.set_postfix_str(f"{len(note['shards']) - 2} of {number} shards")
    if not sum(shard["tokens"] for shard in note["shards"].values() if shard["split"] == "train"):
        raise ValueError(f"{text.name} has no documents but those that are held out: add text, or hold out fewer.")
    note["complete"] = True
    write_note(folder, note)
    return note


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the block, no other process writes to a folder, which is made if need be.

    Raises:
        ValueError: another process writes there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout as error:
            raise ValueError(f"another process writes to {folder}: wait for it, or name a new folder.") from error
        yield


def begun(folder: Path, made_of: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The note of a folder that tokens of this source are written to: the one that is there, or a new one.

    Shards that are not as they were written are taken out of the note, so that they are written again.
    """
    note = read_note(folder)
    if not note:
        if {path.name for path in folder.iterdir()} - {LOCK, TOKENIZER}:
            raise ValueError(f"{folder} holds something else than token shards: name a new folder.")
        note = {"format": FORMAT, "complete": False, **made_of, "shards": {}}
        tokenizer.save_pretrained(folder / TOKENIZER)  # tokens.json comes after it
        write_note(folder, note)
    differ = [name for name, value in made_of.items() if note.get(name) != value]
    if differ:
        was, now = note.get(differ[0]), made_of[differ[0]]
        raise ValueError(f"{folder} holds tokens of something else ({differ[0]}: {was} -> {now}): name a new folder.")
    kept = {}
    for name, shard in note["shards"].items():
        path = folder / name
        if path.is_file() and path.stat().st_size == shard["bytes"]:
            kept[name] = shard
    return note | {"shards": kept, "complete": False}


class ShardWriter:
    """Writes shards into a folder, each at once or not at all.

    ids: the type of ids, for `datasets`.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, ids: str):
        self.folder, self.encoder, self.ids = folder, Encoder(tokenizer), ids

    def write(self, name: str, split: str, texts: Iterable[str], place: str = "", count=lambda tokens: None) -> dict:
        """Write a shard; returns its entry in tokens.json.

        Args:
            place: where the texts are, for messages.
            count: is told the number of tokens as they are written.
        """
        schema = datasets.Features({"input_ids": datasets.List(datasets.Value(self.ids))}).arrow_schema
        partial, entry = self.folder / f".{name}.partial", {"split": split, "documents": 0, "tokens": 0}
        partial.unlink(missing_ok=True)  # what a kill has left
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for lengths, tokens in self.batches(texts, place or split):
                offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                column = pa.ListArray.from_arrays(
                    pa.array(offsets), pa.array(tokens, type=schema.field(0).type.value_type)
                )
                stream.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))
                entry["documents"] += len(lengths)
                entry["tokens"] += len(tokens)
                count(len(tokens))
        with open(partial, "rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        entry["bytes"] = partial.stat().st_size
        partial.replace(self.folder / name)
        return entry

    def batches(self, texts: Iterable[str], place: str) -> Iterator[tuple[list[int], np.ndarray]]:
        """(length of each document, their tokens one after the other), TOKENS of them or a few more at a time."""
        texts, lengths, parts = iter(texts), [], []
        while some := list(islice(texts, DOCUMENTS)):
            try:
                found = self.encoder(some)
            except UnknownToken as error:
                raise ValueError(error.sentence(place)) from error
            lengths += map(len, found)
            parts += [np.array(ids, dtype=self.ids) for ids in found]
            if sum(map(len, parts)) >= TOKENS:
                yield lengths, np.concatenate(parts)
                lengths, parts = [], []
        if parts:
            yield lengths, np.concatenate(parts)


def written(
    text: StreamedText, writer: ShardWriter, missing: Mapping[str, int], number: int, processes: int | None, bar: tqdm
) -> Iterator[tuple[str, dict]]:
    """Write the shards that are missing, name -> its number of `number`; yields each when it is there."""
    processes = min(processes or os.cpu_count() or 1, len(missing))
    if processes < 2:  # `tokenizers` has threads of its own
        for name, index in missing.items():
            yield name, writer.write(name, "train", piece(text, number, index), text.name, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    words = (replace(text), writer.folder, writer.ids, number, counter)
    with ProcessPoolExecutor(processes, context, initializer=begin_process, initargs=words) as pool:
        waiting = {pool.submit(write_piece, name, index): name for name, index in missing.items()}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n + bar.initial)
                for future in done:
                    yield waiting.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def piece(text: StreamedText, number: int, index: int) -> Iterator[str]:
    """The documents of piece `index` of `number`."""
    return text.documents_of(text.cut(SHARDS).shard(number, index))


def begin_process(text: StreamedText, folder: Path, ids: str, number: int, counter) -> None:
    """Make what all shards of a process need, once."""
    global process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False)
    process = text, ShardWriter(folder, tokenizer, ids), number, counter


def write_piece(name: str, index: int) -> dict:
    """In a process: write one shard of the split train."""
    text, writer, number, counter = process

    def count(tokens: int) -> None:
        with counter.get_lock():
            counter.value += tokens

    return writer.write(name, "train", piece(text, number, index), text.name, count)
