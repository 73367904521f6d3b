"""Rows of a data set that the user names: what `datasets.load_dataset` takes, or a folder that datasets saved."""

from pathlib import Path

import datasets

from .files import MissingData, expand_home


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
    arguments = {name: expand_homes(value) for name, value in arguments.items()}
    folder = Path(str(arguments.get("path")))
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if saved and len(arguments) > 1:
        raise ValueError(f"dataset: {folder} was written by save_to_disk, and beside its path takes only a split.")
    try:
        rows = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(**arguments, split=split)
    except Exception as error:  # every kind of file has errors of its own
        kind = MissingData if isinstance(error, FileNotFoundError | ConnectionError) else ValueError
        while error.__cause__ is not None:
            error = error.__cause__
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("Unknown split"):
            raise ValueError(f"{field}: {reason}") from error
        raise kind(f"dataset {arguments} cannot be read: {reason}") from error
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
        raise ValueError("dataset must give rows that are not streamed: leave `streaming` out of its arguments.")
    return rows


def expand_homes(value):
    """An argument of `load_dataset`, with the home folder in the place of a leading `~` in every text."""
    if isinstance(value, dict):
        return {name: expand_homes(each) for name, each in value.items()}
    if isinstance(value, list):
        return [expand_homes(each) for each in value]
    return expand_home("dataset", value) if isinstance(value, str) and value.startswith("~") else value
