"""Find and read the files that a user names. A file is read whole or refused, with line and column of the fault."""

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

# How JSON writes half of a pair that stands for one character beyond the first 65,536.
HALF = re.compile(r"\\u[dD][89a-fA-F]")


class MissingData(ValueError):
    """Files that the user names are not there."""


def expand_home(name: str, path: str) -> str:
    """`path` with the home folder in the place of a leading `~`.

    Raises ValueError, with the `name` of the field, for a home folder that does not exist and an impossible path.
    """
    if not path or "\0" in path:
        raise ValueError(f"{name} must name a file or a folder, got {path!r}.")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{name}: {path!r} is in the home folder of nobody here: write ./{path} for a name with a ~.")
    return expanded


def find_files(
    name: str,
    patterns: list[str],
    suffixes: tuple[str, ...],
    fetched: Path | None = None,
    command: str = "",
) -> list[Path]:
    """The files that match paths and globs, sorted.

    name: of the field. fetched, command: a folder, and the command that fills it, if there is one, for the message.
    Raises MissingData, with `name`, for a pattern that matches no file, and ValueError for a file with another suffix.
    """
    paths = set()
    for pattern in (expand_home(name, pattern) for pattern in patterns):
        # The name of a file may have the brackets of a glob in it.
        matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = {Path(path).absolute() for path in matches if os.path.isfile(path)}
        if not found and fetched is not None and Path(pattern).is_relative_to(fetched):
            raise MissingData(f"there is no {pattern}: run `{command}`, or name files.")
        if not found:
            raise MissingData(f"{name}: nothing matches {pattern!r} in {os.getcwd()}.")
        paths |= found
    for path in paths:
        if not path.name.endswith(suffixes):
            raise ValueError(f"{name}: {path} is not one of {', '.join(suffixes)}.")
    return sorted(paths)


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, gzipped or not, without a byte-order mark and with "\\n" as the line end.

    Raises ValueError for a file that is missing, empty, cut short, binary or not UTF-8; where it can, with line and
    column.
    """
    try:
        raw = path.read_bytes()
        unpacked = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path} cannot be read as text ({reason}): restore it, or leave it out.") from error
    if not raw:
        raise ValueError(f"{path} cannot be read as text (it has 0 bytes): restore it, or leave it out.")
    try:
        text = unpacked.decode()
    except UnicodeDecodeError as error:
        line, column = place(unpacked[: error.start].decode())
        raise ValueError(
            f"{path} cannot be read as text (line {line}, column {column}: byte 0x{unpacked[error.start]:02x} is no "
            "UTF-8): convert it to UTF-8, or leave it out."
        ) from error
    if "\0" in text:
        line, column = place(text[: text.index("\0")])
        raise ValueError(
            f"{path} cannot be read as text (line {line}, column {column}: a NUL character): it is binary or UTF-16; "
            "convert it to UTF-8, or leave it out."
        )
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_json(text: str, place: str):
    """The value of a line of JSON. place: where it is, for the message of an error.

    Raises ValueError for what is no JSON, and for half of a character, which no text in UTF-8 can have.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON ({error}): correct the line, or take it out.") from error
    if HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"{place}: {half} is half of a character: write both halves, or take it out.") from error
    return value


def read_csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line from 1 where it begins, cells) of every row of a CSV text, the header first; blank lines are skipped.

    Raises ValueError, with the line, for a row with more or fewer cells than the header, and quotes that are not
    closed.
    """
    rows, line = csv.reader(io.StringIO(text), strict=True), 1
    try:
        header = next(rows, [])
        yield line, header
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {line}: the row has {len(row)} cells, and the header {len(header)}: correct it, or "
                    "take it out."
                )
            if row:
                yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: the row that begins there is no CSV ({error}): correct it.") from error


def gzip_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of every line of a gzip file. Raises ValueError, with the line, for a file cut short."""
    number = 0
    # Not gzip.open: `datasets` replaces it by a function that leaves the file open.
    with open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as file:
        lines = iter(file)
        while True:
            try:
                line = next(lines, None)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path} cannot be read after line {number} ({error}): restore it.") from error
            if line is None:
                return
            number += 1
            yield number, line


def place(before: str) -> tuple[int, int]:
    """Line and column, counted from 1, of the character that comes after the text `before`."""
    lines = before.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return len(lines), len(lines[-1]) + 1
