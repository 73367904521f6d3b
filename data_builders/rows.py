"""Rows of a data set that the user names: what `datasets.load_dataset` takes, or a folder that datasets saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from .files import MissingData, expand_home

SAVED = ("dataset_dict.json", "state.json")  # a folder that save_to_disk wrote has one of these


def load_rows(arguments: dict, field: str, split: str | None) -> datasets.Dataset:
    """The rows of one split.

    Args:
        arguments: of `datasets.load_dataset`, such as {"path": "user/name"}; or {"path": FOLDER}, of a folder that
            `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote. A leading ~ is the home folder.
        field: that names the split, for messages.
        split: a name, or None for a data set without splits.

    Raises:
        MissingData: the data are not there.
        ValueError: they cannot be read, or have no such split; the splits that there are are named.
    """
    arguments = expand_homes(arguments)
    folder = Path(str(arguments.get("path")))
    saved = any((folder / name).is_file() for name in SAVED)
    if saved and len(arguments) > 1:
        raise ValueError(f"dataset: {folder} was written by save_to_disk, and beside its path takes only a split.")
    with blaming(arguments, field):
        rows = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(**arguments, split=split)
    if isinstance(rows, datasets.DatasetDict):
        names = ", ".join(rows)
        if split is None:
            raise ValueError(f"dataset must give one split: add `split` to its arguments, one of {names}.")
        if split not in rows:
            raise ValueError(f"{field} must be one of {names}, the splits of {folder}, got {split!r}.")
        rows = rows[split]
    elif saved and split not in (None, rows.split and str(rows.split)):
        raise ValueError(f"{field}: {folder} has no splits, got {split!r}: leave it out.")
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            "dataset.streaming is for the task text, with data.dataset: leave `streaming` out of its arguments."
        )
    return rows


@contextmanager
def blaming(arguments: dict, field: str) -> Iterator[None]:
    """Within the block, whatever `datasets` raises becomes a sentence about the data set of these arguments.

    Raises:
        MissingData: the data are not there.
        ValueError: they cannot be read; a split that there is not is told by the `field` that names it.
    """
    try:
        yield
    except Exception as error:  # every kind of file has errors of its own
        kind = MissingData if isinstance(error, FileNotFoundError | ConnectionError) else ValueError
        while error.__cause__ is not None:
            error = error.__cause__
        said = str(error).strip()
        if said.startswith("Caught ") and "Original Traceback" in said:  # in a worker of torch: the last line says it
            said = said.splitlines()[-1]
        reason = " ".join(said.split()) or type(error).__name__
        if reason.startswith(("Unknown split", "Bad split")):
            raise ValueError(f"{field}: {reason}") from error
        raise kind(f"dataset {arguments} cannot be read: {reason}") from error


def expand_homes(value):
    """An argument of `load_dataset`, with the home folder in the place of a leading `~` in every text."""
    if isinstance(value, dict):
        return {name: expand_homes(each) for name, each in value.items()}
    if isinstance(value, list):
        return [expand_homes(each) for each in value]
    return expand_home("dataset", value) if isinstance(value, str) and value.startswith("~") else value
