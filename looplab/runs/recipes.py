"""Read the file of a recipe, and refuse what is something else in one sentence."""

from pathlib import Path

from data_builders.files import expand_home
from looplab.shipped import find_recipe

from .yaml_text import read_yaml

TRAIN, FROZEN, STUDY = "a recipe of `looped train`", "a recipe of `looped frozen`", "a file of `looped study`"
BENCH = "a file of `looped loopbench`"
# Field at the top of a file -> what the file is.
KINDS = {
    "data": TRAIN,
    "depth": TRAIN,
    "curriculum": TRAIN,
    "sweep": FROZEN,
    "confirm": FROZEN,
    "grid": FROZEN,
    "arms": STUDY,
    "tasks": BENCH,
    "seeds": STUDY,
    "distributed_type": "a configuration of `accelerate launch --config_file`",
    "model_type": "the configuration of a model",
}


def read_recipe_file(name: str | Path, kind: str) -> tuple[Path, dict]:
    """The file `name`, or of the recipe of that name (see `find_recipe`), and its fields as they are written.

    Args:
        kind: what the file has to be, TRAIN, FROZEN, STUDY or BENCH.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is something else.
    """
    path = find_recipe(expand_home("the recipe", str(name)))
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and {kind} is expected: name a file, or one of `looped recipes`.")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: expected fields and values, got {values!r}.")
    found = [KINDS[field] for field in values if field in KINDS]
    if found and kind not in found:
        raise ValueError(f"{path} is {found[0]}, and {kind} is expected.")
    return path, values
