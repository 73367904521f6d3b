"""Digests that tell weights, data and tokenizers apart."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from data_builders.digested import Digested

MAX_SOURCES = 1000  # with more source files than this, single files have no digests


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; it is read again only if its size or its time of change differs."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _tensors(path: str, size: int, changed: int) -> tuple[str, ...]:
    """A line per tensor of a safetensors file: name, dtype, shape, SHA-256 of its bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
        lines = []
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                if 8 + length + end > size:
                    raise ValueError(f"{path} is cut short")
                file.seek(8 + length + begin)
                lines.append(f"{name} {tensor['dtype']} {tensor['shape']} {_digest_of(file, end - begin)}\n")
    return tuple(lines)


def _digest_of(file, length: int) -> str:
    """SHA-256 of the next `length` bytes of an open file."""
    digest = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 2**24))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


def weights_of(folder: Path) -> str:
    """SHA-256 of the tensors saved in `folder`; it does not depend on how they are divided into files.

    Raises:
        ValueError: a file is damaged or missing.
    """
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        stats = [(folder / name).stat() for name in names]
        lines = [_tensors(str(folder / n), s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights in {folder} are damaged or missing ({error}): save them again.") from error
    return hashlib.sha256("".join(sorted(line for file in lines for line in file)).encode()).hexdigest()


def data_of(splits: Mapping) -> dict:
    """Digests of the rows of a `datasets.DatasetDict`.

    {"splits": {split: SHA-256 of its rows}, "sources": {file: SHA-256 of its rows}}; "sources" is empty if the rows do
    not name their files, or name more than MAX_SOURCES. A split that is `Digested` is not read.
    """
    digests, sources = {}, {}
    for split in sorted(splits):
        if isinstance(splits[split], Digested):
            digests[split] = splits[split].digest
            continue
        whole = hashlib.sha256()
        for rows in splits[split].iter(batch_size=10_000):
            whole.update(json.dumps(rows, sort_keys=True).encode())
            pairs = zip(rows.get("source", ()), texts_of(rows), strict=False)
            for source, group in groupby(pairs, key=lambda pair: pair[0]):
                if len(sources) <= MAX_SOURCES:
                    digest = sources.setdefault(source, hashlib.sha256())
                    digest.update(json.dumps([split, *(text for _, text in group)]).encode())
        digests[split] = whole.hexdigest()
    sources = sources if len(sources) <= MAX_SOURCES else {}
    return {"splits": digests, "sources": {name: digest.hexdigest() for name, digest in sources.items()}}


def texts_of(rows: dict[str, list]) -> list[str]:
    """What the rows of a batch say, a text each: the column text, or all columns but the place, as JSON."""
    names = sorted(rows.keys() - {"source", "line"})
    return rows.get("text") or [json.dumps(each) for each in zip(*(rows[name] for name in names), strict=True)]


def data_changes(before: dict, after: dict) -> str:
    """The difference between two results of `data_of`, in words; '' if there is none."""
    said = []
    for kind, noun in (("sources", "file"), ("splits", "split")):
        old, new = before[kind], after[kind]
        for word, names in (
            ("new", new.keys() - old.keys()),
            ("gone", old.keys() - new.keys()),
            ("changed", {name for name in old.keys() & new.keys() if old[name] != new[name]}),
        ):
            if names:
                shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                said.append(f"{word} {noun}{'s' if len(names) > 1 else ''}: {shown}")
        if said:
            break
    return "; ".join(said)


def tokenizer_of(tokenizer) -> str:
    """SHA-256 of all parts of a tokenizer but padding and truncation, which its last call changed."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    kept["ids"] = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def refuse_other_data(run: object, before: dict, after: dict) -> None:
    """Raise ValueError, with the difference, unless two results of `data_of` are equal. run: its folder or name."""
    changes = data_changes(before, after)
    if changes:
        raise ValueError(
            f"the data of {run} have changed since it began ({changes}): restore the files that its recipe names, "
            "say by --data.files where they are now, or train on the new files under another --name."
        )
