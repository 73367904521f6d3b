"""Rows that know a digest of themselves, because reading all of them would take too long."""

from abc import ABC, abstractmethod


class Digested(ABC):
    """A split that is told apart from others by `digest`, and not row by row."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """The same for the same rows."""
