"""Measures of sampled molecules: validity, uniqueness, novelty, diversity, Frechet ChemNet distance, faults."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_builders.molecules import rdkit_chem
from looplab.runs.intervals import wilson_interval

from .chemnet import frechet_distance, statistics_of
from .smiles import EXCLUSIVE, LABELS, canonical_or_none, exclusive_class, faults

BITS = 1024


def known_among(smiles: Sequence[str], train: datasets.Dataset) -> int:
    """How many of the distinct `smiles` are in the training split."""
    column = train.with_format("arrow")[:]["text"]
    return pc.sum(pc.is_in(pa.array(smiles, pa.string()), value_set=column.combine_chunks())).as_py() or 0


def fingerprints(smiles: Sequence[str]) -> np.ndarray:
    """Morgan fingerprints of radius 2, (N, 1024) zeros and ones."""
    chem = rdkit_chem()
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=BITS)
    return np.stack([generator.GetFingerprintAsNumPy(chem.MolFromSmiles(text)) for text in smiles]).astype(np.float32)


def internal_diversity(bits: np.ndarray) -> tuple[float, list[float]]:
    """1 - mean Tanimoto similarity over all pairs of N >= 2 fingerprints (N, bits), and its 95 % interval.

    The mean over pairs is a U-statistic. Its variance is 4 / N times the variance of the fingerprints' own means over
    their pairs (Hoeffding 1948).
    """
    count, sizes = len(bits), bits.sum(1)
    means = np.empty(count)
    for start in range(0, count, 1000):
        shared = bits[start : start + 1000] @ bits.T
        union = sizes[start : start + 1000, None] + sizes - shared
        similarity = np.where(union > 0, shared / np.maximum(union, 1), 1.0)
        means[start : start + 1000] = (similarity.sum(1) - 1) / (count - 1)  # without itself
    diversity = 1 - means.mean()
    half = 1.96 * 2 * means.std() / count**0.5
    return float(diversity), [float(diversity - half), float(diversity + half)]


def share(count: int, total: int) -> dict:
    """{"share": count / total, "interval": Wilson's}; both are None if `total` is 0."""
    if not total:
        return {"share": None, "interval": None}
    return {"share": count / total, "interval": list(wilson_interval(count / total, total))}


def measure(rows: Sequence[dict], train: datasets.Dataset, reference=None) -> dict:
    """The measures of samples, which evaluation.py explains.

    n; validity, uniqueness, novelty and diversity as {"share", "interval"}; fcd; mean_length, characters of a valid
    SMILES; faults and exclusive, name -> {"share", "interval"} of all samples.

    Args:
        rows: samples of `write_molecules`.
        train: the training split, for novelty.
        reference: `statistics_of` held-out molecules; fcd is None without it.
    """
    canonical = [canonical_or_none(row["smiles"]) if row["finished"] else None for row in rows]
    valid = [smiles for smiles in canonical if smiles is not None]
    unique = sorted(set(valid))
    labels = Counter(label for row in rows for label in faults(row["smiles"], row["finished"]))
    classes = Counter(exclusive_class(row["smiles"]) for row in rows)
    measured = {
        "n": len(rows),
        "validity": share(len(valid), len(rows)),
        "uniqueness": share(len(unique), len(valid)),
        "novelty": share(len(unique) - (known_among(unique, train) if unique else 0), len(unique)),
        "diversity": {"share": None, "interval": None},
        "fcd": None,
        "mean_length": fmean(map(len, valid)) if valid else None,
        "faults": {label: share(labels[label], len(rows)) for label in LABELS},
        "exclusive": {name: share(classes[name], len(rows)) for name in EXCLUSIVE},
    }
    if len(unique) > 1:
        diversity, interval = internal_diversity(fingerprints(unique))
        measured["diversity"] = {"share": diversity, "interval": interval}
    if reference is not None and len(valid) > 1:
        measured["fcd"] = frechet_distance(*reference, *statistics_of(valid))
    return measured
