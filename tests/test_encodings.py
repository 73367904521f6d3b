"""Text is UTF-8 wherever it is read or written, whatever the locale says, and YAML is read in one place."""

import ast

import pytest

from toys import ROOT

SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for name in ("modeling_looped", "data_builders", "looplab", "hub_cards")
                           for path in (ROOT / name).rglob("*.py"))]
)  # fmt: skip


def takes_the_locale(call: ast.Call) -> bool:
    """Whether a call opens text, or the output of a program as text, without saying how it is encoded."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):
        # A function of that name which takes the path is ours, and is UTF-8 by itself.
        return isinstance(call.func, ast.Attribute)
    if name in ("run", "Popen", "check_output"):
        return {"text", "universal_newlines"} & set(given) != set()
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return False
    modes = [value.value for value in [*call.args, *given.values()] if isinstance(value, ast.Constant)]
    modes = [mode for mode in modes if isinstance(mode, str) and set(mode) <= set("rwaxbt+")]
    binary = any("b" in mode for mode in modes) or (name.endswith("File") and not modes)
    # The open of zipfile, gzip and the like is binary unless a mode says otherwise.
    foreign = isinstance(call.func, ast.Attribute) and name == "open" and call.args and not modes
    return not binary and not foreign


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("p.read_text()", True), ("p.read_text(encoding='utf-8')", False), ("p.write_text(x)", True),
        ("open(p)", True), ("open(p, 'w')", True), ("open(p, 'rb')", False), ("open(p, mode='wb')", False),
        ("open(p, encoding='utf-8')", False), ("p.open('a')", True), ("p.open('rb')", False),
        ("gzip.open(p, 'rt')", True), ("gzip.open(p)", False), ("archive.open(member)", False),
        ("p.open()", True), ("read_text(p)", False),
        ("subprocess.run(c, text=True)", True), ("subprocess.run(c)", False),
        ("subprocess.run(c, text=True, encoding='utf-8')", False), ("NamedTemporaryFile('w')", True),
    ],
)  # fmt: skip
def test_the_rule_knows_right_from_wrong(code, wrong):
    assert takes_the_locale(ast.parse(code, mode="eval").body) == wrong


def test_no_text_is_read_or_written_in_the_locale_s_encoding():
    found = []
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
        found += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if takes_the_locale(call)]
    assert len(SOURCES) > 60
    assert found == []


def test_yaml_is_read_and_written_in_one_place():
    """PyYAML by itself reads another language than recipes are written in."""
    imports = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_bytes()))
        if (isinstance(node, ast.Import) and "yaml" in [name.name.split(".")[0] for name in node.names])
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "yaml")
    }
    assert imports == {"looplab/runs/yaml_text.py"}
