"""Inside a run folder: which files this project wrote, how a folder is replaced at once, and records/index.json, which
notes the weights that a measurement was made with."""

import fnmatch
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .digests import sha256_of
from .writing import below, check_folder, partial_of, write_whole

logger = logging.getLogger(__name__)

MODEL_FILES = (
    "config.json", "generation_config.json", "*_looped.py", "model.safetensors", "model-?????-of-?????.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
CHECKPOINT_FILES = (
    "state.json", "pytorch_model*", "model*.safetensors*", "optimizer*", "scheduler*.bin", "sampler*.bin",
    "random_states_*.pkl", "scaler.pt", "process-?????.pt", "tensors/.metadata", "tensors/__*.distcp",
)  # fmt: skip
# Paths in a run folder that this project writes, whatever the task; a star stays within a folder.
OWNED = (
    "run.json", "recipe.yaml", "metrics.jsonl", "summary.json", "origin.json", ".*.partial",
    *(f"{folder}/{name}" for folder in ("model", "model_int*", "tokenizer", "snapshots/step-?????????", ".*.partial",
                                        "snapshots/.*.partial")
      for name in MODEL_FILES),
    *(f"checkpoints/{folder}/{name}" for folder in ("step-?????????", "partial") for name in CHECKPOINT_FILES),
    "checkpoints/*/pytorch_model_*/*", "checkpoints/*/optimizer_*/*", "checkpoints/*/.state.json.*.partial",
    "data/*.parquet", ".*.partial/*.parquet",
    "records/index.json", "records/lock", "records/.*.partial", "records/commit*/*.json*",
    *(f"tracker/{place}events.out.tfevents.*" for place in ("", "*/", "*/*/")), "tracker/hparams.yml",
    "tracker/*/hparams.yml",
)  # fmt: skip
PICTURES = ("png", "pdf", "svg")  # formats of figures
OLD = ".replaced"  # ending of a folder's name while another folder takes its place


def owned(path: str, measured: Iterable[str] = ()) -> bool:
    """Whether `path`, relative to a run folder, is a name that this project writes.

    Args:
        measured: patterns of the paths that tasks add.
    """
    parts = path.split("/")
    patterns = (pattern.split("/") for pattern in (*OWNED, *measured))
    return any(len(parts) == len(names) and all(map(fnmatch.fnmatchcase, parts, names)) for names in patterns)


def remove_whole(folder: Path) -> None:
    """Remove a file or folder, which may be half written. A link is removed, not what it points to."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(partial: Path, folder: Path, ours: Callable[[Path], bool], measured: Sequence[str] = ()) -> None:
    """Give `partial` the name `folder`. Files of the old folder that are not `ours` are kept, see `settle`."""
    if os.path.lexists(folder):
        os.rename(folder, folder.with_name(folder.name + OLD))
    os.rename(partial, folder)
    settle(folder, ours, measured)


@contextmanager
def replaced_folder(folder: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Within the block, a new folder to write to. If all went well, it takes the place of `folder` (`replace_folder`).

    Raises:
        ValueError: `folder` is a link or a file.
    """
    check_folder(folder)
    settle(folder, ours)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(folder)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        remove_whole(partial)
        raise
    replace_folder(partial, folder, ours)


def settle(folder: Path, ours: Callable[[Path], bool], measured: Sequence[str] = ()) -> None:
    """Finish a `replace_folder`, also one that a kill cut short: before its second rename it is undone.

    ours(path in `folder`): whether a file of the old folder may be deleted. Other files move to the same place in the
    new folder, under NAME.kept if that place is taken, or is one that a run will write (see `owned`).
    """
    old = folder.with_name(folder.name + OLD)
    if not os.path.lexists(old):
        return
    if not os.path.lexists(folder):
        os.rename(old, folder)
        return
    if old.is_symlink() or not old.is_dir():
        os.rename(old, free_name(folder))
        return
    for place, folders, files in os.walk(old, topdown=False):
        links = [name for name in folders if Path(place, name).is_symlink()]
        # The files that note what is ours are deleted last.
        for name in sorted((*files, *links), key=lambda name: name in ("run.json", "index.json")):
            path = Path(place, name)
            target = folder / path.relative_to(old)
            if not path.is_symlink() and ours(path):
                path.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # A place that the run will write to later counts as taken.
            taken = os.path.lexists(target) or owned(target.relative_to(folder).as_posix(), measured)
            target = free_name(target) if taken else target
            os.rename(path, target)
            logger.warning(f"{target} was not written by this project, or was changed since: it is kept.")
        os.rmdir(place)


def free_name(path: Path) -> Path:
    """`path` with .kept at its end, and a number if that is taken."""
    names = (path.with_name(f"{path.name}.kept{number or ''}") for number in range(1_000_000))
    return next(name for name in names if not os.path.lexists(name))


@contextmanager
def locked(path: Path, busy: str, timeout: float = 0.0) -> Iterator[None]:
    """Within the block, hold the lock file `path`, which names this process. It is freed when the process ends.

    Args:
        busy: the beginning of the message if another process holds it.
        timeout: seconds to wait for it.

    Raises:
        ValueError: another process holds it.
        OSError: the file cannot be written.
    """
    owner = f"process {os.getpid()} on {platform.node()}\n".encode()

    def name_owner(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner, 0)

    if path.is_symlink():
        path.unlink()
    lock = FileLock(path, timeout=timeout, on_acquired=name_owner)
    try:
        lock.acquire()
    except Timeout as error:
        holder = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        raise ValueError(f"{busy} ({holder} holds {path}): wait for it, or end it.") from error
    try:
        yield
    finally:
        lock.release()


def read_object(path: Path, remedy: str) -> dict:
    """The JSON object in `path`; {} if there is no such file. Raises ValueError, with `remedy`, if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        error = f"it holds {type(found).__name__}, not an object"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as problem:
        error = problem
    raise ValueError(f"{path} is damaged ({error}): {remedy}")


def to_json(value) -> str:
    """The text of a .json file."""
    return json.dumps(value, indent=1) + "\n"


def read_records(run: Path) -> dict:
    """records/index.json of a run: file -> {"sha256": its digest, "weights": {folder: digest of measured weights}}.

    Raises ValueError if the file is damaged.
    """
    found = read_object(run / "records" / "index.json", "delete it, and measure again.")
    known = {name: entry for name, entry in found.items() if isinstance(entry, dict)}
    return {
        name: e for name, e in known.items() if isinstance(e.get("sha256"), str) and isinstance(e.get("weights"), dict)
    }


@contextmanager
def writing_records(run: Path) -> Iterator[None]:
    """Within the block, this process alone writes the records of a run.

    Raises ValueError if another process writes them for longer than a minute.
    """
    below(run, "records").mkdir(exist_ok=True)
    with locked(run / "records" / "lock", f"another measurement is being written to {run}", timeout=60.0):
        commit(run)
        yield


def write_records(run: Path, files: Mapping[str, str], weights: Mapping[str, str]) -> None:
    """Write the files of one measurement, and note the weights that were measured. All files change, or none.

    Args:
        files: name in the run folder -> text.
        weights: folder in the run folder -> `weights_of` the folder when it was measured.
    """
    with writing_records(run):
        partial = run / "records" / "commit.partial"
        remove_whole(partial)
        partial.mkdir()
        try:
            for name, text in files.items():
                write_whole(partial / name, text)
            made = {name: {"sha256": sha256_of(partial / name), "weights": dict(weights)} for name in files}
            write_whole(partial / "index.json", to_json(records_or_none(run) | made))
            os.rename(partial, run / "records" / "commit")
        except BaseException:
            remove_whole(partial)
            raise
        commit(run)


def commit(run: Path) -> None:
    """Move the files of a complete measurement to their places, also after a kill interrupted that."""
    complete = run / "records" / "commit"
    if complete.is_symlink() or not complete.is_dir():
        return
    for path in sorted(complete.iterdir()):
        # Another process may have moved it meanwhile.
        with suppress(FileNotFoundError):
            os.replace(path, (complete.parent if path.name == "index.json" else run) / path.name)
    with suppress(FileNotFoundError):
        complete.rmdir()


def note_records(run: Path, entries: Mapping[str, dict]) -> None:
    """Add entries to records/index.json for files that are already written."""
    with writing_records(run):
        write_whole(run / "records" / "index.json", to_json(records_or_none(run) | dict(entries)))


def records_or_none(run: Path) -> dict:
    """As `read_records`; a damaged index is replaced: its files count as unknown and are measured again."""
    try:
        return read_records(run)
    except ValueError:
        return {}
