"""Data that a user names: files, or a data set, dealt to the splits train, validation and test.

split   by a seeded hash of what must not be in two splits: test_share to test, validation_share to validation; or
        the split of the data set, or the files, that the user names for it
"""

import hashlib
import os
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import datasets

from .fields import check_fields, number
from .files import find_files
from .rows import load_rows

HELD_OUT = ("test", "validation")  # what is named for both is in the first


@dataclass
class NamedConfig(datasets.BuilderConfig):
    """Where the data come from, and which share of them is held out.

    Attributes:
        what: what the user names, for messages.
    """

    what: ClassVar[str]

    files: list[str] = field(default_factory=list)  # paths and globs; `**` is any number of folders
    dataset: dict = field(default_factory=dict)  # arguments of `datasets.load_dataset`, `path` and `split` among them
    validation_files: list[str] = field(default_factory=list)  # the split validation, in place of `validation_share`
    test_files: list[str] = field(default_factory=list)
    validation_split: str | None = None  # the split of `dataset` to validate on, in place of `validation_share`
    test_split: str | None = None
    validation_share: int | float = number(0.01, above=0, below=0.5)  # of what is dealt
    test_share: int | float = number(0.01, above=0, below=0.5)
    seed: int = number(0, at_least=0, whole=True)  # of the split

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files that are read."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Field of this config -> the column of the data set that it names, and that must be there."""

    def fetched(self) -> tuple[Path, str] | tuple[()]:
        """A folder of files that a command fetches, and the command."""
        return ()

    @abstractmethod
    def digest_of(self, path: Path) -> str:
        """A digest of what is read of a file. Raises ValueError for a file that cannot be read."""

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Name of the cache folder: the name that `datasets` gives, and a fingerprint of the data themselves.

        Raises ValueError for a field out of range, and as `sources` and `rows`.
        """
        self.check()
        contents = hashlib.sha256()
        for rows in map(self.rows, self.named()):
            contents.update(b"" if rows is None else rows._fingerprint.encode())
        for split, sources in self.sources().items():
            for source, path in sources.items():
                contents.update(f"{source}\n{self.digest_of(path)}\n{'' if split == 'train' else split}".encode())
        return f"{super().create_config_id(config_kwargs, custom_features)}-{contents.hexdigest()[:16]}"

    def check(self) -> None:
        """Raise ValueError for a field out of range, and for fields that contradict each other."""
        check_fields(self)
        if bool(self.files) == bool(self.dataset):
            raise ValueError(f"name the {self.what}: either files, a list of paths and globs, or dataset.")
        for split in HELD_OUT:
            files, name, share = (f"{split}_{what}" for what in ("files", "split", "share"))
            given = [field for field in (files, name) if vars(self)[field]]
            if len(given) > 1:
                raise ValueError(f"{files} and {name} name the same thing: leave one of them out.")
            if vars(self)[name] and not self.dataset:
                raise ValueError(f"{name} is a split of dataset, and there is none: name {files}, or leave it out.")
            default = type(self).__dataclass_fields__[share].default
            if given and vars(self)[share] != default:
                raise ValueError(f"{share} deals rows to the split that {given[0]} names: leave one of them out.")

    def named(self) -> list[str]:
        """The splits that the user names, and train, which is dealt to the splits that have none."""
        return [split for split in HELD_OUT if vars(self)[f"{split}_files"] or vars(self)[f"{split}_split"]] + [
            "train"
        ]

    def sources(self) -> dict[str, dict[str, Path]]:
        """Split -> name -> file, sorted by file; a name is the path below the deepest folder that holds all files.

        Raises ValueError as `find_files`.
        """
        paths = {}
        for split, name in (("test", "test_files"), ("validation", "validation_files"), ("train", "files")):
            if vars(self)[name]:
                paths[split] = find_files(name, vars(self)[name], self.suffixes, *self.fetched())
        every = [path.parent for found in paths.values() for path in found]
        shared = os.path.commonpath(every) if every else ""
        return {split: {path.relative_to(shared).as_posix(): path for path in found} for split, found in paths.items()}

    def rows(self, split: str) -> datasets.Dataset | None:
        """The rows of the data set that a split is made of; None if there are none.

        Raises ValueError as `load_rows`, or if a column that is named is not there.
        """
        field = "dataset.split" if split == "train" else f"{split}_split"
        name = self.dataset.get("split") if split == "train" else vars(self)[field]
        if not self.dataset or (split != "train" and name is None):
            return None
        arguments = {key: value for key, value in self.dataset.items() if key != "split"}
        rows = load_rows(arguments, field, name)
        for field, column in self.columns.items():
            if column not in rows.column_names:
                raise ValueError(f"{field} must be one of {', '.join(rows.column_names)}, got {column!r}.")
            # pandas renames the second of two columns with one name to `NAME.1`.
            if arguments.get("path") == "csv" and f"{column}.1" in rows.column_names:
                raise ValueError(f"column {column} is there twice in dataset {arguments}: rename one of them.")
        return rows

    def split_of(self, digest: bytes) -> str:
        """The split that something is dealt to, from a hash of it, read as a number in [0, 1)."""
        place, below = int.from_bytes(digest[:8], "big") / 2**64, 0.0
        for split in HELD_OUT:
            below += 0.0 if split in self.named() else vars(self)[f"{split}_share"]
            if place < below:
                return split
        return "train"
