"""The sections of a recipe that belong to its task: `data`, and `curriculum`.

A task has a class for each, so that a field of another task is unknown to it. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict

from data_builders.fields import number

if TYPE_CHECKING:
    from datasets import DatasetDict


@strict
@dataclass
class Data:
    """What the data of every task have."""

    task: str
    seed: int = number(0, at_least=0)
    overrides: dict = field(default_factory=dict)  # fields of the builder's config

    def check(self, init_from: str | None) -> None:
        """ValueError for fields that do not go together, or not with the recipe's `init_from`."""
        for name in self.overrides.keys() & {"seed", "files"}:
            if vars(self).get(name):
                raise ValueError(f"data.{name} and data.overrides.{name} name the same thing: leave one of them out.")

    def load(self) -> "DatasetDict":
        """The splits, built into the `datasets` cache on first use."""
        raise NotImplementedError


@strict
@dataclass
class Curriculum:
    """Stages of training. There are none: a task with stages has a subclass with their fields."""

    def check(self) -> None:
        """ValueError for fields that do not go together."""
