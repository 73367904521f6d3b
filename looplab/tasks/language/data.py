"""The fields of `data` that the recipes of text, molecules and sequences share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.shipped import own_files
from looplab.tasks.data import Data


@strict
@dataclass
class NamedData(Data):
    """Data that a user may name: files, or a data set."""

    files: list[str] | None = path()  # names and globs; a preset of the builder unless given
    dataset: dict | None = None  # in place of files: arguments of datasets.load_dataset, path and split among them

    @property
    def named_dataset(self) -> dict | None:
        """`dataset`, which older recipes have in `overrides`."""
        return self.overrides.get("dataset") if self.dataset is None else self.dataset

    def of_files(self, otherwise: str) -> tuple[str, dict]:
        """`preset` for files or a data set that the recipe names; the preset `otherwise` if it names neither."""
        files = {} if self.files is None else {"files": [own_files(pattern) for pattern in self.files]}
        dataset = {} if self.dataset is None else {"dataset": self.dataset}
        fields = {"seed": self.seed} | files | dataset | self.overrides
        named = self.files is not None or self.named_dataset is not None
        return "files" if named else otherwise, fields

    def kept(self, splits: Mapping) -> Mapping:
        named = self.files is not None or self.named_dataset is not None or "files" in self.overrides
        return splits if named else {}

    def here(self) -> bool:
        dataset = self.named_dataset or {}
        path = str(dataset.get("path", "."))
        # A kind of file, such as json, reads files of this machine; beside the name of a data set they are in it.
        return Path(path).exists() or ("/" not in path and not dataset.keys().isdisjoint(("data_files", "data_dir")))

    def located(self, folder: Path) -> Self:
        files = None if self.files is None else [below(folder, name) for name in self.files]
        overrides = {
            name: [below(folder, each) for each in value] if name.endswith("files") else value
            for name, value in self.overrides.items()
        }
        if "dataset" in overrides:
            overrides["dataset"] = located_rows(overrides["dataset"], folder)
        dataset = None if self.dataset is None else located_rows(self.dataset, folder)
        return replace(self, files=files, dataset=dataset, overrides=overrides)


@strict
@dataclass
class LanguageData(NamedData):
    """Data in sequences of one length."""

    sequence_length: int | None = number(at_least=1)  # tokens of a sequence
    validation_tokens: int | None = number(at_least=1)  # most held-out tokens that are measured; all unless given

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        if self.sequence_length is None:
            raise ValueError(f"data.sequence_length must be set for the task {self.task}: the tokens of a sequence.")


def below(folder: Path, name: str) -> str:
    """The name of a file, below `folder` if it is relative; one of the Hub or of the home folder stays."""
    return name if "://" in name or name.startswith("~") else str(folder / name)


def located_rows(arguments: dict, folder: Path) -> dict:
    """Arguments of `datasets.load_dataset` with local names below `folder`: a path that is there, or the files of a
    kind of file such as json."""
    path = str(arguments.get("path"))
    if "/" in path or (folder / path).exists():
        return arguments | {"path": below(folder, path) if (folder / path).exists() else path}

    def moved(value):
        if isinstance(value, dict):
            return {name: moved(each) for name, each in value.items()}
        return [moved(each) for each in value] if isinstance(value, list) else below(folder, value)

    return arguments | {name: moved(arguments[name]) for name in ("data_files", "data_dir") if name in arguments}
