"""The help of a recipe's fields: flag, type, what it is, range, default.

All of it comes from the class of the section: what a field is says the comment behind it in the source.
"""

import argparse
import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Literal, get_args, get_origin

from .sections import default_of


@dataclass(frozen=True)
class Group:
    """Fields that are shown together.

    Args:
        title: of the group.
        form: class of the section. Its inner sections are groups of their own.
        prefix: what stands before the names, such as "data.".
        flags: whether the fields may be flags of a command line; otherwise they are of a file alone.
        beyond: a base class. Fields that are the same there are shown elsewhere.
    """

    title: str
    form: type
    prefix: str = ""
    flags: bool = True
    beyond: type | None = None

    def fields(self) -> list[Field]:
        """The fields that are shown."""
        elsewhere = [(item.name, item.type) for item in fields(self.beyond)] if self.beyond else []
        return [i for i in fields(self.form) if not is_dataclass(i.type) and (i.name, i.type) not in elsewhere]


def comments(form: type) -> dict[str, str]:
    """Field -> the comment behind it in the source of the class, or of a base class."""
    found = {}
    for each in reversed(form.__mro__):
        if "__dataclass_fields__" not in vars(each):
            continue
        source = textwrap.dedent(inspect.getsource(each))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        said = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in said:
                found[node.target.id] = said[node.end_lineno]
    return found


def value_of(item: Field) -> str:
    """What stands for the value of a field: its choices, or the kind of its type."""
    kinds = [kind for kind in (get_args(item.type) or (item.type,)) if kind is not type(None)]
    for kind in (item.type, *kinds):
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
    if get_origin(item.type) is list or list in map(get_origin, kinds):
        return "[..]"
    if dict in (item.type, get_origin(item.type), *kinds):
        return "{..}"
    if item.metadata.get("path"):
        return "PATH"
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    return names[max(kinds, key=list(names).index)]  # of int | float, the wider


def words_of(item: Field, said: str) -> str:
    """Range, meaning and default of a field, a line of the help."""
    limits = item.metadata.get("range")
    needed = item.default is MISSING and item.default_factory is MISSING
    default = default_of(item)
    shown = str(default).lower() if isinstance(default, bool) else default
    end = "required" if needed else f"default: {shown}" if default is not None else ""
    return f"{said}{f'; {limits}' if limits else ''}{f' ({end})' if end else ''}"


def fields_help(groups: Sequence[Group]) -> str:
    """The help of the fields of all groups, as text."""
    return "\n".join(group_help(group) for group in groups if group.fields())


def group_help(group: Group) -> str:
    """The help of one group; another may have fields of the same names."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    doc = " ".join(inspect.getdoc(group.form).partition("\n\n")[0].split())
    shown, said = parser.add_argument_group(group.title, doc), comments(group.form)
    for item in group.fields():
        words = words_of(item, said.get(item.name, "")).replace("%", "%%")
        name, value = f"{group.prefix}{item.name}", value_of(item)
        spelt, shape = (f"--{name}", value) if group.flags else (name, f"{name}: {value}")
        shown.add_argument(spelt, metavar=shape, help=words)
    return parser.format_help()
