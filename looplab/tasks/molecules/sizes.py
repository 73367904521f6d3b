"""How molecules are written, and how many at once: what results depend on, and how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; `top_k` 0 is no limit."""

    name: str
    temperature: float
    top_k: int

    def arguments(self) -> dict:
        """What `generate` takes."""
        return {"temperature": self.temperature, "top_k": self.top_k}


SAMPLINGS = (Sampling("T0.8-top40", 0.8, 40), Sampling("T1.0", 1.0, 0))


@dataclass(frozen=True)
class Sizes:
    """Numbers of molecules, unless they are named tokens or thresholds.

    batch: written at once, and seeded alike
    max_tokens: of a molecule
    reference: of the test split, that the Frechet ChemNet distance is to; 0 for no distance
    decoded: batches in which teacher-forced tokens are timed
    timed: batches in which `generate` is timed
    fit_tokens: tokens that a fresh head is fitted on
    thresholds: of each halting rule that are tried; None for all
    """

    batch: int = 500
    max_tokens: int = 120
    reference: int = 10_000
    decoded: Sequence[int] = (1, 16)
    timed: Sequence[int] = (1, 100)
    fit_tokens: int = 300_000
    thresholds: int | None = None
