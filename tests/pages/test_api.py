"""The API reference: every public name says what it is, and what docstrings name exists."""

import ast
import builtins
import doctest
import importlib.util
import inspect
import keyword
import re
import tomllib

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, TrainingArguments
from transformers.generation import GenerationMixin

import modeling_looped
from looplab.cli import parser
from toys import ROOT

SPEC = importlib.util.spec_from_file_location("build", ROOT / "docs/api/build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)

FILES = [path for part in ("modeling_looped", "data_builders", "looplab") for path in (ROOT / part).rglob("*.py")]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# The classes of the project by name: where the fields of a class are looked for that it inherits.
CLASSES = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def names_of(tree: ast.AST) -> set[str]:
    """What a file defines, takes, sets or reads, and what it spells out in quotes."""
    names = set()
    for node in ast.walk(tree):
        names |= {
            value
            for field in ("id", "arg", "attr", "name", "value")
            if isinstance(value := vars(node).get(field), str) and value.isidentifier()
        }
    return names


def signature_names(function) -> set[str]:
    return set(inspect.signature(function).parameters)


PROJECT = frozenset().union(*(names_of(tree) for tree in TREES.values())) | {
    part for path in FILES for part in (*path.relative_to(ROOT).parts[:-1], path.stem)
}
OF_LIBRARIES = frozenset(
    {*dir(builtins), *keyword.kwlist, "true", *dir(torch), *dir(transformers), *dir(datasets), *dir(huggingface_hub)}
    | {*dir(GenerationConfig()), *dir(datasets.Dataset), *signature_names(TrainingArguments)}
    | signature_names(GenerationMixin.generate) | signature_names(PreTrainedModel.from_pretrained)
    | set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    | {"torch", "transformers", "datasets", "attn_implementation", "device_map", "quantization_config"}
)  # fmt: skip
VERBS = {verb for action in parser()._actions if isinstance(action.choices, dict) for verb in action.choices}
FILE = re.compile(r"[\w./*-]+\.(py|json|jsonl|yaml|md|txt|csv|smi|parquet|safetensors)")


def unknown_names(docstring: str) -> list[str]:
    """What stands in single backticks in the form of a name, and is none of ours nor of the libraries."""
    unknown = []
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", docstring):
        name = re.sub(r"\([^()]*\)$", "", span)
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name) and not FILE.fullmatch(name):
            known = all(part in PROJECT | OF_LIBRARIES or part.isdecimal() for part in name.split("."))
            unknown += [] if known else [span]
        elif span.startswith("looped ") and (verb := re.match(r"looped ([a-z]+)", span)):
            unknown += [] if verb[1] in VERBS else [span]
        elif FILE.fullmatch(name) and name.endswith(".py"):
            found = any(path.match(name) for path in (*FILES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.py")))
            unknown += [] if found else [span]
    return unknown


def documented(tree: ast.AST):
    """(name, node, docstring) of a file and of what it defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), node, text


def arguments_of(node: ast.AST) -> set[str]:
    """What may stand under Args: the arguments of a function; those of a class's `__init__`, or its fields."""
    if isinstance(node, FUNCTIONS):
        given = node.args
        stars = [one for one in (given.vararg, given.kwarg) if one]
        return {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, *stars)}
    names = set()
    for member in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            names.add(member.target.id)
        elif isinstance(member, FUNCTIONS) and member.name == "__init__":
            names |= arguments_of(member)
    for base in node.bases if isinstance(node, ast.ClassDef) else []:
        parent = base.value if isinstance(base, ast.Subscript) else base
        names |= arguments_of(CLASSES[parent.id]) if getattr(parent, "id", None) in CLASSES else set()
    return names


def listed_arguments(docstring: str) -> list[str]:
    """The names that a docstring has under Args."""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n?)*)", docstring, flags=re.M)
    if section is None:
        return []
    heads = re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(.*\))?[:.]", section[1], flags=re.M)
    return [name.lstrip("*") for head in heads for name in head.split(", ")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_docstrings_name_exists(path):
    for name, node, text in documented(TREES[path]):
        assert unknown_names(text) == [], name
        if not isinstance(node, ast.Module):
            assert set(listed_arguments(text)) <= arguments_of(node), name


@pytest.mark.parametrize("text", ["`LoopedConfg`", "`no_such_looped.py`", "`looped trian X`", "`Task.drow`"])
def test_what_does_not_exist_is_seen(text):
    assert unknown_names(text) != []


def silent_names(holder, page: str):
    """Functions, classes, methods and properties that a module or class defines, and that have no docstring.

    A method without one has that of the method which it overrides.
    """
    for name, value in vars(holder).items():
        member = getattr(holder, name)
        made_here = isinstance(value, property) or getattr(member, "__module__", None) == page
        if name.startswith("_") or not made_here or not (callable(member) or isinstance(value, property)):
            continue
        if not inspect.getdoc(member):
            yield f"{page}: {name} of {holder.__name__}"
        if inspect.isclass(member) and member is not holder:
            yield from silent_names(member, page)


def test_every_public_name_says_what_it_is():
    pages = build.load()
    assert [name for page in pages for name in silent_names(importlib.import_module(page), page)] == []


@pytest.mark.parametrize("name", modeling_looped.__all__)
def test_the_examples_of_a_docstring_print_what_they_say(name):
    names = vars(modeling_looped) | {"torch": torch}
    for example in doctest.DocTestFinder(recurse=False).find(getattr(modeling_looped, name), name, globs=names):
        assert doctest.DocTestRunner().run(example).failed == 0


def test_the_table_of_public_names_is_that_of_the_code():
    build.load()
    assert build.table() in (ROOT / "docs/api/README.md").read_text(), "make docs"


@pytest.mark.slow
def test_the_reference_builds_without_a_warning(tmp_path):
    build.build(tmp_path)
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) > 40
    for path, text in pages.items():
        for target in re.findall(r'href="([^"#:]+\.html)?(?:#([^"]*))?"', text):
            file = (path.parent / target[0]).resolve() if target[0] else path
            assert file in {each.resolve() for each in pages}, (path, target)
            if target[1] and not target[1].endswith(".__init__"):  # pdoc hides that of an abstract class
                assert f'id="{target[1]}"' in file.read_text(encoding="utf-8"), (path, target)
    for name in build.EXPORTING:
        page = pages[tmp_path / f"{name}.html"]
        assert all(f'id="{public}"' in page for public in importlib.import_module(name).__all__)
