"""Questions that a user names, for the task `sequence`: files, or a data set, dealt to train, validation and test.

    file     .jsonl or .csv, each also with .gz; or .parquet
    row      a prompt and an answer, each in a column; perhaps how hard it is (grade) and what it is (kind)
    messages a column of messages in place of both: the last one is an assistant's, and is the answer
    split    by a seeded hash of the prompt, see `named_data.py`; rows above `train_grades` are in test alone

A prompt is in one split: with other answers, too. A row that comes again is dropped, and a row whose prompt is among
those that the user names for validation or test is not trained on.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import datasets

from . import chats, named_data, sequences
from .fields import number
from .files import read_csv, read_json, read_text
from .named_data import NamedConfig
from .seeding import source_hash
from .sequences import FEATURES

VERSION = datasets.Version("1.0.0")

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
PLACES = {"source": datasets.Value("string"), "line": datasets.Value("int64")}  # columns that say where a row is from
LENGTH = "length"  # as `grade`, where the rows have no such column: how long the prompt is
LONGEST = 2**31  # a grade is below


@dataclass
class QuestionsConfig(NamedConfig):
    """Where the questions come from; any field may be given to `Questions` or `load_task` by name."""

    what: ClassVar = "questions"
    version: datasets.Version = VERSION
    prompt: str = "prompt"  # columns of the rows
    answer: str = "answer"
    grade: str | None = None  # a column of whole numbers; `length` counts the prompt where there is no such column
    kind: str | None = None
    messages: bool = False  # the rows are conversations, in the column `messages`
    counted: Literal["characters", "words"] = "characters"  # what a length is of, white space left out
    train_grades: int | None = number(at_least=0, whole=True)  # harder rows are in test alone
    validation_share: int | float = number(0.05, above=0, below=0.5)
    test_share: int | float = number(0.05, above=0, below=0.5)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return SUFFIXES

    @property
    def columns(self) -> dict[str, str]:
        named = {} if self.messages else {"prompt": self.prompt, "answer": self.answer}
        named |= {} if self.grade in (None, LENGTH) else {"grade": self.grade}
        return named | ({} if self.kind is None else {"kind": self.kind})

    def digest_of(self, path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def questions(self, split: str) -> Iterator[dict]:
        """Every row that a split is made of, with the columns of `Questions`."""
        for source, path in self.sources().get(split, {}).items():
            for line, row in read_rows(path):
                yield self.question(row, f"{path}, {place_of(path)} {line}") | {"source": source, "line": line}
        rows = self.rows(split)
        for line in range(len(rows or ())):
            question = self.question(rows[line], f"row {line} (the first is 0) of dataset {self.dataset}")
            yield question | {"source": str(self.dataset["path"]), "line": line}

    def question(self, row: dict, place: str) -> dict:
        """prompt, answer, grade and kind of a row. place: where it is, for the message of an error.

        Raises ValueError for a column that is missing, an empty prompt or answer, and a grade that is no whole number.
        """

        def refuse(what: str, remedy: str = "correct the row, or take it out") -> ValueError:
            return ValueError(f"{place}: {what}: {remedy}.")

        def cell(field: str, column: str):
            if column not in row:
                known = ", ".join(map(str, row)) or "none"
                named = "" if self.messages else f"name another one in data.{field}, or "
                raise refuse(f"there is no {column!r}, and the row has {known}", f"{named}add it")
            return row[column]

        if self.messages:
            messages = json.loads(chats.conversation(cell("messages", "messages"), place))
            if messages[-1]["role"] != "assistant" or len(messages) < 2:
                raise refuse("the last message must be an assistant's, after another one, since it is the answer")
            prompt = json.dumps(messages[:-1], ensure_ascii=False, sort_keys=True)
            answer, asked = messages[-1]["content"], " ".join(message["content"] for message in messages[:-1])
        else:
            prompt, answer = (text_of(cell(name, vars(self)[name])) for name in ("prompt", "answer"))
            for name, value in (("prompt", prompt), ("answer", answer)):
                if value is None:
                    raise refuse(f"{name} {row[vars(self)[name]]!r} is no text", "write it in quotes, or take it out")
            asked = prompt
        for name, value in (("prompt", asked), ("answer", answer)):
            if not value.strip():
                raise refuse(f"the {name} is empty", "fill it in, or take the row out")
        grade = self.grade_of(row, asked) if self.grade in (None, LENGTH) else whole_of(cell("grade", self.grade))
        if grade is None:
            raise refuse(
                f"the grade {row.get(self.grade)!r} is no whole number from 0 on",
                "write how hard the row is as one, or take it out",
            )
        kind = "" if self.kind is None else text_of(cell("kind", self.kind))
        if kind is None:
            raise refuse(f"kind {row[self.kind]!r} is no text", "write it in quotes, or take it out")
        if len(kind.splitlines()) > 1:
            raise refuse(f"kind {kind!r} has several lines, and is a name in tables", "write it in one line")
        return {"prompt": prompt, "answer": answer, "grade": grade, "kind": kind}

    def grade_of(self, row: dict, prompt: str) -> int | None:
        """The grade of a row without a column of its own for it: 0, or the length of the prompt."""
        if self.grade is None:
            return 0
        if LENGTH in row:
            return whole_of(row[LENGTH])
        words = prompt.split()
        return len(words) if self.counted == "words" else sum(map(len, words))

    def deal(self) -> dict[str, list[dict]]:
        """Split -> its rows, in the order of the files. Raises ValueError for a split without rows."""
        seen, owners = set(), {}
        splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
        for owner in self.named():  # train last: what is held out is not trained on
            for row in self.questions(owner):
                prompt = hashlib.sha256(f"{self.seed}\n{row['prompt']}".encode()).digest()
                whole = prompt + hashlib.sha256(row["answer"].encode()).digest()
                if whole in seen or owners.setdefault(prompt, owner) != owner:
                    continue
                seen.add(whole)
                beyond = self.train_grades is not None and row["grade"] > self.train_grades
                dealt = "test" if beyond else self.split_of(prompt)
                splits[dealt if owner == "train" else owner].append(row)
        for split, rows in splits.items():
            if not rows:
                dealt = ", ".join(f"{name} {len(found)}" for name, found in splits.items())
                above = "" if self.train_grades is None else f", train_grades {self.train_grades}"
                raise ValueError(
                    f"the split {split} has no rows and needs one at least ({dealt}; validation_share "
                    f"{self.validation_share:g}, test_share {self.test_share:g}{above}): add rows, or change the "
                    "shares in data.overrides."
                )
        return splits


class Questions(datasets.GeneratorBasedBuilder):
    """Questions with answers of any length, in splits train, validation and test without a common prompt.

    Configs: `files` (`files=["mine.jsonl"], prompt="question"`, or `dataset={"path": "user/name", "split": "train"}`,
    whatever `datasets.load_dataset` takes, or a folder of `save_to_disk`) and `chats`, the same with a column of
    `messages`. `source` and `line` say where a row comes from: a file, and its line from 1, or in .parquet and a
    data set its row from 0. The prompt of a conversation is its messages but the last, as JSON. One example:

    >>> load_task("sequence", "files", files=["sums.jsonl"], grade="digits")["test"][0]
    {'prompt': '17+5=', 'answer': '22', 'grade': 2, 'kind': '', 'source': 'sums.jsonl', 'line': 9}

    Raises ValueError for a config field that is unknown or out of range, files that are missing, of another kind or
    damaged, a row that `QuestionsConfig.question` refuses, and a split without a row.
    """

    VERSION = VERSION
    TAGS = ("question-answering",)  # what the card of an exported data set is found by on the Hub
    BUILDER_CONFIG_CLASS = QuestionsConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        QuestionsConfig(name="files", description="Questions and answers that the user names."),
        QuestionsConfig(name="chats", description="Conversations that the user names.", messages=True),
    ]

    def __init__(self, *args, hash: str | None = None, **kwargs):
        files = (__file__, chats.__file__, named_data.__file__, sequences.__file__)
        super().__init__(*args, hash=hash or source_hash(*files), **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features(FEATURES | PLACES)
        return datasets.DatasetInfo(features=features, description=self.config.description)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(split, {"rows": rows}) for split, rows in self.config.deal().items()]

    def _generate_examples(self, rows: list[dict]):
        yield from enumerate(rows)


def text_of(value) -> str | None:
    """Text, or a whole number as text; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def whole_of(value) -> int | None:
    """A whole number from 0 on, which may be written as text; None for anything else."""
    if isinstance(value, str):
        value = int(value) if value.strip().isascii() and value.strip().isdecimal() else None
    right = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LONGEST
    return value if right else None


def place_of(path: Path) -> str:
    """What rows are counted by in a file."""
    return "row" if path.suffix == ".parquet" else "line"


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of every row of a file, in order; blank lines are skipped. Of .parquet, (row, row), from 0.

    Raises ValueError, with the line, for what is no row, and as `read_text`.
    """
    if path.suffix == ".parquet":
        yield from enumerate(parquet_rows(path))
    elif path.name.endswith((".csv", ".csv.gz")):
        yield from csv_rows(path)
    else:
        for line, text in enumerate(read_text(path).split("\n"), start=1):
            if text.strip():
                yield line, json_row(text, f"{path}, line {line}")


def json_row(text: str, place: str) -> dict:
    row = read_json(text, place)
    if not isinstance(row, dict):
        raise ValueError(f'{place}: no object with fields: write {{"prompt": ..., "answer": ...}}, or take it out.')
    return row


def csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    rows = read_csv(path, read_text(path))
    _, header = next(rows)
    for name in header:
        if header.count(name) > 1:
            raise ValueError(f"{path}, line 1: the column {name!r} is there twice: rename one of them.")
    for line, row in rows:
        yield line, dict(zip(header, row, strict=True))


def parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as Parquet ({reason}): restore it, or leave it out.") from error
