"""What the parts of the project may know of each other, and lists that say the same thing in two places."""

import ast
import re
import sys
from pathlib import Path

import pytest

from looplab.cli import parser
from looplab.publish.cards import FIGURES
from looplab.publish.publishing import RECORDS
from looplab.runs.folder import VERBS

ROOT = Path(__file__).parents[1]
OWN = {"modeling_looped", "data_builders", "looplab", "hub_cards", "train"}
# Part -> the parts of this project that it may import, in a function too.
MAY_IMPORT = {
    "modeling_looped": set(),
    "data_builders": set(),
    "hub_cards": set(),
    "looplab": {"modeling_looped", "data_builders", "hub_cards"},
    "train": {"modeling_looped", "data_builders", "looplab"},
}
# The model folder is shipped as remote code: what whoever loads it has.
SHIPPED_WITH = {"torch", "transformers", "huggingface_hub"}


def files_of(part: str) -> list[Path]:
    return [ROOT / "train.py"] if part == "train" else sorted((ROOT / part).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top names of the packages that a file imports, siblings aside."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_arrows_point_down(part):
    for path in files_of(part):
        assert imported(path) & OWN <= MAY_IMPORT[part] | {part}, path.name


def test_the_model_needs_no_more_than_transformers():
    for path in files_of("modeling_looped"):
        assert imported(path) - SHIPPED_WITH <= sys.stdlib_module_names, path.name


def test_the_command_line_lists_its_commands():
    commands = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))
    text = ast.get_docstring(ast.parse((ROOT / "looplab/cli.py").read_text(encoding="utf-8")))
    listed = re.search(r"`looped (.+?)`", text, re.DOTALL)[1]
    assert re.split(r"\s*\|\s*", listed.strip()) == list(commands)


def test_every_measurement_is_published():
    """`looped memory` wrote a file that nobody published: the list of published ones did not know it."""
    text = (ROOT / "looplab/runs/folder.py").read_text(encoding="utf-8")
    documented = set(re.findall(r"^(\w+\.jsonl?) ", ast.get_docstring(ast.parse(text)), re.MULTILINE))
    assert documented - {"run.json"} <= set(RECORDS)  # run.json says where the run lies
    assert set(VERBS) <= documented | {"lens.jsonl", "lens_stages.jsonl"}


def test_every_figure_of_a_run_has_a_caption():
    """A picture without one is neither shown on the card nor published."""
    pages = [*ROOT.glob("looplab/tasks/*/figures.py"), ROOT / "looplab/tasks/hops/lens_figures.py"]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    written = (r'figures / f?"(\w+)\.png"', r"^    (\w+)\.png  ", r'path\("(\w+)"')
    drawn = {name for pattern in written for name in re.findall(pattern, text, re.MULTILINE)}
    assert {"grid", "ablations", "readouts", "lens", "hops"} <= drawn
    assert drawn <= set(FIGURES)
