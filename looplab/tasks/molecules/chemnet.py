"""Frechet ChemNet distance (Preuer et al. 2018, arXiv 1803.09518): how far samples are from real molecules.

    activations    (N, 512), output of the last LSTM layer of ChemNet
    statistics     mean (512,) and covariance (512, 512) of the activations
    distance       |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))

The network with its weights and its input encoding come from the package fcd_torch (MIT). The distance is computed
here, since the package uses functions that numpy and scipy are removing. The distance depends on the number of
molecules: compare equal numbers.
"""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from looplab.runs.writing import write_whole

BATCH = 256

Statistics = tuple[np.ndarray, np.ndarray]


def activations(smiles: Sequence[str]) -> np.ndarray:
    """ChemNet's activations (N, 512) for canonical SMILES."""
    from fcd_torch import FCD
    from fcd_torch.utils import SmilesDataset

    network, inputs = FCD(canonize=False).model, SmilesDataset(list(smiles), canonize=False)
    parts = []
    with torch.inference_mode():
        bar = tqdm(total=len(smiles), desc="ChemNet", unit="molecule", leave=False)
        for start in range(0, len(smiles), BATCH):
            rows = [torch.as_tensor(inputs[i]) for i in range(start, min(start + BATCH, len(smiles)))]
            parts.append(network(torch.stack(rows).transpose(1, 2).float()).numpy())
            bar.update(len(rows))
        bar.close()
    return np.concatenate(parts).astype(np.float64)


def statistics_of(smiles: Sequence[str]) -> Statistics:
    """Mean and covariance of the activations of canonical SMILES."""
    values = activations(smiles)
    return values.mean(0), np.cov(values.T)


def frechet_distance(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray) -> float:
    """The distance of two Gaussians. The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is
    symmetric."""
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_cov @ root).clip(0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(cov) + np.trace(other_cov) - 2 * cross)


def reference_statistics(test: datasets.Dataset, number: int) -> Statistics | None:
    """Statistics of a seeded sample of `number` molecules of a test split; they are kept beside its file in the
    `datasets` cache. None without fcd_torch, or for fewer than two molecules."""
    if importlib.util.find_spec("fcd_torch") is None or min(number, len(test)) < 2:
        return None
    path = Path(test.cache_files[0]["filename"]).parent / f"chemnet-{test._fingerprint}-{number}.npz"
    if not path.is_file():
        numbers = np.random.default_rng(0).permutation(len(test))[:number]
        mean, cov = statistics_of(test.select(np.sort(numbers))["text"][:])
        kept = io.BytesIO()
        np.savez(kept, mean=mean, cov=cov)
        write_whole(path, kept.getvalue())
    with np.load(path) as kept:
        return kept["mean"], kept["cov"]
