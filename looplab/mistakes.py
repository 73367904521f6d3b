"""What counts as a user's mistake, and how `looped` and train.py tell it: one sentence on stderr, exit status 2.

    ValueError, OSError             something that was given, or a file, is refused; most are raised by this project
    StrictDataclassError            a field of a configuration of transformers
    ImportError                     a package of an extra is not installed
    MemoryError, FloatingPointError the work asked for does not fit, or its loss is no longer finite
    KeyboardInterrupt               exit status 130, and nothing is said
    BrokenPipeError                 exit status 141: whoever read the output has enough (`looped table ... | head`)

Everything else is a fault of ours and stays a traceback: a report of it needs one, and a long run cannot be repeated
to get it. `--debug` shows the traceback of a mistake, too.
"""

import argparse
import difflib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NoReturn

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# "Validation error for field 'num_loops': ValueError: must be ..." -> field, what is wrong with it
FIELD = re.compile(r"Validation error for field '(\w+)': \w+: (.*)")
# torch's errors are RuntimeErrors, on the CPU without a class of their own.
NO_MEMORY = re.compile(r"out of memory|can't allocate memory")
VALIDATOR = re.compile(r"Class validation error for validator '\w+': \w+: (.*)")


def sentence(error: BaseException) -> str | None:
    """What the user is told of a mistake, on one line; None for what is a fault of ours."""
    from huggingface_hub.errors import StrictDataclassError  # only when something failed: --help stays quick

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


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see `{self.prog} --help`.\n")

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Exit if there are arguments that no option took, with the option that one may have meant."""
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]!r}{f' (did you mean {near[0]}?)' if near else ''}")


def run_command(name: str, call: Callable[[], object], debug: bool = False, rank: int = 0) -> int:
    """Call `call`; returns the exit status.

    Args:
        name: of the command, before the sentence.
        debug: show the traceback of a mistake as well.
        rank: of this process among those on this machine. What all of them find out is said by the first alone.
    """
    for library in ("torchao", "torch.utils._pytree"):  # which warn of themselves when they are imported
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        call()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes nowhere
        return 141
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        if debug:
            traceback.print_exc()
        if rank == 0 or not isinstance(error, (ValueError, FloatingPointError)):
            print(f"{name}: {said}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # a launcher ends all processes with the first that fails: that one has to speak first
        return 2
    return 0
