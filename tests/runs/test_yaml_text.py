"""Recipes are YAML 1.2: what is written is what is read, in any locale, and what can be read twofold is refused."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplab.runs.yaml_text import parse_yaml, read_yaml, to_yaml
from toys import ROOT

LAW = settings(derandomize=True, max_examples=60, deadline=None, database=None)

# Text that some dialect takes for a number, a date, a truth value, nothing, or a sign of its own.
TWOFOLD = [
    "1:30", "1e4", "1_000", "0b11", "0o10", "0x1F", "yes", "No", "on", "OFF", "y", "true", "null", "~", "", " ",
    "2001-01-01", ".inf", ".nan", "+1", "-", "<<", "=", "*a", "&a", "!x", "%", "@", "`", "#", "a: b", "a #b", "- a",
    "[", "{", "'", '"', "\\", "a\nb", "\t", "é", "\U0001f600", "\ufeff", "\x07", "\x85", "e3", "010", "?",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False),
    st.sampled_from(TWOFOLD),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
KEYS = st.one_of(st.sampled_from(TWOFOLD), st.text(st.characters(codec="utf-8"), max_size=8))
VALUES = st.dictionaries(
    KEYS,
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)),
    max_size=4,
)


@LAW
@given(VALUES)
def test_what_is_written_is_read(values):
    assert parse_yaml(to_yaml(values), "here") == values


@LAW
@given(VALUES)
def test_json_is_yaml(values):
    """Except for what JSON leaves open: Python's own names of infinities, and control characters as they are."""
    text = json.dumps(values, ensure_ascii=False)
    if "Infinity" not in text and text.isprintable():
        assert parse_yaml(text, "here") == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("-7", -7), ("+7", 7), ("1:30", "1:30"), ("190:20:30", "190:20:30"),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("True", True), ("FALSE", False), ("tRUE", "tRUE"),
        ("1e-4", 1e-4), ("3E5", 3e5), (".5", 0.5), ("5.", 5.0), ("-.inf", -float("inf")), ("1_000", "1_000"),
        ("0b11", "0b11"), ("09", 9), ("2001-01-01", "2001-01-01"), ("~", None), ("null", None), ("nULL", "nULL"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_core_schema(text, value):
    read = parse_yaml(f"[{text}]", "here")[0]
    assert (type(read), read) == (type(value), value)


def nested(inner: str, depth: int) -> str:
    """A mapping at some depth of sections and lists, and the same in the flow style."""
    for level in range(depth):
        inner = f"s{level}:\n" + "".join(f"  {line}\n" for line in inner.splitlines())
        inner = "".join(f"{'- ' if i == 0 else '  '}{line}\n" for i, line in enumerate(inner.splitlines()))
    return inner


@LAW
@given(st.sampled_from(["lr", "optim", '"a b"', "é", "<<", "010:x"]), st.integers(0, 3), st.integers(0, 4))
def test_a_key_that_comes_twice_is_refused(key, depth, between):
    others = "".join(f"k{i}: {i}\n" for i in range(between))
    text = nested(f"{key}: 1\n{others}{key}: {{x: 1}}\n", depth)
    with pytest.raises(
        ValueError, match=rf"^here, line {depth + between + 2}, .* comes twice, first in line {depth + 1}:"
    ):
        parse_yaml(text, "here")
    flow = ", ".join([f"{key}: 1", *(f"k{i}: {i}" for i in range(between)), f"{key}: [2]"])
    with pytest.raises(ValueError, match=r"^here, line 1, .* comes twice"):
        parse_yaml("{s: " * depth + "{" + flow + "}" + "}" * depth, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", r"line 2, column 4: \*x is an alias"),
        ("a: &x {p: 1}\nb: {<<: *x}\n", r"line 2, .*alias"),
        ("a: &a [*a]\n", r"line 1, .*alias"),
        (
            "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64))]),
            r"line 2, .*alias",
        ),
        ("a: !!int '3'\n", r"line 1, .* is a tag"),
        ("a: !!python/object/apply:os.getcwd []\n", r"line 1, .* is a tag"),
        ("1: a\n", r"line 1, .*key that is no text"),
        ("[a]: 1\n", r"line 1, .*key that is no text"),
        ("a: [1, 2\n", r"line 2"),
        ("a: 1\n\tb: 2\n", r"line 2"),
        ("a: 1\n---\nb: 2\n", r"line 2, .*another document"),
        ("a: b\x85c\n", r"line 1, column 5: the line end U\+0085"),
        ("a: 'b\u2028c'\n", r"line 1, column 6: the line end U\+2028"),
        ("%YAML 1.1\n---\na: 010\n", r"%YAML 1\.1"),
        ("a: \x01\n", r"line 1, column 4: the control character U\+0001"),
        ("a: " + "1" * 5000, r"line 1, .*number of 5000 digits"),
        ("a: " + "[" * 5000, r"nested too deep"),
    ],
)
def test_what_can_be_read_twofold_is_refused(text, message):
    with pytest.raises(ValueError, match=rf"^here[,:].*{message}|^here.*{message}"):
        parse_yaml(text, "here")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a: 1\nb: caf\xe9\n", r"line 2, column 7: byte 0xe9 is no UTF-8"),
        ("a: é".encode("utf-16"), r"byte 0xff is no UTF-8"),
        ("a: b".encode("utf-16-le"), r"line 1, column 2: a NUL character"),
        (b"", r"0 bytes"),
    ],
)
def test_a_file_that_is_no_utf_8_is_refused_with_its_place(raw, message, tmp_path):
    (tmp_path / "r.yaml").write_bytes(raw)
    with pytest.raises(ValueError, match=rf"r\.yaml cannot be read as text.*{message}"):
        read_yaml(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read as text \(No such file"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_a_recipe_is_read_in_utf_8_whatever_the_locale(tmp_path):
    """With and without a byte-order mark, and with the line ends of other systems."""
    (tmp_path / "r.yaml").write_bytes("\ufeffname: é\r\nmodel: {}\r\n".encode())
    code = "import sys; from looplab.runs.yaml_text import read_yaml; print(ascii(read_yaml(sys.argv[1])))"
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "r.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == r"{'name': '\xe9', 'model': {}}"
