"""The section `data` of a recipe on plain text."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.tasks.language.data import LanguageData


@strict
@dataclass
class TextData(LanguageData):
    """`files` are .txt or .md; the text of `looped fetch corpus` unless given.

    The tokenizer comes from exactly one of `init_from`, `tokenizer` and `vocab_size`.
    """

    task: Literal["text"] = "text"
    tokenizer: str | None = path()  # folder of a tokenizer
    vocab_size: int | None = number(at_least=1)  # learn a byte-level BPE of this size from the training text

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        sources = {"init_from": init_from, "data.tokenizer": self.tokenizer, "data.vocab_size": self.vocab_size}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"the tokenizer of a text comes from one of {', '.join(sources)}, got {' and '.join(given) or 'none'}."
            )

    def preset(self) -> tuple[str, dict]:
        return self.of_files("corpus")
