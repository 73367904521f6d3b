"""The sections of a recipe that belong to its task: `data` and `curriculum`.

A task has a class for each, so that a field of another task is unknown. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from huggingface_hub.dataclasses import strict

from data_builders.fields import number
from looplab.runs.folder import Run

if TYPE_CHECKING:
    from datasets import DatasetDict


@strict
@dataclass
class Data:
    """The fields of `data` that every task has."""

    task: str = "khop"  # what the run is trained and measured on; its choices are below
    seed: int = number(0, at_least=0)  # of what the builder draws
    overrides: dict = field(default_factory=dict)  # fields of the builder's config

    @classmethod
    def of(cls, run: Run) -> Self:
        """The section in a run's recipe. Fields that the task does not have are ignored, because older versions wrote
        the fields of all tasks into recipe.yaml."""
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in run.recipe()["data"].items() if name in names})

    def check(self, init_from: str | None) -> None:
        """Raise ValueError for fields that contradict each other or the recipe's `init_from`."""
        for name in self.overrides.keys() & {"seed", "files"}:
            if vars(self).get(name):
                raise ValueError(f"data.{name} and data.overrides.{name} name the same thing: leave one of them out.")

    def preset(self) -> tuple[str, dict]:
        """(preset of the builder `task`, fields in place of the preset's)."""
        return "default", {"seed": self.seed} | self.overrides

    def load(self, **changed) -> "DatasetDict":
        """The splits, built into the `datasets` cache on first use.

        Args:
            changed: fields of the builder, in place of those from `preset`.
        """
        from data_builders import load_task

        preset, fields = self.preset()
        return load_task(self.task, preset, **(fields | changed))


@strict
@dataclass
class Curriculum:
    """The section of a task without stages of training: it has no fields. A task with stages has a subclass."""

    def check(self) -> None:
        """Raise ValueError for fields that contradict each other."""
