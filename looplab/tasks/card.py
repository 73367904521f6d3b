"""What every model card is made of."""

from dataclasses import dataclass

from huggingface_hub import EvalResult

from looplab.runs.folder import Run

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


def result(run: Run, names: Names, metric: str, name: str, value: float, arguments: dict) -> EvalResult:
    """One line of the model-index; the measured data are those of the run's test split."""
    _, config, _ = run_data(run)
    return EvalResult(
        task_type="text-generation",
        dataset_type=names.dataset_id or run.task(),
        dataset_name=run.task(),
        dataset_config=config,
        dataset_split="test",
        metric_type=metric,
        metric_name=name,
        metric_value=value,
        metric_args=arguments,
    )


def run_data(run: Run) -> tuple[str, str, dict]:
    """Task, config and fields that `data_builders.task_builder` made the run's data from."""
    task, data = run.task(), run.recipe()["data"]
    overrides, files = {"seed": data["seed"]} | data["overrides"], data.get("files")
    if files is not None:
        return task, "files", overrides | {"files": files}
    if "dataset" in overrides:
        return task, "files", overrides
    return task, "corpus" if task == "text" else data["config"], overrides


def spread(loops: set[int]) -> tuple[int, ...]:
    """At most `MOST_LOOPS_SHOWN` of the loop counts, the least and the largest among them."""
    ordered = sorted(loops)
    if len(ordered) <= MOST_LOOPS_SHOWN:
        return tuple(ordered)
    last = MOST_LOOPS_SHOWN - 1
    return tuple(ordered[round(i * (len(ordered) - 1) / last)] for i in range(MOST_LOOPS_SHOWN))


def between(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
