"""Plain text for language modelling: files, or a dataset of texts, cut into documents that are dealt to the splits.

    file        .txt or .md, or either with .gz; UTF-8. With `messages`, .jsonl with conversations, see `chats.py`
    document    whole paragraphs of one file, `document_characters` characters or a little more; or a conversation
    split       by a seeded hash of the document's text: test_share to test, validation_share to validation

Equal documents go to the same split, so that the splits are disjoint; copies of a document are dropped.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from huggingface_hub.constants import HF_HOME

from . import chats
from .fields import check_fields, number
from .files import expand_home, find_files, read_text
from .seeding import source_hash

VERSION = datasets.Version("1.0.0")

# What `looped fetch corpus` writes: a .txt file per page, collection of novels, or dictionary.
CORPUS = Path(HF_HOME) / "looped" / "corpus"

SUFFIXES = (".txt", ".md", ".txt.gz", ".md.gz")


@dataclass
class TextConfig(datasets.BuilderConfig):
    """Where the text comes from and how it is cut; any field may be given to `Text` or `load_task` by name."""

    version: datasets.Version = VERSION
    files: list[str] = field(default_factory=list)  # paths and globs; `**` is any number of folders
    dataset: dict = field(default_factory=dict)  # arguments of `datasets.load_dataset`, `path` and `split` among them
    column: str = "text"  # the column of `dataset` that holds the text
    messages: bool = False  # the rows are conversations
    document_characters: int = number(4_000, at_least=1, whole=True)  # a file is cut at the next blank line
    validation_share: int | float = number(0.01, above=0, below=0.5)  # share of the documents
    test_share: int | float = number(0.01, above=0, below=0.5)
    seed: int = number(0, at_least=0, whole=True)  # of the split

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Name of the cache folder: the name that `datasets` gives, and a fingerprint of the text itself.

        Raises ValueError for a field out of range, and as `sources` and `rows`.
        """
        check_fields(self)
        if bool(self.files) == bool(self.dataset):
            raise ValueError("name the text: either files, a list of paths and globs, or dataset.")
        contents = hashlib.sha256()
        if self.dataset:
            contents.update(self.rows()._fingerprint.encode())
        for source, path in self.sources().items():
            contents.update(f"{source}\n{hashlib.sha256(read_text(path).encode()).hexdigest()}\n".encode())
        return f"{super().create_config_id(config_kwargs, custom_features)}-{contents.hexdigest()[:16]}"

    def sources(self) -> dict[str, Path]:
        """Name -> file, sorted by file; a name is the path below the deepest folder that holds all files.

        Raises ValueError as `find_files`.
        """
        suffixes = chats.SUFFIXES if self.messages else SUFFIXES
        paths = find_files("files", self.files, suffixes, CORPUS, "looped fetch corpus")
        shared = os.path.commonpath([path.parent for path in paths]) if paths else ""
        return {path.relative_to(shared).as_posix(): path for path in paths}

    def rows(self) -> datasets.Dataset:
        """The rows of `dataset`; raises ValueError if it cannot be read, or has no column `column`."""
        arguments = expand_homes(self.dataset)
        try:
            rows = datasets.load_dataset(**arguments)
        except Exception as error:  # every kind of file has errors of its own
            while error.__cause__ is not None:
                error = error.__cause__
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"dataset {arguments} cannot be read: {reason}") from error
        if not isinstance(rows, datasets.Dataset):
            raise ValueError("dataset must give one split that is not streamed: add `split` to its arguments.")
        if self.column not in rows.column_names:
            raise ValueError(f"column must be one of {', '.join(rows.column_names)}, got {self.column!r}.")
        # pandas renames the second of two columns with one name to `NAME.1`.
        if arguments.get("path") == "csv" and f"{self.column}.1" in rows.column_names:
            raise ValueError(f"column {self.column} is there twice in dataset {arguments}: rename one of them.")
        return rows

    def texts(self) -> Iterator[tuple[str, str]]:
        """(source, text) of every file, or of every row of `dataset`."""
        for source, path in self.sources().items():
            yield source, read_text(path)
        rows = self.rows().select_columns(self.column) if self.dataset else []
        for row in range(len(rows)):
            place = f"row {row} (the first is 0), column {self.column} of dataset {self.dataset}"
            try:
                text = rows[row][self.column]
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is no UTF-8 ({error}): convert it, or take the row out.") from error
            if not isinstance(text, str):
                raise ValueError(f"{place}: {text!r} is no text: write it as one, or take the row out.")
            yield str(row), text

    def documents(self) -> Iterator[dict]:
        """Every document of every file, or of every row of `dataset`: its text and source; of a conversation, which is
        JSON, also its line."""
        if not self.messages:
            for source, text in self.texts():
                for document in documents(text, self.document_characters):
                    yield {"text": document, "source": source}
            return
        for source, path in self.sources().items():
            for line, document in chats.read_chats(path):
                yield {"text": document, "source": source, "line": line}
        rows = self.rows().select_columns(self.column) if self.dataset else []
        for row in range(len(rows)):
            place = f"row {row} (the first is 0), column {self.column} of dataset {self.dataset}"
            document = chats.conversation(rows[row][self.column], place)
            yield {"text": document, "source": str(row), "line": row}

    def split_of(self, digest: bytes) -> str:
        """The split of a document, from the hash of its text, read as a number in [0, 1)."""
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.test_share:
            return "test"
        return "validation" if place < self.test_share + self.validation_share else "train"


class Text(datasets.GeneratorBasedBuilder):
    """Documents of plain text in splits train, validation and test, pairwise disjoint and without duplicates.

    Configs: `corpus` (the text that `looped fetch corpus` wrote: 56 MB of English books, manuals, dictionaries and
    standards) and `files`, where you name the text: `files=["books/*.txt", "notes.md.gz"]`, or `dataset={"path":
    "json", "data_files": "texts.jsonl", "split": "train"}`. `source` is the file, or the row number in the dataset.
    `chats` has conversations, see `chats.py`: `files=["chats.jsonl"]`, or a dataset with a column of messages.
    The documents of one long file may go to different splits: held-out text is then unseen text of a known author.

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
        super().__init__(*args, hash=hash or source_hash(__file__, chats.__file__), **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features({"text": datasets.Value("string"), "source": datasets.Value("string")})
        if self.config.messages:
            features["line"] = datasets.Value("int64")
        return datasets.DatasetInfo(features=features, description=self.config.description)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(split, {"split": split}) for split in ("train", "validation", "test")]

    def _generate_examples(self, split: str):
        seen, total = set(), 0
        for document in self.config.documents():
            digest = hashlib.sha256(f"{self.config.seed}\n{document['text']}".encode()).digest()
            total += 1
            if self.config.split_of(digest) == split and digest not in seen:
                seen.add(digest)
                yield len(seen), document
        if not seen:
            raise ValueError(
                f"the split {split} has no documents and needs one at least (there are {total}, with validation_share "
                f"{self.config.validation_share:g} and test_share {self.config.test_share:g}): add text, change the "
                "shares, or lower document_characters."
            )


def expand_homes(value):
    """An argument of `load_dataset`, with the home folder in the place of a leading `~` in every text."""
    if isinstance(value, dict):
        return {name: expand_homes(each) for name, each in value.items()}
    if isinstance(value, list):
        return [expand_homes(each) for each in value]
    return expand_home("dataset", value) if isinstance(value, str) and value.startswith("~") else value


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
