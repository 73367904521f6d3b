"""Laws of all tasks, made from the registry: a task answers a verb of `looped`, or refuses it in one sentence; what it
measures and draws is published and has a caption; nothing outside its folder knows it by name."""

import argparse
import ast
import re
from pathlib import Path

import pytest
import yaml

from command_lines import VERBS, arguments_of, command
from looplab.cli import main
from looplab.publish.publishing import TRAINED
from looplab.runs.folder import open_run
from looplab.runs.records import owned
from looplab.tasks.base import METHODS, Task
from looplab.tasks.registry import TASKS, chosen, task_for, written_files
from toys import ROOT

CASES = [(task, verb) for task in TASKS.values() for verb in METHODS]
every_case = pytest.mark.parametrize(("task", "verb"), CASES, ids=lambda case: getattr(case, "name", case))


@pytest.fixture
def run(task, tmp_path):
    """A run on the task that has nothing but its recipe."""
    folder = tmp_path / "run"
    folder.mkdir()
    data = {"task": task.name, "seed": 0, "overrides": {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "run", "init_from": None, "data": data}))
    return open_run(folder)


def test_every_verb_on_runs_is_one_of_a_task():
    """A verb that reads a run asks its task; all others are of models, and of what is not a run."""
    on_runs = {verb for verb in VERBS for action in arguments_of(verb) if action.metavar == "RUN"}
    assert set(METHODS) == on_runs
    assert all(hasattr(Task, method) for methods in METHODS.values() for method in methods)


@every_case
def test_a_verb_that_a_task_lacks_is_refused_in_one_sentence(task, verb, run, capfd):
    having = chosen(lambda other: other.options(verb) is not None)
    line = [str(run.folder) if word == "{runs}/hops" else word for word in command(verb)]
    line += ["--repo-id", "u/x", "--space"] * (verb == "publish") + ["--run", str(run.folder)] * (verb == "bench")
    assert main(line) == 2  # nothing was trained: what the task has is refused for that
    said = capfd.readouterr().err.strip()
    assert "\n" not in said
    refused = f"looped {verb} is not for {task.kind}: it is for {', '.join(having)}" in said
    assert refused == (task.options(verb) is None), said


OPTIONS = [(task, verb, action) for task, verb in CASES for action in arguments_of(verb)]


@pytest.mark.parametrize(
    ("task", "verb", "action"), OPTIONS, ids=lambda case: getattr(case, "name", getattr(case, "dest", case))
)
def test_an_option_that_a_task_lacks_is_refused_in_one_sentence(task, verb, action: argparse.Action, run, capfd):
    """Those that some task takes: the others are of the verb itself."""
    takes = [other for other in TASKS.values() if action.dest in (other.options(verb) or ())]
    if not takes or task.options(verb) is None or task in takes:
        return
    value = [] if action.nargs == 0 else [action.choices[0] if action.choices else "1"]
    assert main([verb, str(run.folder), action.option_strings[0], *value]) == 2
    said = capfd.readouterr().err.strip()
    assert f"looped {verb} {action.option_strings[0]} is not for {task.name}: it is for " in said
    assert "\n" not in said


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_an_option_of_a_task_is_one_of_the_command(task):
    for verb in METHODS:
        assert (task.options(verb) or set()) <= {action.dest for action in arguments_of(verb)}, verb
    for verb, option in task.arguments:
        assert option in task.options(verb), option
    for words in task.defaults:
        verb, option = words.split()
        assert option.removeprefix("--").replace("-", "_") in task.options(verb), words


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_what_a_task_measures_is_published_and_owned(task):
    """By the verb that writes it, which the task has; the files of every run come before."""
    names = [record.name for record in task.records]
    assert len(set(names)) == len(names)
    assert not set(names) & set(TRAINED)
    for record in task.records:
        assert task.options(record.verb) is not None, record.name
        assert owned(record.name, written_files()), record.name
    # A verb that leaves a file where one task has it leaves one where another has it.
    for verb in {record.verb for other in TASKS.values() for record in other.records}:
        assert (task.options(verb) is not None) == (verb in {record.verb for record in task.records}), verb
    for name, figure in task.figures.items():
        assert task.options(figure.verb) is not None, name
        assert figure.caption
        assert figure.caption[-1] != "."
        assert owned(f"figures/{name}.png", written_files()), name


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_picture_and_file_that_is_named_in_a_task_is_declared(task):
    """`looped plot` drew pictures, and `looped memory` wrote a file, that no list knew: nobody published them."""
    folder = ROOT / "looplab" / "tasks" / task.kind
    pages = [folder / "figures.py", *folder.glob("lens_figures.py"), *folder.glob("mechanism.py")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    written = (
        r'figures / f?"(\w+?)(?:\{suffix\})?\.png"',
        r"^    (\w+)\.png  ",
        r'path\("(\w+)"',
        r'folder / "(\w+)\.png"',
    )
    drawn = {name for pattern in written for name in re.findall(pattern, text, re.MULTILINE)} - {"held_out"}
    kind = {name for other in TASKS.values() if other.kind == task.kind for name in other.figures}
    assert drawn
    assert drawn <= kind
    files = {record.name for record in task.records}
    for page in folder.glob("*.py"):
        code = ast.parse(page.read_text(encoding="utf-8"))
        for node in ast.walk(code):
            if isinstance(node, ast.Constant) and re.fullmatch(r"\w+\.jsonl?", str(node.value)):
                assert node.value in files | set(TRAINED) | OTHER, f"{page}: {node.value}"


OTHER = {"config.json", "tokenizer.json", "model.json"}  # of a model's folder, and of samples/


def code_outside(kind: str) -> list[Path]:
    places = [*ROOT.glob("looplab/**/*.py"), ROOT / "train.py"]
    return [path for path in places if not path.is_relative_to(ROOT / "looplab" / "tasks" / kind)]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_nothing_outside_its_folder_asks_for_a_task(task):
    """No comparison with its name, no list with it and another one, no import from its folder but the registry's."""
    names = {name for other in TASKS.values() for name in (other.name, other.kind)}
    for path in code_outside(task.kind):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Compare):
                sides = [side.value for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
                content = path.name == "serving_requests.py"  # "text" is a kind of content of OpenAI's protocol
                assert content or not set(sides) & {task.name, task.kind}, place
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                assert not (keys & {task.name, task.kind} and len(keys & names) > 1), place
            if isinstance(node, ast.ImportFrom) and path.name != "registry.py":
                assert f"tasks.{task.kind}" not in (node.module or ""), place


def test_runs_of_one_kind_are_read_together(tmp_path):
    def run_on(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": name, "data": {"task": name}}))
        return open_run(folder)

    runs = {name: run_on(name) for name in TASKS}
    for one in TASKS:
        for two in TASKS:
            if TASKS[one].kind == TASKS[two].kind:
                assert task_for("table", [runs[one], runs[two]]) is TASKS[one]
            else:
                with pytest.raises(ValueError, match="read them apart"):
                    task_for("table", [runs[one], runs[two]])
