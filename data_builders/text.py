"""Plain text for language modelling: files, or a dataset of texts, cut into documents that are dealt to the splits.

    file        .txt or .md, or either with .gz; UTF-8. With `messages`, .jsonl with conversations, see `chats.py`
    document    whole paragraphs of one file, `document_characters` characters or a little more; or a conversation
    split       by a seeded hash of the document's text: test_share to test, validation_share to validation; or the
                split of the data set, or the files, that the user names for it

Equal documents go to the same split, so that the splits are disjoint; copies of a document are dropped. A document
that the user names for validation or test is in no other split, wherever else it stands.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
from huggingface_hub.constants import HF_HOME

from . import chats, named_data
from .fields import number
from .files import read_text
from .named_data import NamedConfig
from .seeding import source_hash

VERSION = datasets.Version("1.0.0")

# What `looped fetch corpus` writes: a .txt file per page, collection of novels, or dictionary.
CORPUS = Path(HF_HOME) / "looped" / "corpus"

SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz")


@dataclass
class TextConfig(NamedConfig):
    """Where the text comes from and how it is cut; any field may be given to `Text` or `load_task` by name."""

    what: ClassVar = "text"
    version: datasets.Version = VERSION
    column: str = "text"  # the column of `dataset` that holds the text
    messages: bool = False  # the rows are conversations
    document_characters: int = number(4_000, at_least=1, whole=True)  # a file is cut at the next blank line

    @property
    def suffixes(self) -> tuple[str, ...]:
        return chats.SUFFIXES if self.messages else SUFFIXES

    @property
    def columns(self) -> dict[str, str]:
        return {"column": self.column}

    def fetched(self) -> tuple[Path, str]:
        return CORPUS, "looped fetch corpus"

    def digest_of(self, path: Path) -> str:
        return hashlib.sha256(read_text(path).encode()).hexdigest()

    def texts(self, split: str = "train") -> Iterator[tuple[str, str]]:
        """(source, text) of every file, or of every row of the data set, that a split is made of."""
        for source, path in self.sources().get(split, {}).items():
            yield source, read_text(path)
        rows = self.rows(split)
        rows = None if rows is None else rows.select_columns(self.column)
        for row in range(len(rows or ())):
            place = f"row {row} (the first is 0), column {self.column} of dataset {self.dataset}"
            try:
                text = rows[row][self.column]
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is no UTF-8 ({error}): convert it, or take the row out.") from error
            if not isinstance(text, str):
                raise ValueError(f"{place}: {text!r} is no text: write it as one, or take the row out.")
            yield str(row), text

    def documents(self, split: str) -> Iterator[dict]:
        """Every document of every file, or of every row of the data set, that a split is made of: its text and
        source; of a conversation, which is JSON, also its line."""
        if not self.messages:
            for source, text in self.texts(split):
                for document in documents(text, self.document_characters):
                    yield {"text": document, "source": source}
            return
        for source, path in self.sources().get(split, {}).items():
            for line, document in chats.read_chats(path):
                yield {"text": document, "source": source, "line": line}
        rows = self.rows(split)
        rows = None if rows is None else rows.select_columns(self.column)
        for row in range(len(rows or ())):
            place = f"row {row} (the first is 0), column {self.column} of dataset {self.dataset}"
            document = chats.conversation(rows[row][self.column], place)
            yield {"text": document, "source": str(row), "line": row}


class Text(datasets.GeneratorBasedBuilder):
    """Documents of plain text in splits train, validation and test, pairwise disjoint and without duplicates.

    Configs: `corpus` (the text that `looped fetch corpus` wrote: 56 MB of English books, manuals, dictionaries and
    standards) and `files`, where you name the text: `files=["books/*.txt", "notes.md.gz"]`, or `dataset={"path":
    "json", "data_files": "texts.jsonl", "split": "train"}`; the path of a dataset may be a folder of `save_to_disk`.
    `validation_split` and `test_split`, or `validation_files` and `test_files`, name the splits that the data have.
    `source` is the file, or the row number in the dataset. `chats` has conversations, see `chats.py`:
    `files=["chats.jsonl"]`, or a dataset with a column of messages. The documents of one long file may go to different
    splits: held-out text is then unseen text of a known author.

    One example:

    >>> load_task("text", "corpus")["test"][22]
    {'text': 'BLACKGUARD, n. A man whose qualities, prepared for display like a box of berries in a market -- ...',
     'source': 'dict-devil/dictd-devil-dict-dz.txt'}

    The cache follows the contents of the files: a changed file is read again. A text of white space has no document.

    Raises ValueError for a config field that is unknown or out of range, files that are missing, of another kind or
    not UTF-8, a row that is not text, and a split without a document.
    """

    VERSION = VERSION
    TAGS = ()  # what the card of an exported data set is found by on the Hub
    BUILDER_CONFIG_CLASS = TextConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        TextConfig(
            name="corpus",
            description="English books, manuals, dictionaries and standards, from Debian packages.",
            files=[str(CORPUS / "**" / "*.txt")],
        ),
        TextConfig(name="files", description="Text files, or a dataset, that the user names."),
        TextConfig(
            name="chats",
            description="Conversations, in .jsonl files or a dataset, that the user names.",
            column="messages",
            messages=True,
        ),
    ]

    def __init__(self, *args, hash: str | None = None, **kwargs):
        super().__init__(*args, hash=hash or source_hash(__file__, chats.__file__, named_data.__file__), **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features({"text": datasets.Value("string"), "source": datasets.Value("string")})
        if self.config.messages:
            features["line"] = datasets.Value("int64")
        return datasets.DatasetInfo(features=features, description=self.config.description)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(split, {"split": split}) for split in ("train", "validation", "test")]

    def _generate_examples(self, split: str):
        named, seen, count = self.config.named(), set(), 0
        for owner in named:  # train last: what is held out is not trained on
            for document in self.config.documents(owner):
                digest = hashlib.sha256(f"{self.config.seed}\n{document['text']}".encode()).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                if split == (self.config.split_of(digest) if owner == "train" else owner):
                    count += 1
                    yield count, document
            if owner == split:
                break
        if not count:
            raise ValueError(
                f"the split {split} has no documents and needs one at least (there are {len(seen)}, with "
                f"validation_share {self.config.validation_share:g} and test_share {self.config.test_share:g}): add "
                "text, change the shares, or lower document_characters."
            )


def documents(text: str, document_characters: int) -> Iterator[str]:
    """Documents of a text: paragraphs are gathered until they have `document_characters`; the last may have fewer."""
    gathered, length = [], 0
    for paragraph in re.split(r"\n(?:[^\S\n]*\n)+", text):
        if paragraph.strip():
            gathered.append(paragraph.rstrip())
            length += len(paragraph)
        if length >= document_characters:
            yield "\n\n".join(gathered)
            gathered, length = [], 0
    if gathered:
        yield "\n\n".join(gathered)
