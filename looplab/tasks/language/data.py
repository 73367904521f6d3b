"""The fields of `data` that the recipes of text and molecules share."""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.shipped import own_files
from looplab.tasks.data import Data


@strict
@dataclass
class LanguageData(Data):
    files: list[str] | None = path()  # names and globs; a preset of the builder unless given
    sequence_length: int | None = number(at_least=1)  # tokens of a sequence
    validation_tokens: int | None = number(at_least=1)  # most held-out tokens that are measured; all unless given

    def of_files(self, otherwise: str) -> tuple[str, dict]:
        """`preset` for files or a data set that the recipe names; the preset `otherwise` if it names neither."""
        files = {} if self.files is None else {"files": [own_files(pattern) for pattern in self.files]}
        fields = {"seed": self.seed} | files | self.overrides
        named = self.files is not None or "dataset" in self.overrides
        return "files" if named else otherwise, fields

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        if self.sequence_length is None:
            raise ValueError(f"data.sequence_length must be set for the task {self.task}: the tokens of a sequence.")
