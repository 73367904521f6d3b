"""Loop counts of training batches, drawn anew for every batch."""

import math
from typing import Literal

import numpy as np

from .fields import MOST_LOOPS, Range
from .seeding import stream

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
