"""Recipes as nested dataclasses: a section of the YAML file is a dataclass, and a field has a dotted name.

The class of a section is the annotation of its field, unless `own` gives another: dotted name -> class.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import MappingProxyType

from huggingface_hub.dataclasses import type_validator

from data_builders.files import expand_home

ANNOTATED: Mapping[str, type] = MappingProxyType({})  # `own` where the annotations hold for all sections
LIKE = 1.3  # two names that together are less alike, of at most 2, have nothing to do with each other


def check_name(name: str):
    """Raise ValueError for a name that is not a plain folder name."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name must be a plain folder name, got {name!r}: use letters, digits, '_', '-', '.'.")


def expand_paths(section, prefix: str = ""):
    """Replace a leading `~` by the home folder, in every field of `section` that names files or folders."""
    for item in fields(section):
        name, value = prefix + item.name, vars(section)[item.name]
        if is_dataclass(value):
            expand_paths(value, f"{name}.")
        elif item.metadata.get("path") and value is not None:
            paths = [expand_home(name, path) for path in ([value] if isinstance(value, str) else value)]
            setattr(section, item.name, paths[0] if isinstance(value, str) else paths)


def field_types(section: type, own: Mapping[str, type], prefix: str = "") -> dict[str, type]:
    """Name of each field of a section -> its type, see the module docstring."""
    return {item.name: own.get(prefix + item.name, item.type) for item in fields(section)}


def field_names(section: type, own: Mapping[str, type] = ANNOTATED, prefix: str = "") -> list[str]:
    """Dotted names of the fields of a section and of its inner sections."""
    types = field_types(section, own, prefix)
    inner = [
        n for name, kind in types.items() if is_dataclass(kind) for n in field_names(kind, own, f"{prefix}{name}.")
    ]
    return [prefix + name for name in types] + inner


def leaves(section: type, own: Mapping[str, type] = ANNOTATED, prefix: str = "") -> dict[str, Field]:
    """Dotted name -> field, of the fields of a section and of its inner sections that are no sections."""
    flat, types = {}, field_types(section, own, prefix)
    for item in fields(section):
        name = prefix + item.name
        flat |= leaves(types[item.name], own, f"{name}.") if is_dataclass(types[item.name]) else {name: item}
    return flat


def defaults(section: type, own: Mapping[str, type] = ANNOTATED) -> dict:
    """Dotted name -> default for the fields of a section and its inner sections; None for a field without one."""
    return {name: default_of(item) for name, item in leaves(section, own).items()}


def default_of(item: Field):
    """The default of a field; None if it has none."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return None if item.default is MISSING else item.default


def suggestion(name: str, near: str | None) -> str:
    """The end of a sentence about a wrong name. near: the field that is most like it, see `nearest`."""
    return f"; did you mean {near}?" if near else "."


def build(
    values: dict,
    section: type,
    own: Mapping[str, type] = ANNOTATED,
    prefix: str = "",
    root: type | None = None,
    answer: Callable[[str, str | None], str] = suggestion,
):
    """Build a section from nested plain values.

    Args:
        prefix: what stands before the names of this section, such as "data.".
        root: the outermost section; `section` itself unless given.
        answer: (a wrong name, without its section; the field that is most like it) -> the end of the message.

    Raises:
        ValueError: a field is unknown (with the nearest name in `root`), missing, or of a wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected fields and values, got {values!r}.")
    root = root or section
    types = field_types(section, own, prefix)
    built = {}
    for name, value in values.items():
        if name not in types:
            end = answer(name, nearest(prefix, name, root, own))
            raise ValueError(f"{prefix}{name} is not a recipe field{end}")
        if is_dataclass(types[name]) and isinstance(value, dict):
            value = build(value, types[name], own, f"{prefix}{name}.", root, answer)
        try:
            type_validator(name, value, types[name])
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


def nearest(prefix: str, name: str, root: type, own: Mapping[str, type]) -> str | None:
    """The field whose dotted name, and last part of it, are most like a wrong name: `lr` finds `optim.lr`.

    None if no field is like it, or one that deletes: who follows a suggestion may not lose anything.
    """
    alike = {}
    for known in field_names(root, own):
        pairs = (f"{prefix}{name}", known), (name, known.split(".")[-1])
        alike[known] = sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
    deleting = {item.name for item in fields(root) if item.metadata.get("deletes")}
    found = max(alike, key=alike.__getitem__)
    return found if alike[found] >= LIKE and found not in deleting else None


def flatten(values: dict, prefix: str = "") -> dict:
    """Dotted name -> value, from nested values."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
