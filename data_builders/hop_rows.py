"""What the hop tasks have in common: the columns of a row, the random streams, the checks of a config.

e4 r1 r0 <ans>  ->  e9        start at entity 4, follow relation 1, then relation 0: which entity is it?
"""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "hops": datasets.Value("int32"),
        "split_kind": datasets.Value("string"),
        "path": datasets.List(datasets.Value("int32")),
    }
)


def hop_rows(relations: np.ndarray, path: np.ndarray, split_kind: str) -> Iterator[dict]:
    """Rows of one hop count: relations (N, k) followed in turn, path (N, k + 1) the entities from start to answer."""
    for relation_ids, entities in zip(relations.tolist(), path.tolist(), strict=True):
        yield {
            "text": " ".join([f"e{entities[0]}", *(f"r{relation}" for relation in relation_ids)]),
            "answer": f"e{entities[-1]}",
            "hops": len(relation_ids),
            "split_kind": split_kind,
            "path": entities,
        }


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """The random numbers of one purpose: independent of those of every other, and of what was drawn before."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *key)))


def source_hash(*modules: str) -> str:
    """Fingerprint of the source files that make the data, so that the cache of an older generator is never reused."""
    return hashlib.sha256(b"".join(Path(module).read_bytes() for module in (__file__, *modules))).hexdigest()[:16]


def check_counts(config: datasets.BuilderConfig, **minimum: int):
    """ValueError unless each named field of `config` is a whole number of at least its minimum."""
    for field in fields(config):
        value = vars(config)[field.name]
        if field.name in minimum and (type(value) is not int or value < minimum[field.name]):
            raise ValueError(f"{field.name} must be a whole number >= {minimum[field.name]}, got {value!r}.")
