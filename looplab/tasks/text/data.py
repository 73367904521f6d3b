"""The section `data` of a recipe on plain text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.runs.folder import Run
from looplab.tasks.data import RowShape
from looplab.tasks.language.data import LanguageData, below

from .sources import Rows, Shards, Source, Stream

SUFFIXES = (".jsonl", ".jsonl.gz")  # of files with conversations


@strict
@dataclass
class TextData(LanguageData):
    """`files` are .txt or .md; or .jsonl with conversations, which the tokenizer's chat template writes out. They are
    the text of `looped fetch corpus` unless given. A `dataset` with streaming: true is read on the way.

    The tokenizer comes from exactly one of `init_from`, `tokenizer` and `vocab_size`; that of `tokens` is beside them.
    """

    task: Literal["text"] = "text"  # plain text
    tokenizer: str | None = path()  # folder of a tokenizer
    vocab_size: int | None = number(at_least=1)  # learn a byte-level BPE of this size from the training text
    assistant_only_loss: bool | None = None  # of conversations: learn what assistants wrote alone; so unless given
    tokens: str | None = path()  # in place of files: a folder that `looped tokenize` wrote; its tokenizer is in it
    held_out_documents: int = number(1000, at_least=1)  # of a stream: most documents of each split that is held out
    shuffle_blocks: int = number(1024, at_least=1)  # of a stream: blocks of a part that are mixed
    parts: int | None = number(
        at_least=1
    )  # of a stream: a multiple of the processes, which are these many unless given
    workers: int = number(0, at_least=0)  # of a stream: processes that read and tokenise a part
    prefetch: int = number(2, at_least=1)  # of a stream: batches of 64 documents that each worker reads ahead

    @property
    def source(self) -> Source:
        """Where the text comes from, which decides how it is read."""
        if self.tokens is not None:
            return Shards(self)
        return Stream(self) if (self.named_dataset or {}).get("streaming") else Rows(self)

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        self.source.check()
        sources = self.source.tokenizers(init_from)
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

    def shape(self) -> RowShape:
        assert self.sequence_length is not None  # `check` refuses it
        return RowShape(self.vocab_size, {self.sequence_length: 1.0})

    def load(self, **changed) -> Mapping:
        return self.source.load(**changed)

    def find(self, run: Run, **changed) -> Mapping:
        return self.source.find(run, **changed)

    def kept(self, splits: Mapping) -> Mapping:
        return self.source.kept(splits)

    def check_published(self) -> None:
        if not isinstance(self.source, Rows):
            raise ValueError(
                "--dataset publishes rows, and this run was trained on a stream or on token shards: leave it out."
            )

    def located(self, folder: Path) -> Self:
        tokens = None if self.tokens is None else below(folder, self.tokens)
        return replace(super().located(folder), tokens=tokens)
