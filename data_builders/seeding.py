"""Named random streams, and the fingerprints that tell `datasets` when a builder changed."""

import hashlib
import zlib
from pathlib import Path

import numpy as np

# Rows of one Arrow table: small enough for the progress bar to move, large enough to be fast.
TABLE_ROWS = 10_000


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A random generator for one `purpose` and `key`: other purposes and earlier draws do not change its numbers."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *key)))


def source_hash(*modules: str) -> str:
    """Fingerprint of the source files that make the data: when one of them changes, `datasets` builds the data anew.

    modules: the `__file__` of each source file; this file is always among them.
    """
    return hashlib.sha256(b"".join(Path(module).read_bytes() for module in (__file__, *modules))).hexdigest()[:16]
