"""Sampling settings of molecules, and the sizes of measurements."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """A sampling setting: how the next token is drawn. top_k 0 means all tokens."""

    name: str
    temperature: float
    top_k: int

    def arguments(self) -> dict:
        """The arguments of `generate`."""
        return {"temperature": self.temperature, "top_k": self.top_k}


SAMPLINGS = (Sampling("T0.8-top40", 0.8, 40), Sampling("T1.0", 1.0, 0))


@dataclass(frozen=True)
class Sizes:
    """Sizes of measurements.

    Args:
        batch: molecules that are sampled together, with one seed.
        max_tokens: most tokens of a molecule.
        reference: test molecules that the Frechet ChemNet distance is measured to; 0 for no distance.
        decoded: batch sizes for teacher-forced decoding.
        timed: batch sizes for `generate`.
        fit_tokens: tokens that a fresh head is fitted on.
        thresholds: how many of each halting rule are tried; None for all.
    """

    batch: int = 500
    max_tokens: int = 120
    reference: int = 10_000
    decoded: Sequence[int] = (1, 16)
    timed: Sequence[int] = (1, 100)
    fit_tokens: int = 300_000
    thresholds: int | None = None
