"""Trackers: where a run reports beside metrics.jsonl, through accelerate's `log_with`.

    project    the recipe's name without "_seedN", so that the seeds of one recipe lie in one project
    run        the recipe's name; a run that is resumed goes on in the same one, where the tracker allows it

A tracker gets every row of metrics.jsonl, nested fields as `gate.2`.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from looplab.runs.sections import flatten
from looplab.tasks.training import State

from .recipe import Recipe
from .run_folder import RunFolder

PACKAGES = {"comet_ml": "comet-ml"}  # tracker -> its package, where the two names differ


def check_trackers(names: list[str]) -> None:
    """ValueError for a tracker that accelerate does not know, or whose package is missing: it would be passed over."""
    known, installed = ["all", *LOGGER_TYPE_TO_CLASS], [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"trackers has no {name!r}; did you mean {near!r}? There are {', '.join(sorted(known))}.")
        if name in LoggerType.list() and name not in ["all", *installed]:
            raise ValueError(
                f"trackers: {name} is not installed: run `pip install {PACKAGES.get(name, name)}`, or leave it out; "
                "metrics.jsonl is always written."
            )


class Trackers:
    """The trackers of a run that begins or goes on.

    Args:
        state: before the next update.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, run: RunFolder, state: State):
        self.accelerator = accelerator
        accelerator.project_configuration.logging_dir = run.folder / "tracker"
        accelerator.init_trackers(
            re.sub(r"_seed\d+$", "", recipe.name),
            config={name: str(value) for name, value in flatten(asdict(recipe)).items()},
            init_kwargs=arguments_of(recipe.name, state.step),
        )

    def log(self, row: dict) -> None:
        """Report a row of metrics.jsonl."""
        values = flatten({name: value for name, value in row.items() if name != "step"})
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=row["step"])


def arguments_of(name: str, step: int) -> dict[str, dict]:
    """Tracker -> arguments that name its run, and go on with it after `step` updates."""
    resumes = step > 0
    return {
        "tensorboard": {"purge_step": step + 1} if resumes else {},  # what a killed run wrote beyond its checkpoint
        "trackio": {"name": name, "resume": "allow" if resumes else "never"},
        "wandb": {"name": name},
        "mlflow": {"run_name": name},
        "clearml": {"task_name": name},
        "swanlab": {"experiment_name": name},
    }


@contextmanager
def closed_trackers(accelerator: Accelerator) -> Iterator[None]:
    """After the block the trackers are closed, however it ends."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []
