"""The rows of a run as tokens, in groups of one grade and one kind."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from data_builders import EncodedRows, encode_questions
from looplab.runs.folder import Run

from .data import SequenceData

Line = tuple[int, str]  # grade and kind
WANTED = ("prompt", "answer", "grade", "kind")


def load_questions(run: Run) -> DatasetDict:
    """The splits of a run, from its recipe; of a model without one, what the user names, as the split test.

    Raises ValueError if they differ from those it was trained on.
    """
    data = SequenceData.of(run)
    if run.bare:
        return DatasetDict(test=data.questions())
    splits = data.splits_of(run)
    run.check_data(splits)
    return splits


def encoded(
    data: SequenceData,
    splits: Mapping,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] = ("train", "validation", "test"),
    longest: int | None = None,
    limit: str = "",
) -> dict[str, EncodedRows]:
    """Split -> its rows as tokens. longest, limit: the most tokens that a row may read, and the field that says so.

    Raises ValueError as `encode_questions`, and for a column that the rows lack.
    """
    columns = splits[names[0]].column_names
    for name in WANTED:
        if name not in columns:
            raise ValueError(f"the rows have no column {name}; they have {', '.join(columns)}.")
    reader = data.reader(tokenizer)
    return {name: encode_questions(splits[name], reader, longest, limit) for name in names}


def groups_of(rows: EncodedRows, limit: int | None = None) -> dict[Line, np.ndarray]:
    """(grade, kind) -> numbers of its rows, ascending; of a larger group `limit` rows, the same every time."""
    kinds, groups = np.array(rows.kinds), {}
    for grade, kind in sorted(set(zip(rows.grades.tolist(), rows.kinds, strict=True))):
        members = np.flatnonzero((rows.grades == grade) & (kinds == kind))
        if limit is not None and limit < len(members):
            members = np.sort(np.random.default_rng(0).choice(members, limit, replace=False))
        groups[grade, kind] = members
    return groups
