"""What the hop tasks share: the columns of a row, and rows as Arrow tables.

e4 r1 r0 <ans>  ->  e9        start at entity 4, follow relation 1, then relation 0: which entity is it?
"""

from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .seeding import TABLE_ROWS

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "hops": datasets.Value("int32"),
        "split_kind": datasets.Value("string"),
        "path": datasets.List(datasets.Value("int32")),
    }
)


def hop_tables(relations: np.ndarray, path: np.ndarray, split_kind: str) -> Iterator[pa.Table]:
    """Arrow tables with the N rows of one hop count k.

    relations (N, k): the relations, in the order they are followed. path (N, k + 1): the entities from the start to
    the answer.
    """
    entity_words = pa.array([f"e{i}" for i in range(path.max() + 1)])
    relation_words = pa.array([f"r{i}" for i in range(relations.max() + 1)])
    for start in range(0, len(path), TABLE_ROWS):
        walked, followed = path[start : start + TABLE_ROWS], relations[start : start + TABLE_ROWS]
        num_rows, hops = followed.shape
        words = [entity_words.take(pa.array(walked[:, 0])), *(relation_words.take(pa.array(r)) for r in followed.T)]
        offsets = np.arange(num_rows + 1, dtype=np.int32) * (hops + 1)
        columns = {
            "text": pc.binary_join_element_wise(*words, " "),
            "answer": entity_words.take(pa.array(walked[:, -1])),
            "hops": pa.array(np.full(num_rows, hops, dtype=np.int32)),
            "split_kind": pa.repeat(split_kind, num_rows),
            "path": pa.ListArray.from_arrays(pa.array(offsets), pa.array(walked.ravel().astype(np.int32))),
        }
        yield pa.table(columns, schema=FEATURES.arrow_schema)


def hop_table(split: datasets.Dataset, columns: Sequence[str] = ()) -> pa.Table:
    """The columns text, answer, hops and `columns` of a split, with its rows in order.

    Raises ValueError, with row and column, for a column that is missing, a text or an answer that is not text, hops
    that are not a whole number, and a text other than one entity and one relation per hop.
    """
    kinds = {"text": str, "answer": str, "hops": int} | dict.fromkeys(set(columns) - {"hops"}, str)
    missing = [name for name in kinds if name not in split.column_names]
    if missing:
        raise ValueError(f"the rows have no column {missing[0]}; they have {', '.join(split.column_names)}.")
    table = split.select_columns(list(kinds)).with_format("arrow")[:]
    for name, kind in kinds.items():
        fits = pa.types.is_integer if kind is int else pa.types.is_string
        if not fits(table[name].type) or table[name].null_count:
            for row, value in enumerate(table[name].to_pylist()):
                if type(value) is not kind:
                    said = "a whole number" if kind is int else "text"
                    raise ValueError(f"row {row} (the first is 0), column {name}: {value!r} is not {said}.")
    lengths = pc.list_value_length(pc.utf8_split_whitespace(table["text"]))
    right = pc.equal(lengths, pc.add(table["hops"], 1))
    if not pc.all(right).as_py() and len(table):
        row = pc.index(right, False).as_py()
        text, hops = table["text"][row].as_py(), table["hops"][row].as_py()
        raise ValueError(
            f"row {row} (the first is 0), column text: {text!r}, the text of a row of {hops} hops must be an entity "
            f"and {hops} relations."
        )
    return table
