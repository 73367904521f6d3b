"""Fields that a user fills in: each declares its range, and `check_fields` checks ranges and annotated types at once.

validation_share: float = number(0.01, above=0, below=0.5)
eval_loops: list[int] = numbers([], at_least=1, distinct=True)
output_dir: str = path("runs")
"""

import copy
import inspect
import sys
from dataclasses import dataclass, field, fields, is_dataclass

from huggingface_hub.dataclasses import type_validator

Number = int | float

# The most loops that a batch may draw: `DepthSampler` keeps a probability for each loop count.
MOST_LOOPS = 10_000


@dataclass(frozen=True)
class Range:
    """Where a finite number must lie.

    whole: integers only. distinct: no number of a list comes twice.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    whole: bool = False
    distinct: bool = False

    def check(self, name: str, value):
        """Raise ValueError, beginning with the `name` of the field, for anything but a number in the range."""
        integer = isinstance(value, int) and not isinstance(value, bool)
        if not integer and (self.whole or not isinstance(value, float)):
            raise ValueError(f"{name} must be {self}, got {value!r}.")
        if not abs(value) <= (2**63 - 1 if integer else sys.float_info.max):
            raise ValueError(f"{name} must be {self} and {'below 2**63' if integer else 'finite'}, got {value!r}.")
        if not (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        ):
            raise ValueError(f"{name} must be {self}, got {value!r}.")

    def check_field(self, name: str, value):
        """`check` a number, each number of a list, or each value of a dict; None is allowed."""
        if isinstance(value, (list, tuple)):
            for i, each in enumerate(value):
                self.check(f"{name}[{i}]", each)
                if self.distinct and each in value[:i]:
                    raise ValueError(f"{name} has {each!r} twice, in {value!r}: leave one out.")
        elif isinstance(value, dict):
            for key, each in value.items():
                self.check(f"{name}.{key}", each)
        elif value is not None:
            self.check(name, value)

    def __str__(self) -> str:
        bounds = {">=": self.at_least, ">": self.above, "<=": self.at_most, "<": self.below}
        parts = [f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None]
        if self.at_least is not None and self.below is not None:
            parts = [f"in [{self.at_least}, {self.below})"]
        elif self.above is not None and self.below is not None:
            parts = [f"above {self.above} and below {self.below}"]
        kind = "a whole number" if self.whole else "" if parts else "a number"
        return f"{kind} {' and '.join(parts)}".strip()


def number(default=None, **bounds):
    """A field of a dataclass that holds a number in `Range(**bounds)`, or None."""
    return field(default=default, metadata={"range": Range(**bounds)})


def numbers(default=(), **bounds):
    """A field of a dataclass that holds a list of numbers, each in `Range(**bounds)`."""
    default = None if default is None else list(default)
    return field(default_factory=lambda: copy.copy(default), metadata={"range": Range(**bounds)})


def path(default: str | None = None):
    """A field of a dataclass that names a file or a folder, or a list of them; a leading `~` means the home folder."""
    return field(default=default, metadata={"path": True})


def check_fields(section, prefix: str = ""):
    """Raise ValueError, with the dotted name, for a field outside its range or of another type than declared.

    prefix: what stands before the field names of this section, such as "data.".
    """
    for item in fields(section):
        name, value = prefix + item.name, vars(section)[item.name]
        if "range" in item.metadata:
            item.metadata["range"].check_field(name, value)
        try:
            type_validator(name, value, item.type)
        except TypeError as error:
            raise ValueError(f"{name} must be {inspect.formatannotation(item.type)}, got {value!r}.") from error
        if is_dataclass(value):
            check_fields(value, f"{name}.")
