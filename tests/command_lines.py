"""Command lines of `looped`, made from its parser."""

import argparse

from looplab.cli import parser

(SUBPARSERS,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
VERBS: dict[str, argparse.ArgumentParser] = SUBPARSERS.choices
# What an argument is given that must be there, by its metavar: {runs} holds the toy runs, {new} is an empty folder.
GIVEN = {
    "RUN": "{runs}/hops",
    "MODEL": "{runs}/hops/model",
    "SOURCE": "{runs}/llama",
    "TARGET": "{new}/looped",
    "RECIPE": "{runs}/study.yaml",
    "DATA": "{runs}/text/data/test.parquet",
    "TOKENIZER": "{runs}/llama",
    "NAME": "arc_easy",
    "USER/NAME": "user/name",
}
READ = ("RUN", "MODEL", "SOURCE", "RECIPE", "DATA", "TOKENIZER")


def arguments_of(verb: str) -> list[argparse.Action]:
    return [action for action in VERBS[verb]._actions if action.dest not in ("help", "debug")]


def spelling(action: argparse.Action) -> list[str]:
    """How it begins on the command line."""
    return action.option_strings[:1]


def command(verb: str, changed: argparse.Action | None = None, value: str = "") -> list[str]:
    """A command line of a verb that works as far as its arguments go, but for one of them."""
    line, at_end = [verb], []
    groups = [group._group_actions[0] for group in VERBS[verb]._mutually_exclusive_groups if group.required]
    for action in arguments_of(verb):
        given = action.choices[0] if action.choices else GIVEN.get(action.metavar)
        if action is changed:
            values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
        elif (action.required or action in groups) and action.nargs != argparse.REMAINDER:
            values = [given]
        else:
            continue
        (at_end if action.option_strings else line).extend([*spelling(action), *values])
    return line + at_end


def readable(line: list[str]) -> str:
    return " ".join(argument or "''" for argument in line)
