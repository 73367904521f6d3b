"""What the parts of the project may know of each other, and lists that say the same thing in two places."""

import ast
import re
import sys
from pathlib import Path

import pytest

from looplab.cli import parser

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
