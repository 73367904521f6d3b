"""Tell a user's mistake from a bug. `looped` and train.py tell a mistake in one sentence on stderr, exit status 2.

    ValueError, OSError             an argument or a file is refused; most are raised by this project
    StrictDataclassError            a field of a transformers configuration is refused
    ImportError                     the package of an extra is not installed
    MemoryError                     the work does not fit into memory
    FloatingPointError              the loss is no longer finite
    KeyboardInterrupt               exit status 130, without a word
    BrokenPipeError                 exit status 141: the reader of the output has enough (`looped table ... | head`)

Every other exception is a bug of this project and stays a traceback, since a bug report needs it and a long run cannot
be repeated to get it. `--debug` shows the traceback of a mistake, too.
"""

import argparse
import difflib
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NoReturn

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# "Validation error for field 'num_loops': ValueError: must be ..." -> the field, the reason
FIELD = re.compile(r"Validation error for field '(\w+)': \w+: (.*)")
# torch's errors are RuntimeErrors, on the CPU without a class of their own.
NO_MEMORY = re.compile(r"out of memory|can't allocate memory")
VALIDATOR = re.compile(r"Class validation error for validator '\w+': \w+: (.*)")


def sentence(error: BaseException) -> str | None:
    """The one line that tells the user of a mistake; None if `error` is a bug."""
    from huggingface_hub.errors import StrictDataclassError  # imported only on failure, so that --help stays quick

    said = " ".join(str(error).split())
    if isinstance(error, StrictDataclassError):
        if found := FIELD.fullmatch(said):
            name, reason = found.groups()
            return reason if reason.startswith("Field ") else f"{name} {reason}"
        found = VALIDATOR.fullmatch(said)
        return found[1] if found else said
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(said)):
        return f"there is not enough memory for this: ask for less at once. {said}".strip()
    if isinstance(error, UnicodeDecodeError):
        return f"what is read is not text in UTF-8 ({said}): save it as UTF-8."
    if isinstance(error, ImportError) and said:
        extra = extra_with(error.name or "")
        return f"{said}: pip install 'looped-transformers[{extra}]'." if extra else f"a package is missing ({said})."
    return said or type(error).__name__ if isinstance(error, (ValueError, OSError, FloatingPointError)) else None


def extra_with(module: str) -> str | None:
    """The extra of this project that installs a module; None if no extra does, or the project is not installed."""
    try:
        needs = [Requirement(need) for need in metadata.requires("looped-transformers") or ()]
    except metadata.PackageNotFoundError:
        return None
    package = canonicalize_name(module.split(".")[0])
    extras = [
        re.search(r"extra == .(\w+)", str(need.marker)) for need in needs if canonicalize_name(need.name) == package
    ]
    return next((found[1] for found in extras if found), None)


@dataclass(frozen=True)
class Whole:
    """The type of an option that takes a multiple of `step` from `lowest` to `highest`, both inclusive."""

    lowest: int = 1
    highest: int = 10**9
    step: int = 1

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = self.lowest - 1
        if not self.lowest <= value <= self.highest or value % self.step:
            raise argparse.ArgumentTypeError(f"must be {self}, got {text!r}")
        return value

    def __str__(self) -> str:
        kind = "an integer" if self.step == 1 else f"a multiple of {self.step}"
        return f"{kind} from {self.lowest} to {self.highest}"


class HelpFormatter(argparse.HelpFormatter):
    """Adds to the line of an argument the range of its number, and its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        kind = f"; {action.type}" if isinstance(action.type, Whole) else ""
        default = action.default if action.option_strings and action.nargs != 0 else None
        if isinstance(default, Sequence) and not isinstance(default, str):
            default = " ".join(map(str, default)) or None
        shown = "" if default in (None, argparse.SUPPRESS) or "default:" in said else f" (default: {default})"
        return f"{said}{kind}{shown}"


@dataclass(frozen=True)
class Real:
    """The type of an option that takes a number from `lowest` to `highest`, both inclusive."""

    lowest: float
    highest: float

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not self.lowest <= value <= self.highest:
            raise argparse.ArgumentTypeError(f"must be {self}, got {text!r}")
        return value

    def __str__(self) -> str:
        return f"a number from {self.lowest} to {self.highest}"


class Parser(argparse.ArgumentParser):
    """A parser that tells an error on one line, without the usage.

    Attributes:
        more: makes the text that comes after the help of the arguments.
        unsuggested: options that no message proposes, since they replace something.
    """

    more: Callable[[], str] | None = None
    unsuggested: frozenset[str] = frozenset()

    def __init__(self, *args, formatter_class=HelpFormatter, **kwargs):
        # No abbreviations: an option that is added later could take over what one means today.
        super().__init__(*args, formatter_class=formatter_class, allow_abbrev=False, **kwargs)

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.more()}" if self.more else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see `{self.prog} --help`.\n")

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Exit if arguments are left that no option took; the message suggests the nearest option."""
        if unknown:
            known = [option for option in self._option_string_actions if option not in self.unsuggested]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            self.error(f"unknown argument {unknown[0]!r}{f' (did you mean {near[0]}?)' if near else ''}")


def run_command(name: str, call: Callable[[], object], debug: bool = False, rank: int = 0) -> int:
    """Call `call`, tell a mistake, and return the exit status. A bug is raised as it is.

    Args:
        name: of the command; the sentence begins with it.
        debug: show the traceback of a mistake as well.
        rank: of this process among those on this machine. Of a mistake that all processes make, rank 0 tells first.
    """
    for library in ("torchao", "torch.utils._pytree"):  # they log warnings when they are imported
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        call()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit, and must not fail
        return 141
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        if debug:
            traceback.print_exc()
        if rank > 0 and isinstance(error, (ValueError, FloatingPointError)):
            # A launcher ends all processes when one ends: rank 0 has to speak first, if it made the mistake, too.
            time.sleep(3)
            name = f"{name}, process {rank}"
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        return 2
    return 0
