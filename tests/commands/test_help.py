"""Laws of the help: every argument of every verb and every field of a recipe has a line, with its type and default."""

import argparse
import re

import pytest

from command_lines import VERBS, arguments_of
from looplab.cli import main, parser
from looplab.mistakes import Whole
from looplab.pretrained.study import FrozenRecipe
from looplab.runs.field_help import comments, value_of
from looplab.runs.sections import default_of, leaves
from looplab.tasks.registry import TASKS
from looplab.training.recipe import Recipe, own_sections


def help_of(capsys, *line: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*line, "--help"])
    return capsys.readouterr().out


def entry(text: str, begin: str) -> str:
    """What the help says after `begin`, which is at the beginning of a line, as one line."""
    [said] = re.findall(rf"^  {re.escape(begin)}(?: |\n)((?:.|\n(?=    ))*)", text, re.MULTILINE)
    return " ".join(said.split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_of_a_verb_has_a_line_with_its_type_and_default(verb, capsys):
    text = help_of(capsys, verb)
    for action in arguments_of(verb):
        formatter = argparse.HelpFormatter("")
        begin = formatter._format_action_invocation(action)
        said = entry(text, begin)
        assert len(said.split()) > 1, f"{verb} {begin}"
        if action.option_strings and action.nargs != 0:
            assert action.metavar or action.choices, f"{verb} {begin} does not show that it takes a value"
        if isinstance(action.type, Whole):
            assert str(action.type) in said, begin
        if action.nargs != 0 and action.default not in (None, (), argparse.SUPPRESS) and action.option_strings:
            shown = (
                action.default if isinstance(action.default, str | int | float) else " ".join(map(str, action.default))
            )
            assert f"default: {shown}" in said or "default: all" in said, f"{verb} {begin}"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_what_it_does(verb, capsys):
    listed = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    [line] = [choice.help for choice in listed._choices_actions if choice.dest == verb]
    assert len(line) > 20
    assert verb in help_of(capsys)


FIELDS = {name: item for task in TASKS for name, item in leaves(Recipe, own_sections(task)).items()}
STUDY = leaves(FrozenRecipe)


@pytest.mark.parametrize(("verb", "items", "spelt"), [("train", FIELDS, "--{} "), ("frozen", STUDY, "{}: ")])
def test_every_field_of_a_recipe_has_a_line_with_its_type_and_default(verb, items, spelt, capsys):
    text = help_of(capsys, verb)
    for name, item in items.items():
        begin = spelt.format(name)
        found = re.findall(rf"^  {re.escape(begin)}\S+(?:\s(?:.|\n(?=    ))*)", text, re.MULTILINE)
        assert found, name
        lines = [" ".join(each.split()) for each in found]
        assert any(line.startswith(f"{begin}{value_of(item)} ") for line in lines), name
        default = default_of(item)
        if default is not None:
            shown = str(default).lower() if isinstance(default, bool) else default
            assert any(f"(default: {shown})" in line for line in lines), name
        limits = item.metadata.get("range")
        assert limits is None or any(f"; {limits}" in line for line in lines), name


def forms(form: type, *more: type) -> list[type]:
    inner = [item.type for item in form.__dataclass_fields__.values() if hasattr(item.type, "__dataclass_fields__")]
    return [form, *inner, *more]


SECTIONS = {form for task in TASKS for form in forms(Recipe, *own_sections(task).values())} | {*forms(FrozenRecipe)}


@pytest.mark.parametrize("form", sorted(SECTIONS, key=lambda form: form.__name__), ids=lambda form: form.__name__)
def test_every_field_has_a_comment_and_every_section_a_sentence(form):
    assert set(comments(form)) == set(form.__dataclass_fields__)
    assert not form.__doc__.startswith(f"{form.__name__}("), "that is what dataclass writes"
