"""What the task `sequence` is trained on: rows with a question, an answer of any length, and how hard they are.

    row        {"prompt": "3 + 4 =", "answer": "7", "grade": 1, "kind": "sum"}, and columns of a source's own
    splits     train, validation and test; no prompt is in two of them; test may have grades that train lacks
    verifier   what an answer is worth, where more than one answer is right

A row comes from a file or a data set that a user names (`questions.py`), or from a generator: a builder of `datasets`,
a subclass of `SequenceGenerator` with a line in `builders.BUILDERS`. A recipe names it:

    data: {task: sequence, generator: parity, config: cpu, overrides: {train_length: 16}}

`generator: NAME/PART` gives PART to the field of the builder's config that `PART` of the class names:
`generator: reasoning_gym/chain_sum` is `task_builder("reasoning_gym", "default", dataset="chain_sum")`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import datasets

FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "grade": datasets.Value("int64"),  # how hard: digits, hops, steps .., >= 0
        "kind": datasets.Value("string"),  # results are told apart by it; "" where there is one kind
    }
)


class Verifier(ABC):
    """What an answer is worth. It is made once, and asked for every answer.

    Attributes:
        exact: the row's own answer is worth 1 and every other answer 0. Then nothing has to be generated to measure.
    """

    exact: bool = False

    @abstractmethod
    def score(self, row: Mapping[str, object], text: str) -> float:
        """The worth in [0, 1] of the answer `text` to a row of the data, with all its columns; 1 is right."""


class SameAnswer(Verifier):
    """The row's own answer is right, and no other is; white space at the ends does not count."""

    exact = True

    def score(self, row: Mapping[str, object], text: str) -> float:
        return float(text.strip() == str(row["answer"]).strip())


class SequenceGenerator(datasets.GeneratorBasedBuilder):
    """Base of the generators: a builder of rows with the columns of `FEATURES`, see the module docstring.

    A subclass has what builders of `datasets` have: a version, a class of configs, configs with a preset `cpu`,
    `_split_generators` and `_generate_examples`; and these.

    Attributes:
        TAGS: what the card of an exported data set is found by on the Hub.
        TOKENIZER: the tokenizer of the task `sequence` that fits the rows: characters, words or digits.
        ANSWERS: where the answer is read: "after" the prompt, token by token, or "in_place", at the prompt's own
            tokens. Then prompt and answer have equally many tokens.
        PART: the field of the config that a name NAME/PART sets; None for a builder without parts.
    """

    TAGS: tuple[str, ...] = ("synthetic",)
    TOKENIZER: Literal["characters", "words", "digits"] = "characters"
    ANSWERS: Literal["after", "in_place"] = "after"
    PART: str | None = None

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES, description=self.config.description)

    def verifier(self) -> Verifier:
        """What an answer to these rows is worth."""
        return SameAnswer()
