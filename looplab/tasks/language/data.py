"""Fields of a recipe on rows of tokens: what text and molecules share."""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.tasks.data import Data


@strict
@dataclass
class LanguageData(Data):
    files: list[str] | None = path()  # names and globs; without them a preset of the builder
    sequence_length: int | None = number(at_least=1)  # tokens of a row
    validation_tokens: int | None = number(at_least=1)  # measure on so many held-out tokens, not on all

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        if self.sequence_length is None:
            raise ValueError(f"data.sequence_length must be set for the task {self.task}: the tokens of a row.")
