"""The section `data` of a recipe on plain text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.tasks.language.data import LanguageData

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from data_builders import TextBlocks

SUFFIXES = (".jsonl", ".jsonl.gz")  # of files with conversations


@strict
@dataclass
class TextData(LanguageData):
    """`files` are .txt or .md; or .jsonl with conversations, which the tokenizer's chat template writes out. They are
    the text of `looped fetch corpus` unless given.

    The tokenizer comes from exactly one of `init_from`, `tokenizer` and `vocab_size`.
    """

    task: Literal["text"] = "text"  # plain text
    tokenizer: str | None = path()  # folder of a tokenizer
    vocab_size: int | None = number(at_least=1)  # learn a byte-level BPE of this size from the training text
    assistant_only_loss: bool | None = None  # of conversations: learn what assistants wrote alone; so unless given

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        sources = {"init_from": init_from, "data.tokenizer": self.tokenizer, "data.vocab_size": self.vocab_size}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"the tokenizer of a text comes from one of {', '.join(sources)}, got {' and '.join(given) or 'none'}."
            )

        chats = [name for name in self.files or [] if name.endswith(SUFFIXES)]
        if chats and len(chats) < len(self.files or []):
            raise ValueError(f"data.files mixes text and conversations ({chats[0]}): train on one of them.")
        if not self.chats and self.assistant_only_loss is not None:
            raise ValueError(
                "data.assistant_only_loss is for conversations: name .jsonl files, or a dataset with "
                "data.overrides.messages=true."
            )
        if self.chats and self.vocab_size is not None:
            raise ValueError(
                "data.vocab_size learns a tokenizer without a chat template, which conversations need: name one in "
                "init_from or data.tokenizer."
            )

    @property
    def chats(self) -> bool:
        """Whether the rows are conversations."""
        return bool(self.overrides.get("messages")) or any(name.endswith(SUFFIXES) for name in self.files or [])

    def preset(self) -> tuple[str, dict]:
        preset, fields = self.of_files("corpus")
        return "chats" if self.chats else preset, fields

    def blocks(self, split: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> "TextBlocks":
        """The blocks of a split, `sequence_length` tokens each. Raises ValueError as `TextBlocks` and `ChatBlocks`."""
        from data_builders import ChatBlocks, TextBlocks

        if not self.chats:
            return TextBlocks(split, tokenizer, self.sequence_length)
        return ChatBlocks(split, tokenizer, self.sequence_length, self.assistant_only_loss is not False)
