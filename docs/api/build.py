"""Build the API reference from docstrings: `python docs/api/build.py FOLDER`, or `make docs`.

A warning ends the build. The table of docs/api/README.md is written anew.
"""

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pdoc

README = Path(__file__).with_name("README.md")
EXPORTING = ("modeling_looped", "data_builders")
# What has a page, a package with all its modules; of a package with `__all__` pdoc takes these names alone.
MODEL = importlib.import_module("modeling_looped")
SPECIFICATIONS = (
    "modeling_looped",
    *(module.name for module in pkgutil.iter_modules(MODEL.__path__, "modeling_looped.")),
    "data_builders",
    "looplab.runs",
    "looplab.instruments",
    "looplab.rl",
    *(f"looplab.tasks.{module}" for module in ("base", "data", "card", "training", "registry")),
    "looplab.training.recipe",
)


def load() -> list[str]:
    """Import what has a page, with what is imported when it is first used; returns the names of the modules."""
    for name in EXPORTING:
        module = importlib.import_module(name)
        vars(module).update({public: getattr(module, public) for public in module.__all__})
    pages = list(pdoc.extract.walk_specs(SPECIFICATIONS))
    for name in pages:
        importlib.import_module(name)
    return pages


def table() -> str:
    """One line for each public name: where it is, and how its docstring begins."""
    lines = ["| name | what it is |", "|---|---|"]
    for name in EXPORTING:
        module = importlib.import_module(name)
        for public in sorted(module.__all__):
            first = inspect.getdoc(getattr(module, public)).partition("\n\n")[0]
            first = re.split(r"(?<=[^. ]\.) ", " ".join(first.split()), maxsplit=1)[0].rstrip(".:")
            lines.append(f"| `{name}.{public}` | {first} |")
    return "\n".join(lines)


def build(folder: Path) -> None:
    """Write the HTML pages.

    Raises:
        Warning: a page cannot be made as its docstrings want.
    """
    load()
    pdoc.render.configure(docformat="google", footer_text="looped-transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*SPECIFICATIONS, output_directory=folder)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(re.sub(r"^\|.*\|$(\n^\|.*\|$)*", lambda _: table(), text, count=1, flags=re.M), encoding="utf-8")
    build(Path(sys.argv[1]))
