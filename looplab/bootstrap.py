"""Intervals of means by the bootstrap (Efron 1979): items are drawn again with replacement, all rows alike."""

import numpy as np

RESAMPLES = 10_000


def bootstrap_intervals(gains: np.ndarray, seed: int = 0) -> list[tuple[float, float]]:
    """(M, N) values of N items -> for each of the M rows the interval that holds 95 % of the bootstrap means."""
    rng, items = np.random.default_rng(seed), gains.shape[1]
    means = np.stack([gains[:, rng.integers(items, size=items)].mean(1) for _ in range(RESAMPLES)])
    return [(float(low), float(high)) for low, high in np.quantile(means, [0.025, 0.975], 0).T]
