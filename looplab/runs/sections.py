"""Dataclasses as sections of a YAML file: fields have dotted names and types; a wrong name meets the nearest one."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass

from huggingface_hub.dataclasses import type_validator

from data_builders.files import expand_home


def refuse_fields(section_name: str, section, names: Iterable[str], task: str):
    """ValueError if a field of the recipe's section has another value than its default: `task` does not use it."""
    for item in fields(section):
        if item.name in names and vars(section)[item.name] != item.default:
            raise ValueError(f"{section_name}.{item.name} is not for the task {task}: leave it out.")


def check_name(name: str):
    """ValueError for a name that is no plain folder name."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name must be a plain folder name, got {name!r}: use letters, digits, '_', '-', '.'.")


def expand_paths(section, prefix: str = ""):
    """Put the home folder in the place of a leading `~`, in every field that names a file or a folder."""
    for item in fields(section):
        name, value = prefix + item.name, vars(section)[item.name]
        if is_dataclass(value):
            expand_paths(value, f"{name}.")
        elif item.metadata.get("path") and value is not None:
            paths = [expand_home(name, path) for path in ([value] if isinstance(value, str) else value)]
            setattr(section, item.name, paths[0] if isinstance(value, str) else paths)


def field_names(section: type, prefix: str = "") -> list[str]:
    """Dotted names of a recipe's fields."""
    names = [prefix + item.name for item in fields(section)]
    return names + [
        n for i in fields(section) if is_dataclass(i.type) for n in field_names(i.type, f"{prefix}{i.name}.")
    ]


def build_recipe(values: dict, section: type, prefix: str = "", root: type | None = None):
    """A recipe, of the type `section`, from nested plain values; ValueError for an unknown field, with the nearest
    name among those of `root`, and a wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"expected fields and values, got {values!r}.")
    root = root or section
    sections = {item.name: item.type for item in fields(section)}
    built = {}
    for name, value in values.items():
        if name not in sections:
            # Likeness of the whole dotted name and of its last part: `lr` should find `optim.lr`.
            pairs = {known: [(f"{prefix}{name}", known), (name, known.split(".")[-1])] for known in field_names(root)}
            nearest = max(pairs, key=lambda k: sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs[k]))
            raise ValueError(f"{prefix}{name} is not a recipe field; did you mean {nearest}?")
        if is_dataclass(sections[name]) and isinstance(value, dict):
            value = build_recipe(value, sections[name], f"{prefix}{name}.", root)
        try:
            type_validator(name, value, sections[name])
        except TypeError as error:
            place = prefix and f", section {prefix[:-1]}"
            raise ValueError(
                f"{prefix}{name} has a wrong type in the recipe{place}: {error.__cause__ or error}"
            ) from error
        built[name] = value
    try:
        return section(**built)
    except TypeError as error:
        raise ValueError(f"the recipe lacks a field: {error}") from error


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested values under dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
