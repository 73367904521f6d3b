"""The hop tasks by name: built into the `datasets` cache, or exported as a Hub data folder."""

import difflib
from dataclasses import fields

from datasets import BuilderConfig, DatasetDict, GeneratorBasedBuilder

from .khop import Khop

TASKS = {"khop": Khop}


def task_builder(name: str, config_name: str, **overrides) -> GeneratorBasedBuilder:
    """Builder of a task's preset, fields of its config replaced by `overrides`.

    Raises ValueError for an unknown task, preset or field, naming the nearest one, and for a value out of range.
    """
    if name not in TASKS:
        raise ValueError(_unknown("task", name, TASKS))
    task = TASKS[name]
    if config_name not in task.builder_configs:
        raise ValueError(_unknown(f"{name} config", config_name, task.builder_configs))
    preset = task.builder_configs[config_name]
    known = [field.name for field in fields(task.BUILDER_CONFIG_CLASS)[len(fields(BuilderConfig)) :]]
    for override in overrides:
        if override not in known:
            raise ValueError(_unknown(f"{name} field", override, known))
    # Fields that the preset has anyway must not give the same data a second cache folder.
    changed = {field: value for field, value in overrides.items() if value != vars(preset)[field]}
    return task(config_name=config_name, **changed)


def load_task(name: str, config_name: str, **overrides) -> DatasetDict:
    """Splits train, validation (the gate) and test of a task, from the `datasets` cache or built into it.

    `load_task("khop", "cpu", seed=1, train_hops=4)`. Raises ValueError as `task_builder`.
    """
    builder = task_builder(name, config_name, **overrides)
    builder.download_and_prepare()
    return builder.as_dataset()


def _unknown(what: str, name: str, known) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"unknown {what} {name!r}: did you mean {nearest[0]!r}? There are: {', '.join(known)}."
