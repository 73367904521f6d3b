"""Fields of a recipe on plain text."""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.tasks.language.data import LanguageData


@strict
@dataclass
class TextData(LanguageData):
    """`files` are .txt or .md; without them the text is what `looped fetch corpus` made.

    The tokenizer comes from `init_from`, `tokenizer` or `vocab_size`.
    """

    task: Literal["text"] = "text"
    tokenizer: str | None = path()  # a folder with a tokenizer in it
    vocab_size: int | None = number(at_least=1)  # of a byte-level BPE that is learnt from the training text

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        sources = {"init_from": init_from, "data.tokenizer": self.tokenizer, "data.vocab_size": self.vocab_size}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"the tokenizer of a text comes from one of {', '.join(sources)}, got {' and '.join(given) or 'none'}."
            )

    def load(self):
        from data_builders import load_text

        return load_text(self.files, **({"seed": self.seed} | self.overrides))
