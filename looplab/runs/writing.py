"""Write files and folders whole or not at all, and only where the user asked for them.

    write_whole(path, content)       a file: written beside, then renamed
    with whole_folder(path) as new:  a folder: filled beside, then renamed
    below(folder, "figures")         a folder inside the one that the user named, and not behind a link

A reader sees the old file or the new one, never half of it, also after a kill. Two writers of one name do not mix. If
`path` is a link to a file, the link is replaced and the file behind it stays. If it is a link to a folder, it is
refused, since the folder behind it may belong to somebody else.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


def partial_of(path: Path) -> Path:
    """A name beside `path` that nobody else has: `.NAME.xxxxxxxx.partial`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to the file `path`, make missing folders, and return `path`.

    Raises:
        ValueError: `path` is a folder, a device or a pipe.
        OSError: the disk refuses.
    """
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with open(partial, "xb") as file:  # x: never through a link
            file.write(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_file(path: Path) -> None:
    """Raise ValueError if `path` exists and is not a file."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: name another one, or move it away.")


@contextmanager
def whole_folder(path: Path, another_built: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Within the block, a new folder beside `path` to write to. It gets the name `path` if all went well, and is
    removed otherwise.

    Args:
        another_built: whether another process has made the same folder at `path` meanwhile; then this one is removed.

    Raises:
        ValueError: there is something at `path`.
    """
    check_folder(path)
    if path.exists() and not another_built():
        raise ValueError(f"{path} exists: name a new folder, or delete it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not (isinstance(error, OSError) and another_built()):
            raise


def below(folder: Path, *names: str) -> Path:
    """The path `folder`/`names`; `folder` itself may be a link, since the user named it.

    Raises:
        ValueError: one of `names` is a link or a file.
    """
    path = folder
    for name in names:
        path = path / name
        check_folder(path)
    return path


def check_folder(path: Path) -> None:
    """Raise ValueError if `path` exists and is a link or not a folder."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, where nothing of ours belongs: remove the link.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a folder: move it away.")


def remove_partials(folder: Path) -> None:
    """Remove the partial files and folders that killed writers left in `folder`; nobody may be writing there now."""
    for left in folder.glob(f".*{PARTIAL}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
