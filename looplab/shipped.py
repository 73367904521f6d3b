"""Recipes, studies, templates, models and pages of this package: folders of a checkout, in looplab/ of the wheel."""

import difflib
import glob
from itertools import takewhile
from pathlib import Path
from textwrap import shorten


def shipped(name: str) -> Path:
    """The folder recipes/, studies/, hub_cards/, models/ or docs/: that of the wheel, or else that of the checkout."""
    here = Path(__file__).parent
    within = here / name
    return within if within.is_dir() else here.parent / name


def own_files(pattern: str) -> str:
    """`pattern`, a path or a glob; or, of `docs/...` that nothing here matches, that of this package."""
    rest = pattern.removeprefix("docs/")
    return pattern if rest == pattern or glob.glob(pattern, recursive=True) else str(shipped("docs") / rest)


def recipe_files() -> dict[str, Path]:
    """Name, such as `quickstart` or `melt/text_teacher` -> file, of the recipes that come with this package."""
    folder = shipped("recipes")
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in files.items() if not name.startswith("accelerate/")}  # of its launcher


def find_recipe(text: str) -> Path:
    """The file `text`, or the recipe in the run folder `text`, or else the recipe of this package with that name:
    `quickstart`, `recipes/quickstart.yaml`.

    Raises ValueError, with the nearest name, for a name without a folder or a suffix that is neither.
    """
    path = Path(text)
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():  # a run folder
        return path / "recipe.yaml"
    files = recipe_files()
    name = text.removeprefix("recipes/").removesuffix(".yaml")
    if name in files:
        return files[name]
    if path.name == text and not path.suffix:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {near[0]}?" if near else "`looped recipes` lists those that come with this package."
        raise ValueError(f"there is no recipe {text}, neither a file nor a name; {hint}")
    return path


def find_study(text: str) -> Path:
    """The file `text`, or the study of this package with that name. Raises ValueError as `find_in`."""
    return find_in(shipped("studies"), text, "study")


def find_bench(text: str) -> Path:
    """The same for a LoopBench."""
    return find_in(shipped("studies") / "benches", text, "bench")


def find_in(folder: Path, text: str, what: str) -> Path:
    """The file `text`, or the YAML file of that name in `folder`.

    Raises ValueError, with the names there are, for neither.
    """
    path = folder / f"{text}.yaml"
    if Path(text).is_file():
        return Path(text)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(f"there is no {what} {text}, neither a file nor a name; there are {names}.")
    return path


def list_recipes() -> str:
    """A line per recipe, its name and the first sentence of its comment, and the folder they lie in."""
    files = recipe_files()
    width = max(map(len, files))
    lines = []
    for name, path in files.items():
        comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        sentence = " ".join(line.removeprefix("# ") for line in comment).partition(". ")[0]
        lines.append(f"{name:{width}}  {shorten(sentence, 100, placeholder=' ...')}")
    end = f"For `looped train NAME`; those of frozen/ for `looped frozen NAME`. The files: {shipped('recipes')}"
    return "\n".join([*lines, "", end])
