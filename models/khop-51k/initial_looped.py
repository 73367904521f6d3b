"""Initial values that a module sets itself, after transformers has set those of its linears and embeddings."""

from abc import ABC, abstractmethod


class SetsInitialValues(ABC):
    """A module that sets values of its own when a model is made."""

    @abstractmethod
    def initialize(self) -> None:
        """Set them, by `transformers.initialization`: values that were loaded stay as they are."""
