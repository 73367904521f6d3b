"""95 % intervals: the bootstrap for means of many items, Wilson's and Newcombe's for shares, Student's t for seeds."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np

RESAMPLES = 10_000


def bootstrap_intervals(gains: np.ndarray, seed: int = 0) -> list[tuple[float, float]]:
    """(low, high) for each of M means over the same N items, by the bootstrap (Efron 1979).

    Args:
        gains: (M, N). Each resample draws N items with replacement, the same items for all M.
    """
    rng, items = np.random.default_rng(seed), gains.shape[1]
    means = np.stack([gains[:, rng.integers(items, size=items)].mean(1) for _ in range(RESAMPLES)])
    return [(float(low), float(high)) for low, high in np.quantile(means, [0.025, 0.975], 0).T]


def wilson_interval(accuracy: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of the share `accuracy` of `n` trials (Wilson 1927); inside [0, 1], and not empty at 0 or 1."""
    centre = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    # At 0 and 1 rounding may put the share outside its interval, and an error bar would get a negative length.
    return max(0.0, min(accuracy, centre - half)), min(1.0, max(accuracy, centre + half))


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """(low, high) of the share of successes `after` minus the share `before`, over the same trials.

    Newcombe 1998, method 10: it joins Wilson's intervals of the two shares by their correlation, and is not empty if
    no trial changed.
    """
    n = len(before)
    (first, low, high), (second, lower, higher) = (
        (share, *wilson_interval(share, n)) for share in (sum(before) / n, sum(after) / n)
    )
    both = sum(b and a for b, a in zip(before, after, strict=True))
    # both x neither - only before x only after, with Newcombe's correction if that is positive
    excess = both * (n - sum(before) - sum(after) + both) - (sum(before) - both) * (sum(after) - both)
    if excess > 0:
        excess = max(excess - n / 2, 0)
    spread = math.sqrt(sum(before) * (n - sum(before)) * sum(after) * (n - sum(after)))
    phi = excess / spread if spread else 0.0

    def half(one: float, two: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * two + two * two, 0.0))

    change = second - first
    return change - half(second - lower, high - first), change + half(higher - second, first - low)


# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of the 95 % t-interval; for one value, all three are the value."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, mean, mean
    freedom = len(values) - 1
    half = (T[freedom - 1] if freedom <= len(T) else t_quantile(freedom)) * stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def t_quantile(freedom: int, z: float = 1.959964) -> float:
    """Quantile of Student's t from the quantile `z` of the normal (Cornish-Fisher); right to three digits for
    `freedom` >= 10."""
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
