"""The sections `data` and `curriculum` of a recipe on questions and answers."""

from dataclasses import dataclass, fields
from typing import Literal

from huggingface_hub.dataclasses import strict

from data_builders.fields import number, path
from looplab.tasks.data import RowShape
from looplab.tasks.language.data import NamedData
from looplab.tasks.stages import StagedCurriculum

CUTS = ("characters", "words", "digits")
LEARNT = "bpe"
# Fields of the builder of questions that have a field of their own here.
OWN = ("prompt", "answer", "grade", "kind", "messages", "train_grades")


@strict
@dataclass
class SequenceData(NamedData):
    """Questions with answers of any length: of `files` (.jsonl, .csv, .parquet), of a data set in `overrides.dataset`,
    or of a `generator`."""

    task: Literal["sequence"] = "sequence"  # questions and answers
    generator: str | None = None  # builder of questions, such as parity or reasoning_gym/NAME, in place of files
    config: str = "cpu"  # preset of the generator
    prompt: str = "prompt"  # the column with the question
    answer: str = "answer"  # the column with the answer
    grade: str | None = None  # the column that says how hard; `length` counts the prompt where there is no such column
    kind: str | None = None  # the column by which results are told apart
    messages: bool = False  # rows are conversations, in a column `messages`; the last message is the answer
    train_grades: int | None = number(at_least=0)  # harder rows of files are in the split test alone
    tokenizer: str | None = path()  # characters, words, digits, bpe, a folder; the generator's, or characters
    vocab_size: int | None = number(at_least=1)  # of the tokenizer bpe, which is learnt from the training rows
    chat: bool = False  # the tokenizer's chat template writes the prompts, as messages of a user
    answers: Literal["after", "in_place"] | None = None  # where answers stand; what the generator says, or after
    loss: Literal["answer", "all"] = "answer"  # which tokens are learnt
    batching: Literal["packed", "one_length"] = "packed"  # how rows of several lengths come into one batch
    sequence_length: int | None = number(at_least=1)  # most tokens of a row; as the longest in train unless given
    at_least_grade: bool = False  # raise the loop count of a batch to its highest grade if it is smaller
    validation_rows: int | None = number(at_least=1)  # most held-out rows of a grade in a check; all unless given

    def check(self, init_from: str | None) -> None:
        super().check(init_from)
        sources = {"files": self.files, "dataset": self.named_dataset, "generator": self.generator}
        given = [f"data.{name}" for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"questions come from one of {', '.join(f'data.{name}' for name in sources)}, got "
                f"{' and '.join(given) or 'none'}."
            )
        for name in sorted(self.overrides.keys() & set(OWN)):
            if self.generator is None:
                raise ValueError(f"data.overrides.{name} is data.{name}: write it there.")
        self.check_generator()
        self.check_tokenizer(init_from)

    def check_generator(self) -> None:
        """Raise ValueError for a generator that there is not, and for fields that belong to files or to generators."""
        for item in fields(self):
            named = item.name in OWN if self.generator is not None else item.name == "config"
            if named and vars(self)[item.name] != item.default:
                whose = "files and data sets" if self.generator is not None else "a generator"
                raise ValueError(f"data.{item.name} is for {whose}: leave it out.")
        if self.generator is not None:
            self.generated()
        if self.in_place and (self.chat or self.messages):
            raise ValueError("data.answers in_place has no place in a chat: leave data.chat and data.messages out.")
        if self.in_place and self.loss == "all":
            raise ValueError("data.loss all learns the prompt, in whose place the answers stand: leave it out.")
        if self.messages and self.chat:
            raise ValueError("data.messages are written by the chat template already: leave data.chat out.")

    def check_tokenizer(self, init_from: str | None) -> None:
        """Raise ValueError for a tokenizer that is named twice, or not as it has to be."""
        if init_from is not None and self.tokenizer is not None:
            raise ValueError("data.tokenizer: the one in init_from is taken: leave one of them out.")
        if (self.tokenizer == LEARNT) != (self.vocab_size is not None):
            raise ValueError(f"data.vocab_size is the size of data.tokenizer {LEARNT}: give both, or neither.")
        if (self.chat or self.messages) and init_from is None and self.cut is not None:
            raise ValueError(
                "data.chat and data.messages need a tokenizer with a chat template: name a folder in data.tokenizer "
                "or init_from."
            )

    @property
    def cut(self) -> str | None:
        """How the tokenizer that is made of the rows cuts them, one of CUTS or LEARNT; None for that of a folder."""
        if self.tokenizer is None:
            return CUTS[0] if self.generator is None else self.generating().TOKENIZER
        return self.tokenizer if self.tokenizer in (*CUTS, LEARNT) else None

    @property
    def in_place(self) -> bool:
        """Whether answers stand at the tokens of their prompts."""
        own = "after" if self.generator is None else self.generating().ANSWERS
        return (self.answers or own) == "in_place"

    def generating(self):
        """The class of the generator's builder."""
        from data_builders.builders import BUILDERS

        return BUILDERS[self.builder]

    def generated(self) -> tuple[str, dict]:
        """What the generator is, see `generator_of`."""
        from data_builders.builders import generator_of

        return generator_of(self.generator)

    @property
    def builder(self) -> str:
        return self.task if self.generator is None else self.generated()[0]

    def preset(self) -> tuple[str, dict]:
        if self.generator is not None:
            return self.config, {"seed": self.seed} | self.generated()[1] | self.overrides
        preset, named = self.of_files("files")
        named |= {name: vars(self)[name] for name in OWN if vars(self)[name] is not None}
        if self.messages:  # whose preset has these
            preset, named = "chats", {n: v for n, v in named.items() if n not in ("prompt", "answer", "messages")}
        counted = {"counted": "words"} if self.cut == "words" else {}
        return preset, counted | named

    def shape(self) -> RowShape:
        tokens = None if self.sequence_length is None else {self.sequence_length: 1.0}
        return RowShape(self.vocab_size, tokens)

    def reader(self, tokenizer):
        """The `data_builders.sequence_rows.Reader` of the rows. Raises ValueError as it does."""
        from data_builders import reader_of

        chat = "messages" if self.messages else "prompts" if self.chat else None
        return reader_of(tokenizer, "in_place" if self.in_place else "after", chat)

    def questions(self):
        """The rows that a model answers which was not trained on any of them, a `datasets.Dataset`: all that the user
        names, or the test rows of a generator. Raises ValueError if there are none."""
        from datasets import Dataset, Features, Split

        from data_builders import task_builder
        from data_builders.questions import PLACES
        from data_builders.sequences import FEATURES

        preset, named = self.preset()
        if self.generator is not None:
            return self.load()["test"]
        config = task_builder(self.builder, preset, **named).config
        rows = list(config.questions("train"))
        if not rows:
            raise ValueError(f"there is no question in {self.files or self.named_dataset}: name data with rows.")
        return Dataset.from_list(rows, Features(FEATURES | PLACES), split=Split.TEST)

    def verifier(self):
        """What an answer is worth, a `data_builders.sequences.Verifier`."""
        from data_builders import SameAnswer, task_builder

        if self.generator is None:
            return SameAnswer()
        preset, named = self.preset()
        return task_builder(self.builder, preset, **named).verifier()


@strict
@dataclass
class SequenceCurriculum(StagedCurriculum):
    """Stage g trains on the rows up to grade g until those of grade g pass the held-out check. Both ends are the
    highest grade in the data unless given."""

    start_grade: int | None = number(at_least=0)  # of the first stage
    stop_grade: int | None = number(at_least=0)  # of the last stage

    def check(self) -> None:
        if self.start_grade is not None and self.stop_grade is not None and self.start_grade > self.stop_grade:
            raise ValueError(
                f"curriculum.start_grade {self.start_grade} must not be above curriculum.stop_grade {self.stop_grade}."
            )
