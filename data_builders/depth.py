"""Sampled depth: the loop count of each training batch, drawn anew."""

import math
from typing import Literal

import numpy as np

from .fields import MOST_LOOPS, Range
from .seeding import stream

# Nodes of the Gauss-Hermite rule over the log-normal rate: with 64 the mean is right to about 1e-12 for sigma <= 1.
NODES = 64
# Depths, and hop counts, are drawn for this many updates at once.
UPDATES_AT_ONCE = 4096


class DepthSampler:
    """`sampler(step)` is the loop count of update `step`; it depends on (seed, step) only.

    kind                 draws                                                       takes
    fixed                `mean` loops                                                mean
    uniform              any of minimum .. maximum                                   minimum, maximum
    poisson              clip(Poisson(rate), minimum, maximum)                       rate or mean, minimum, maximum
    lognormal_poisson    as poisson, but the rate is log-normal: mean `rate`,        the same, and sigma
                         sd of its logarithm `sigma` (Geiping et al. 2025, arXiv 2502.05171)

    The poisson sampler with rate 4, minimum 2 and maximum 8 is that of Kohli et al. 2026 (arXiv 2604.07822): mean
    4.08, P(2) = 24 %, P(8) = 5 %. Give `mean` instead of `rate` to fix the mean *after* clipping; the rate is then
    solved for.

    depths (M,) and probabilities (M,) are the distribution, `expected` its exact mean in loops.
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
        self._drawn = (-1, self.depths)  # the draw made last: its number, and its depths (UPDATES_AT_ONCE,)

    def __call__(self, step: int) -> int:
        """Loop count of update `step`."""
        draw, offset = divmod(step, UPDATES_AT_ONCE)
        if self._drawn[0] != draw:
            random = stream(self.seed, "depths of steps", draw)
            self._drawn = draw, random.choice(self.depths, size=UPDATES_AT_ONCE, p=self.probabilities)
        return int(self._drawn[1][offset])

    def _clipped_poisson(self, rate: float, sigma: float) -> np.ndarray:
        """Probability (M,) of each depth; with sigma 0 the distribution is the plain Poisson, clipped."""
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
        """The rate that gives `mean` loops after clipping, found by bisection: the mean grows with the rate."""
        if not self.depths[0] < mean < self.depths[-1]:
            raise ValueError(f"mean {mean} must lie between minimum {self.depths[0]} and maximum {self.depths[-1]}.")
        low, high = 0.0, float(self.depths[-1])
        while self._clipped_poisson(high, sigma) @ self.depths < mean:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self._clipped_poisson(middle, sigma) @ self.depths < mean else (low, middle)
        return high
