"""What the parts of the project may know of each other, and lists that say the same thing in two places."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from looplab.cli import parser

ROOT = Path(__file__).parents[1]
# Part -> the parts right below it. A part may import those, whatever they may import, and itself; imports inside of
# functions count. A part is a folder or a file; a file's own entry goes before its folder's.
BELOW = {
    "modeling_looped": (),
    "data_builders": (),
    "looplab/mistakes.py": (),
    "looplab/shipped.py": (),
    "looplab/runs": ("looplab/mistakes.py", "looplab/shipped.py", "modeling_looped", "data_builders"),
    "looplab/instruments": ("looplab/runs",),
    "looplab/tasks": ("looplab/instruments",),
    "looplab/tasks/hops": ("looplab/tasks",),
    "looplab/tasks/language": ("looplab/tasks",),
    "looplab/tasks/text": ("looplab/tasks/language",),
    "looplab/tasks/molecules": ("looplab/tasks/language",),
    "looplab/tasks/sequence": ("looplab/tasks/language",),
    "looplab/tasks/registry.py": (
        "looplab/tasks/hops",
        "looplab/tasks/text",
        "looplab/tasks/molecules",
        "looplab/tasks/sequence",
    ),
    "looplab/training": ("looplab/tasks/registry.py",),
    "looplab/bench": ("looplab/tasks/registry.py",),
    "looplab/convert": ("looplab/tasks/registry.py",),
    "looplab/export": ("looplab/tasks/registry.py",),
    "looplab/publish": ("looplab/tasks/registry.py",),
    "looplab/rl": ("data_builders", "modeling_looped"),
    "looplab/pretrained": ("looplab/instruments",),
    "looplab/study": ("looplab/training", "looplab/bench"),
    "looplab/planning": ("looplab/training",),
    "looplab/cli.py": (
        "looplab/__init__.py",
        "looplab/train.py",
        "looplab/bench",
        "looplab/convert",
        "looplab/export",
        "looplab/publish",
        "looplab/pretrained",
        "looplab/study",
        "looplab/planning",
    ),
    "looplab/__init__.py": (),
    "looplab/train.py": ("looplab/training",),
    "train.py": ("looplab/train.py",),
}
# The model folder is shipped as remote code: what whoever loads it has.
SHIPPED_WITH = {"torch", "transformers", "huggingface_hub"}
PACKAGES = ("modeling_looped", "data_builders", "looplab")
FILES = [path for part in PACKAGES for path in sorted((ROOT / part).rglob("*.py"))]
FILES.append(ROOT / "train.py")
KNOWN = frozenset(FILES)


def part_of(path: Path) -> str:
    """The entry of `BELOW` that a file is of: the longest that it lies in."""
    name = path.relative_to(ROOT).as_posix()
    return max((part for part in BELOW if name == part or name.startswith(f"{part}/")), key=len)


@cache
def may_import(part: str) -> frozenset[str]:
    return frozenset({part}).union(*(may_import(below) for below in BELOW[part]))


def modules(path: Path) -> set[str]:
    """Dotted names of what a file imports, anywhere in it; of `from a import b` both a and a.b."""
    names, package = set(), path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


@cache
def imported(path: Path) -> set[Path]:
    """Files of this project that a file imports; a package counts where none of its modules is meant."""
    found = set()
    for name in modules(path):
        place = ROOT.joinpath(*name.split("."))
        found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file in KNOWN}
    packages = {file for file in found if file.name == "__init__.py"}
    return found - {file for file in packages if any(other.parent == file.parent for other in found - {file})}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_point_down(path):
    wrong = {
        file.relative_to(ROOT).as_posix() for file in imported(path) if part_of(file) not in may_import(part_of(path))
    }
    assert not wrong


def test_no_file_imports_itself_in_a_circle():
    below = {path: imported(path) - {path} for path in FILES}
    while free := {path for path, files in below.items() if not files & below.keys()}:
        below = {path: files for path, files in below.items() if path not in free}
    assert not [path.relative_to(ROOT).as_posix() for path in below]


def test_every_folder_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_model_needs_no_more_than_transformers():
    for path in (ROOT / "modeling_looped").glob("*.py"):
        tops = {name.split(".")[0] for name in modules(path)}
        assert tops - SHIPPED_WITH - {"modeling_looped"} <= sys.stdlib_module_names, path.name


def test_the_command_line_lists_its_commands():
    commands = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))
    text = ast.get_docstring(ast.parse((ROOT / "looplab/cli.py").read_text(encoding="utf-8")))
    listed = re.search(r"`looped (.+?)`", text, re.DOTALL)[1]
    assert re.split(r"\s*\|\s*", listed.strip()) == list(commands)
