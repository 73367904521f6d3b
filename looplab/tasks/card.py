"""What every model card is made of."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult

from looplab.runs.folder import Run

from .data import Data

MOST_LOOPS_SHOWN = 5


@dataclass(frozen=True)
class Names:
    """What a card calls things: the repositories (None where there is none) and the licences, as the Hub spells them.

    The licence of the data may be another one than the model's. `base_model` is the model on the Hub that the run
    started from.
    """

    model_id: str
    licence: str
    dataset_id: str | None = None
    data_licence: str | None = None
    base_model: str | None = None


class Card(ABC):
    """What is said of one run on the model's page.

    Attributes:
        Data: class of the recipe's data section.
        template: file of hub_cards/, model_card.md or one that extends it.
        metrics: names of what is measured, as the Hub spells them.
        tags: of the task, by which the Hub finds the model.
    """

    Data: type[Data]
    template: str = "model_card.md"
    metrics: Sequence[str]
    tags: Sequence[str] = ()

    @abstractmethod
    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """The model-index, lines of `result`; ValueError for a run that was not evaluated."""

    def values(self, run: Run) -> dict:
        """What the template asks for beyond `publish.cards.common_values`: `limit` is how many rows were measured at
        most, None for all, and `limit_of` says what rows they are."""
        return {"limit": None}

    def result(self, run: Run, names: Names, metric: str, name: str, value: float, arguments: dict) -> EvalResult:
        """One line of the model-index; the measured data are those of the run's test split."""
        preset, _ = self.Data.of(run).preset()
        return EvalResult(
            task_type="text-generation",
            dataset_type=names.dataset_id or run.task(),
            dataset_name=run.task(),
            dataset_config=preset,
            dataset_split="test",
            metric_type=metric,
            metric_name=name,
            metric_value=value,
            metric_args=arguments,
        )


def spread(loops: set[int]) -> tuple[int, ...]:
    """At most `MOST_LOOPS_SHOWN` of the loop counts, the least and the largest among them."""
    ordered = sorted(loops)
    if len(ordered) <= MOST_LOOPS_SHOWN:
        return tuple(ordered)
    last = MOST_LOOPS_SHOWN - 1
    return tuple(ordered[round(i * (len(ordered) - 1) / last)] for i in range(MOST_LOOPS_SHOWN))


def between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
