"""All tasks by name, as in a recipe's `data.task`. A new task has a line here.

`task_of(runs)` is the task of runs. `task_for(verb, runs)` is the task of runs that a verb of `looped` works on; it
raises, with one sentence, if the task lacks the verb or an option. Nothing here imports torch.
"""

from collections.abc import Callable, Sequence

from looplab.runs.folder import Run
from looplab.runs.records import PICTURES

from .base import Argument, Task
from .hops.task import Composition, Khop
from .molecules.task import MoleculeTask
from .sequence.task import SequenceTask
from .text.task import TextTask

# Verbs that need no data: of a model without the recipe of its training, they are those of the task text.
ANY_MODEL = ("ask", "lens", "demo")
TASKS: dict[str, Task] = {
    task.name: task for task in (Khop(), Composition(), TextTask(), MoleculeTask(), SequenceTask())
}


def task_of(runs: Sequence[Run]) -> Task:
    """The task of the first run; all runs are on tasks of its kind.

    Raises:
        ValueError: the runs are on tasks of different kinds, or there is no such task.
    """
    for run in runs:
        if run.task() not in TASKS:
            raise ValueError(f"{run}: there is no task {run.task()!r}; there are {', '.join(TASKS)}.")
        if TASKS[run.task()].kind != TASKS[runs[0].task()].kind:
            raise ValueError(f"{runs[0]} is a run on {runs[0].task()} and {run} on {run.task()}: read them apart.")
    return TASKS[runs[0].task()]


def task_for(verb: str, runs: Sequence[Run], *options: str) -> Task:
    """The task of `runs`, checked for the verb and its `options`, such as "max_hops".

    Raises:
        ValueError: as `task_of`, or the task lacks the verb or an option.
    """
    if verb in ANY_MODEL and all(run.bare for run in runs):
        return TASKS["text"]
    task = task_of(runs)
    for run in runs:
        if run.bare and not task.measures_any:
            able = ", ".join(chosen(lambda each: each.measures_any))
            raise ValueError(f"{run} is a model without a recipe, and --data with task {task.name}: it is for {able}.")
    run_on = f"{runs[0]} is a run on {task.name}, and looped {verb}"
    if task.options(verb) is None:
        raise ValueError(f"{run_on} is not for {task.kind}: it is for {having(verb)}.")
    for option in options:
        if option not in task.options(verb):
            who = having(verb, option)
            raise ValueError(f"{run_on} {spelt(option)} is not for {task.name}: it is for {who}; leave it out.")
    return task


def spelt(option: str) -> str:
    """The option as the user writes it: --max-hops for max_hops."""
    return f"--{option.replace('_', '-')}"


def having(verb: str, option: str | None = None) -> str:
    """The tasks that have a verb, or an option of it, as text: kinds, or names if not all tasks of a kind have it."""

    def has(task: Task) -> bool:
        options = task.options(verb)
        return options is not None and (option is None or option in options)

    return ", ".join(chosen(has)) or "no task"


def chosen(has: Callable[[Task], bool]) -> list[str]:
    """Kinds whose tasks are all chosen, and names of other chosen tasks, in the order of `TASKS`."""
    words = [
        task.kind if all(has(other) for other in TASKS.values() if other.kind == task.kind) else task.name
        for task in TASKS.values()
        if has(task)
    ]
    return list(dict.fromkeys(words))


def arguments_of(verb: str) -> dict[str, Argument]:
    """Options of a verb that tasks declare, by name ("max_hops")."""
    return {name: a for task in TASKS.values() for (of, name), a in task.arguments.items() if of == verb}


def help_of(verb: str, option: str) -> str:
    """The text in the help for an option of tasks: the tasks that take it, unless all do, and its defaults."""
    takes = having(verb, option)
    known = {task.kind: task.defaults.get(f"{verb} {spelt(option)}") for task in TASKS.values()}
    defaults = [default if takes == kind else f"of {kind} {default}" for kind, default in known.items() if default]
    words = [takes] if takes != having(verb) else []
    words += [f"default: {', '.join(defaults)}"] if defaults else []
    return f"({'; '.join(words)})" if words else ""


def files_of(verb: str) -> list[str]:
    """Files that a verb writes, on all tasks."""
    return list(dict.fromkeys(r.name for task in TASKS.values() for r in task.records if r.verb == verb))


def written_files() -> list[str]:
    """Patterns, relative to a run, of all files that tasks measure or draw."""
    patterns = []
    for task in TASKS.values():
        patterns += [pattern for record in task.records for pattern in record.patterns()]
        for name, figure in task.figures.items():
            names = [name, f"{name}_step-*"] if figure.of_snapshots else [name]
            patterns += [f"figures/{each}.{format}" for each in names for format in PICTURES]
        patterns += task.files
    return list(dict.fromkeys(patterns))


def measured_files() -> list[str]:
    """Patterns of all files that tasks measure."""
    records = [record for task in TASKS.values() for record in task.records]
    return list(dict.fromkeys(pattern for record in records for pattern in record.patterns()))
