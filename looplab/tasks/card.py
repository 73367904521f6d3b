"""`Card`, the base of the model card of a task."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult

from looplab.runs.folder import Run

from .data import Data

MOST_LOOPS_SHOWN = 5


@dataclass(frozen=True)
class Names:
    """Names on a card: repositories and licences, as the Hub spells them; None for what there is not or nobody knows.

    model_id: what `from_pretrained` is given, a repository or a folder.
    base_model: the model on the Hub that the run started from.
    revision: of the model's repository, in which weights and code are those of the card.
    """

    model_id: str
    licence: str | None
    dataset_id: str | None = None
    data_licence: str | None = None
    base_model: str | None = None
    space_id: str | None = None
    revision: str | None = None


class Card(ABC):
    """The card of one run.

    Attributes:
        Data: class of the recipe's section `data`.
        template: file of hub_cards/, model_card.md or one that extends it.
        metrics: names of the measures, as the Hub spells them.
        tags: of the task, on the Hub.
        papers: arXiv numbers of what the task comes from, entries of hub_cards/papers.bib.
    """

    Data: type[Data]
    template: str = "model_card.md"
    metrics: Sequence[str]
    tags: Sequence[str] = ()
    papers: Sequence[str] = ()

    @abstractmethod
    def results(self, run: Run, names: Names) -> list[EvalResult]:
        """The model-index, made with `result`: the measures at one loop count, since a card shows all others in its
        tables. Raises ValueError for a run that was not evaluated."""

    @abstractmethod
    def values(self, run: Run) -> dict:
        """The values of the template beyond `publish.cards.common_values`, or in place of those.

        numbers: three pairs (number, what it is). limit: the most rows that were measured, None for all. limit_of:
        what these rows are.
        """

    def result(self, run: Run, names: Names, metric: str, name: str, value: float, arguments: dict) -> EvalResult:
        """One entry of the model-index, measured on the run's test split.

        Args:
            metric, name: the metric for the Hub, and for the reader.
            arguments: of the measurement, such as num_loops.
        """
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


def loops_shown(loops: set[int]) -> tuple[int, ...]:
    """At most `MOST_LOOPS_SHOWN` of the loop counts, from the smallest to the largest."""
    from looplab.instruments.drawing import spread

    return tuple(spread(sorted(loops), MOST_LOOPS_SHOWN))


def between(low: int, high: int) -> str:
    """The range as text: "3", or "1 to 8"."""
    return str(low) if low == high else f"{low} to {high}"
