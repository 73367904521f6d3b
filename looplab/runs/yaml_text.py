"""Read and write YAML 1.2 with the core schema, and refuse everything that can be misread.

    010 is 10, 0o10 is 8, 1e-4 is a number; 1:30, yes, on and 2001-01-01 are text
    refused, with line and column: a key that comes twice, a key that is not text, an alias, a tag

PyYAML alone reads YAML 1.1: there 010 is 8, 1:30 is 90, `no` is false, and the last of two equal keys wins.
"""

import re
from pathlib import Path

import yaml

from data_builders.files import place, read_text


def refuse(node: yaml.Node | yaml.Event, problem: str):
    """Raise MarkedYAMLError, with the place of `node`; `parse_yaml` makes it a ValueError."""
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class CoreLoader(yaml.SafeLoader):
    """PyYAML's loader with the scalars of the core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML keeps them in the class)

    def compose_node(self, parent, index):
        """Refuse aliases and tags."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            refuse(event, f"*{event.anchor} is an alias: write out what it stands for")
        if event.tag is not None:
            refuse(event, f"{event.tag} is a tag: leave it out")
        if self.yaml_version not in (None, (1, 2)):
            refuse(event, f"the file says %YAML {'.'.join(map(str, self.yaml_version))}: it is read as 1.2")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        """Refuse keys that are no text, and keys that come twice."""
        lines = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                refuse(key, "a key that is no text: put it in quotes")
            if key.value in lines:
                refuse(key, f"{key.value} comes twice, first in line {lines[key.value]}: leave one of them out")
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_whole(self, node) -> int:
        """A whole number, also in octal and hexadecimal digits."""
        text = self.construct_scalar(node)
        try:
            return int(text, 0 if text.startswith(("0o", "0x")) else 10)
        except ValueError:  # Python's own limit, of some thousand digits
            refuse(node, f"a number of {len(text)} digits")


class CoreDumper(yaml.SafeDumper):
    """PyYAML's dumper for `CoreLoader`: no aliases, and quotes around text that is not text in YAML 1.1 or 1.2."""

    def ignore_aliases(self, data) -> bool:
        """Write out what comes twice."""
        return True


for name, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for dialect in (CoreLoader, CoreDumper):
        dialect.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"), first)
CoreLoader.add_constructor("tag:yaml.org,2002:int", CoreLoader.construct_whole)


def parse_yaml(text: str, where: str):
    """The plain values of a YAML text. Raises ValueError with `where`, line and column.

    Args:
        where: what the text is, for the message, such as a file name.
    """
    # YAML 1.1 has three more line ends, which PyYAML would turn into spaces.
    odd = re.search("[\x85\u2028\u2029]", text)
    if odd:
        line, column = place(text[: odd.start()])
        raise ValueError(f"{where}, line {line}, column {column}: the line end U+{ord(odd[0]):04X}: write \\n.")
    try:
        return yaml.load(text, CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{where}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}.") from error
    except yaml.reader.ReaderError as error:
        line, column = place(text[: error.position])
        raise ValueError(
            f"{where}, line {line}, column {column}: the control character U+{error.character:04X}."
        ) from error
    except RecursionError as error:
        raise ValueError(f"{where}: lists or sections are nested too deep.") from error


def read_yaml(path: str | Path):
    """The plain values of a YAML file in UTF-8. Raises ValueError as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(Path(path)), str(path))


def to_yaml(values: dict) -> str:
    """YAML text in ASCII, with the fields in their order; `parse_yaml` gives the same values back."""
    return yaml.dump(values, Dumper=CoreDumper, sort_keys=False)
