"""Dataclasses as sections of a YAML file: fields by dotted names, types checked, and the nearest name for a wrong one.

A section whose class depends on what it says is named in `own`: dotted name -> the class to take.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import MappingProxyType

from huggingface_hub.dataclasses import type_validator

from data_builders.files import expand_home

ANNOTATED: Mapping[str, type] = MappingProxyType({})  # every section is of the class its annotation names


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


def field_types(section: type, own: Mapping[str, type], prefix: str = "") -> dict[str, type]:
    """Field of a section -> its type."""
    return {item.name: own.get(prefix + item.name, item.type) for item in fields(section)}


def field_names(section: type, own: Mapping[str, type] = ANNOTATED, prefix: str = "") -> list[str]:
    """Dotted names of the fields of a section, and of the sections in it."""
    types = field_types(section, own, prefix)
    inner = [
        n for name, kind in types.items() if is_dataclass(kind) for n in field_names(kind, own, f"{prefix}{name}.")
    ]
    return [prefix + name for name in types] + inner


def defaults(section: type, own: Mapping[str, type] = ANNOTATED, prefix: str = "") -> dict:
    """Dotted name -> default, of the fields of a section and of the sections in it; None for a field without one."""
    flat, types = {}, field_types(section, own, prefix)
    for item in fields(section):
        name = prefix + item.name
        if is_dataclass(types[item.name]):
            flat |= defaults(types[item.name], own, f"{name}.")
        elif item.default_factory is not MISSING:
            flat[name] = item.default_factory()
        else:
            flat[name] = None if item.default is MISSING else item.default
    return flat


def build(
    values: dict, section: type, own: Mapping[str, type] = ANNOTATED, prefix: str = "", root: type | None = None
):
    """A section from nested plain values.

    Raises:
        ValueError: an unknown field, with the nearest name among those of `root`, or a wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected fields and values, got {values!r}.")
    root = root or section
    types = field_types(section, own, prefix)
    built = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{prefix}{name} is not a recipe field; did you mean {nearest(prefix, name, root, own)}?")
        if is_dataclass(types[name]) and isinstance(value, dict):
            value = build(value, types[name], own, f"{prefix}{name}.", root)
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


def nearest(prefix: str, name: str, root: type, own: Mapping[str, type]) -> str:
    """The field that is most like a wrong one, by the whole dotted name and its last part: `lr` finds `optim.lr`."""
    pairs = {known: [(f"{prefix}{name}", known), (name, known.split(".")[-1])] for known in field_names(root, own)}
    return max(pairs, key=lambda known: sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs[known]))


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested values under dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
