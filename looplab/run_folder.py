"""A run folder, kept: what is written to `<output_dir>/<name>/`, in which order, and what may be removed again.

    new        nothing of a run is there           run.json, recipe.yaml and tokenizer/ come first
    begun      no checkpoint yet                   nothing to lose: a corrected recipe starts over
    going on   checkpoints/step-N                  the same command resumes; the budget may have changed (FREE)
    finished   model/ and summary.json             protected like checkpoints, with or without them
    replacing  `--overwrite true` over these       the new run grows in .NAME.new; at its first checkpoint it takes the
                                                   place of the old one, which until then is whole

Three laws hold at every moment, a kill included. A file is the old one or the new one, and the files of one
measurement change together. What this project did not write is never removed: only files with a name of `OWNED`, and
with the digest that was noted when they were written. Every measurement says which weights it is of.
`docs/guides/run_folders.md` has the files and what to do about each refusal.
"""

import fnmatch
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from filelock import FileLock, Timeout

from .recipe import Recipe, flatten
from .writing import below, check_folder, partial_of, remove_partials, write_whole
from .yaml_text import read_yaml, to_yaml

logger = logging.getLogger(__name__)

# Measurements of a model, and what they are kept in.
RECORDS = (
    "evaluation.json", "grid.jsonl", "loops.jsonl", "text.jsonl", "molecules.jsonl", "halting.jsonl", "memory.jsonl",
    "lens*.jsonl", "probes.jsonl", "ablations.jsonl", "readouts.jsonl", "quantization.json",
)  # fmt: skip
MODEL_FILES = (
    "config.json", "generation_config.json", "*_looped.py", "model.safetensors", "model-?????-of-?????.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
CHECKPOINT_FILES = (
    "state.json", "pytorch_model*", "model*.safetensors*", "optimizer*", "scheduler*.bin", "sampler*.bin",
    "random_states_*.pkl", "scaler.pt",
)  # fmt: skip
FIGURES = (
    "grid", "training", "hops", "loops", "halting", "learning", "perplexity", "validity", "faults", "molecules",
    "exits", "ablations", "readouts", "stages", "lens*", "patch*", "swap*", "probe*",
)  # fmt: skip
# Paths in a run folder that this project writes; a star stays within a folder.
OWNED = (
    "run.json", "recipe.yaml", "metrics.jsonl", "summary.json", *RECORDS, ".*.partial",
    *(f"{folder}/{name}" for folder in ("model", "model_int*", "tokenizer", "snapshots/step-?????????", ".*.partial",
                                        "snapshots/.*.partial")
      for name in MODEL_FILES),
    *(f"checkpoints/{folder}/{name}" for folder in ("step-?????????", "partial") for name in CHECKPOINT_FILES),
    "checkpoints/*/pytorch_model_*/*", "checkpoints/*/optimizer_*/*", "checkpoints/*/.state.json.*.partial",
    "records/index.json", "records/lock", "records/.*.partial", "records/commit*/*.json*", "samples/model.json",
    "samples/*-loops*.jsonl", *(f"figures/{name}.png" for name in FIGURES),
    "tracker/events.out.tfevents.*", "tracker/*/events.out.tfevents.*", "tracker/hparams.yml",
)  # fmt: skip
OWNED_PARTS = [pattern.split("/") for pattern in OWNED]

# Fields of a recipe that may change when a run goes on: none of them changes what an update does, but for schedules
# that follow the budget.
FREE = frozenset({"max_steps", "max_seconds", "log_every", "checkpoint_every", "eval_loops", "snapshots", "trackers"})

OTHERS = "Give this run another --name, or replace the one there with --overwrite true."
OLD = ".replaced"  # where a folder is while another takes its place
MAX_SOURCES = 1000  # files whose digests are kept one by one


def owned(path: str) -> bool:
    """Whether `path`, relative to a run folder, is a name that this project writes."""
    parts = path.split("/")
    return any(len(parts) == len(names) and all(map(fnmatch.fnmatchcase, parts, names)) for names in OWNED_PARTS)


# Digests


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read once as long as size and time of change stay."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _tensors(path: str, size: int, changed: int) -> tuple[str, ...]:
    """A line per tensor of a safetensors file: name, dtype, shape, SHA-256 of its bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
        lines = []
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                if 8 + length + end > size:
                    raise ValueError(f"{path} is cut short")
                file.seek(8 + length + begin)
                lines.append(f"{name} {tensor['dtype']} {tensor['shape']} {_digest_of(file, end - begin)}\n")
    return tuple(lines)


def _digest_of(file, length: int) -> str:
    """SHA-256 of the next `length` bytes."""
    digest = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 2**24))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


def weights_of(folder: Path) -> str:
    """SHA-256 of the tensors saved in `folder`, whatever files they are in.

    Raises:
        ValueError: there are none, or a file is damaged or missing.
    """
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        stats = [(folder / name).stat() for name in names]
        lines = [_tensors(str(folder / n), s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights in {folder} are damaged or missing ({error}): save them again.") from error
    return hashlib.sha256("".join(sorted(line for file in lines for line in file)).encode()).hexdigest()


def data_of(splits: Mapping) -> dict:
    """What tells data sets apart, of a `datasets.DatasetDict`.

    {"splits": {split: SHA-256 of its rows}, "sources": {file: SHA-256 of its rows}}; sources are left out where rows
    do not name them, or name more than MAX_SOURCES.
    """
    digests, sources = {}, {}
    for split in sorted(splits):
        whole = hashlib.sha256()
        for rows in splits[split].iter(batch_size=10_000):
            whole.update(json.dumps(rows, sort_keys=True).encode())
            pairs = zip(rows.get("source", ()), rows["text"], strict=False)
            for source, group in groupby(pairs, key=lambda pair: pair[0]):
                if len(sources) <= MAX_SOURCES:
                    digest = sources.setdefault(source, hashlib.sha256())
                    digest.update(json.dumps([split, *(text for _, text in group)]).encode())
        digests[split] = whole.hexdigest()
    sources = sources if len(sources) <= MAX_SOURCES else {}
    return {"splits": digests, "sources": {name: digest.hexdigest() for name, digest in sources.items()}}


def data_changes(before: dict, after: dict) -> str:
    """What differs between two results of `data_of`, in words; '' if nothing does."""
    said = []
    for kind, noun in (("sources", "file"), ("splits", "split")):
        old, new = before[kind], after[kind]
        for word, names in (
            ("new", new.keys() - old.keys()),
            ("gone", old.keys() - new.keys()),
            ("changed", {name for name in old.keys() & new.keys() if old[name] != new[name]}),
        ):
            if names:
                shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                said.append(f"{word} {noun}{'s' if len(names) > 1 else ''}: {shown}")
        if said:
            break
    return "; ".join(said)


def tokenizer_of(tokenizer) -> str:
    """SHA-256 of what a tokenizer does: its parts but for padding and truncation, which the last call left there."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    kept["ids"] = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# Files, whole or not at all


def remove_whole(folder: Path) -> None:
    """Remove a file or folder of our own making that may be half written; of a link, the link."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(partial: Path, folder: Path, ours: Callable[[Path], bool]) -> None:
    """Give `partial` the name `folder`. Of a folder that is there, files that are not `ours` stay: see `settle`."""
    if os.path.lexists(folder):
        os.rename(folder, folder.with_name(folder.name + OLD))
    os.rename(partial, folder)
    settle(folder, ours)


@contextmanager
def replaced_folder(folder: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder beside `folder` to write to, which takes its place when all went well (`replace_folder`).

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


def settle(folder: Path, ours: Callable[[Path], bool]) -> None:
    """End a `replace_folder` that was cut short: before its second rename it is taken back, after that completed.

    ours(path in `folder`): whether a file of the old folder may go. The others are moved to the same place in the new
    one, under NAME.kept where that place is taken.
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
        # The notes of what is ours go last.
        for name in sorted((*files, *links), key=lambda name: name in ("run.json", "index.json")):
            path = Path(place, name)
            target = folder / path.relative_to(old)
            if not path.is_symlink() and ours(path):
                path.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Nor where a run is going to write.
            taken = os.path.lexists(target) or owned(target.relative_to(folder).as_posix())
            target = free_name(target) if taken else target
            os.rename(path, target)
            logger.warning(f"{target} was not written by this project, or was changed since: it is kept.")
        os.rmdir(place)


def free_name(path: Path) -> Path:
    """`path` with .kept behind it, and a number where that is taken."""
    names = (path.with_name(f"{path.name}.kept{number or ''}") for number in range(1_000_000))
    return next(name for name in names if not os.path.lexists(name))


# Measurements and the weights they are of


@contextmanager
def locked(path: Path, busy: str, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, which names this process; the system frees it when the process ends, however it does.

    Raises:
        ValueError: `busy`, and who holds it.
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
    """The JSON object in `path`, {} if there is no such file; ValueError with `remedy` if it is damaged."""
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
    return json.dumps(value, indent=1) + "\n"


def read_records(run: Path) -> dict:
    """records/index.json of a run: file -> {"sha256": of it, "weights": {folder: digest of the weights measured}}."""
    found = read_object(run / "records" / "index.json", "delete it, and measure again.")
    known = {name: entry for name, entry in found.items() if isinstance(entry, dict)}
    return {
        name: e for name, e in known.items() if isinstance(e.get("sha256"), str) and isinstance(e.get("weights"), dict)
    }


@contextmanager
def writing_records(run: Path) -> Iterator[None]:
    """Hold the records of a run for the moment in which they are written."""
    below(run, "records").mkdir(exist_ok=True)
    with locked(run / "records" / "lock", f"another measurement is being written to {run}", timeout=60.0):
        commit(run)
        yield


def write_records(run: Path, files: Mapping[str, str], weights: Mapping[str, str]) -> None:
    """Write files of one measurement and what they are of: all of them change, or none.

    Args:
        files: name in the run folder -> text.
        weights: folder in the run folder -> `weights_of` it when it was measured.
    """
    with writing_records(run):
        partial = run / "records" / "commit.partial"
        remove_whole(partial)
        partial.mkdir()
        try:
            for name, text in files.items():
                write_whole(partial / name, text)
            made = {name: {"sha256": sha256_of(partial / name), "weights": dict(weights)} for name in files}
            write_whole(partial / "index.json", to_json(_records_or_none(run) | made))
            os.rename(partial, run / "records" / "commit")
        except BaseException:
            remove_whole(partial)
            raise
        commit(run)


def commit(run: Path) -> None:
    """Put the files of a complete measurement in their places, one that a kill interrupted too."""
    complete = run / "records" / "commit"
    if complete.is_symlink() or not complete.is_dir():
        return
    for path in sorted(complete.iterdir()):
        # Two readers may do so at once.
        with suppress(FileNotFoundError):
            os.replace(path, (complete.parent if path.name == "index.json" else run) / path.name)
    with suppress(FileNotFoundError):
        complete.rmdir()


def note_records(run: Path, entries: Mapping[str, dict]) -> None:
    """Add entries to records/index.json, of files that are written already."""
    with writing_records(run):
        write_whole(run / "records" / "index.json", to_json(_records_or_none(run) | dict(entries)))


def _records_or_none(run: Path) -> dict:
    # What cannot be read is written anew: its files count as unknown, and are measured again.
    try:
        return read_records(run)
    except ValueError:
        return {}


# One training


@dataclass
class State:
    """What a run knows beside weights, optimizers and random states."""

    stage: int = 0  # deepest hop count in training; text has none
    stage_start: int = 0  # step at which the stage began
    step: int = 0  # updates made
    tokens: int = 0  # input tokens of all ranks, without padding between molecules
    seconds: float = 0.0
    learnable_depth: int = 0  # deepest hop count that passed the gate
    gate: dict[str, float] = field(default_factory=dict)  # last check: hops -> accuracy, or loops -> nats per token
    finished: bool = False


def read_state(checkpoint: Path) -> State:
    """The state of a checkpoint whose files are all there as they were written.

    Raises:
        ValueError: what is wrong with it.
    """
    remedy = "delete the checkpoint."
    record = read_object(checkpoint / "state.json", remedy)
    if not record:
        raise ValueError(f"{checkpoint} has no state.json")
    values, digests = record.get("state"), record.get("sha256")
    if not isinstance(values, dict) or not isinstance(digests, dict) or not digests:
        raise ValueError("state.json has another shape")
    known = {item.name: item for item in fields(State)}
    for name in sorted(values.keys() ^ known.keys()):
        raise ValueError(f"state.json {'has an unknown' if name in values else 'lacks the'} field {name!r}")
    for name, value in values.items():
        default = {} if known[name].default is MISSING else known[name].default
        right = type(value) in ((int, float) if type(default) is float else (type(default),))
        if not right or (name == "gate" and not all(type(v) in (int, float) for v in value.values())):
            raise ValueError(f"state.json has {name}={value!r}")
    if checkpoint.name != f"step-{values['step']:09d}":
        raise ValueError(f"state.json is of step {values['step']}")
    for name, sha256 in digests.items():
        path = checkpoint / name
        if not path.is_file() or sha256_of(path) != sha256:
            raise ValueError(f"{name} is {'damaged' if path.is_file() else 'missing'}")
    return State(**values)


class RunFolder:
    """The folder of one training, which this process holds (`held`); every rank has one, the main process writes.

    Args:
        recipe: names the folder; `recipe.overwrite` replaces a run that is there.
        is_main: whether this is the process that writes.

    Attributes:
        final: where the run is, at the latest from its first checkpoint on.
        folder: where it is written to now.
        changed: field -> [old, new], of the FREE fields that differ from those the run went by so far.
        complete: the run has finished, and there are no checkpoints to go on from.
    """

    def __init__(self, recipe: Recipe, is_main: bool):
        self.recipe, self.is_main = recipe, is_main
        self.final = Path(recipe.output_dir) / recipe.name
        self.staging = self.final.with_name(f".{recipe.name}.new")
        self.folder = self.final
        self.changed: dict[str, list] = {}
        self.complete = self.resumes = False

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def resolved(self) -> dict:
        """The recipe as recipe.yaml has it."""
        return {k: v for k, v in asdict(self.recipe).items() if k not in ("output_dir", "overwrite")}

    def note(self) -> dict:
        """run.json: digests of data, tokenizer and starting weights, and of the files written."""
        return read_object(self.folder / "run.json", "delete it; what the run is of is then not known any more.")

    def write_note(self, **changes) -> None:
        write_whole(self.folder / "run.json", to_json(self.note() | changes))

    def ours(self, noted_in: Path) -> Callable[[Path], bool]:
        """Whether a path in a folder that is being replaced is a file of this project, as it was written.

        noted_in: the folder of the run whose notes say how its files were written; of others the name decides.
        """
        written: dict[str, list[str]] = {}
        with suppress(ValueError):
            files = read_object(noted_in / "run.json", "").get("files")
            written |= files if isinstance(files, dict) else {}
        written |= {name: [entry["sha256"]] for name, entry in _records_or_none(noted_in).items()}

        def as_written(path: Path) -> bool:
            # A folder is called NAME.replaced while it goes, be it the run's own or one in it.
            _, *parts = path.relative_to(self.final.parent).parts
            name = "/".join(part.removesuffix(OLD) for part in parts)
            return sha256_of(path) in written[name] if written.get(name) else owned(name)

        return as_written

    # Opening: refusals and repairs, nothing new is written

    def repair(self) -> None:
        """End what a kill cut short: renames, files of a measurement, half-written files."""
        old = self.final.with_name(self.final.name + OLD)
        if os.path.lexists(old) and made_here(old):
            settle(self.final, self.ours(old))
        remove_whole(self.staging)
        for partial in self.final.glob(".run.json.*.partial"):
            partial.unlink()  # the first file of a run, without which it is none
        if not made_here(self.final):
            return
        for old in (
            path for place in (".", "snapshots", "checkpoints") for path in self.final.glob(f"{place}/*{OLD}")
        ):
            settle(old.with_name(old.name.removesuffix(OLD)), self.ours(self.final))
        commit(self.final)
        for place in (self.final, self.final / "snapshots"):
            remove_partials(place)
        remove_whole(self.final / "checkpoints" / "partial")

    def look(self) -> None:
        """Decide how to go on; ValueError where that would lose something."""
        final = self.final
        for path in (
            final,
            *(final / name for name in ("checkpoints", "model", "snapshots", "tokenizer", "metrics.jsonl")),
        ):
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a link, and a run is not written through one: remove it, or name the folder that it "
                    "leads to by --output_dir and --name."
                )
        if final.exists() and not final.is_dir():
            raise ValueError(f"{final} is a file: give the run another --name.")
        if not made_here(final):
            for path in files_in(final):
                if owned(path):
                    raise ValueError(
                        f"{final / path} would be overwritten, and {final} is no run of train.py, or its run.json and "
                        "recipe.yaml are damaged: give the run another --name, or move that file away."
                    )
            return
        if not holds_results(final):
            return
        if self.recipe.overwrite:
            self.folder = self.staging
            return
        self.changed = self.compared()
        # Where all of them are damaged, the run begins again.
        self.resumes = any(final.glob("checkpoints/step-?????????/"))
        if self.resumes:
            return
        finished = (final / "summary.json").is_file() and (final / "model" / "config.json").is_file()
        if not finished or self.changed.keys() & {"max_steps", "max_seconds"}:
            raise ValueError(
                f"{final} has {'finished' if finished else 'results'}, but no checkpoints to go on from. {OTHERS}"
            )
        self.complete = True

    def compared(self) -> dict[str, list]:
        """FREE fields that differ from recipe.yaml; ValueError if others do, or the file is damaged."""
        path = self.final / "recipe.yaml"
        try:
            old = read_yaml(path)
            if not isinstance(old, dict):
                raise ValueError("no fields")
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}), so that it is not known what to go on with. {OTHERS}"
            ) from error
        # A field that the run's version did not have yet is at its default there.
        old, new = flatten(defaults(Recipe)) | flatten(old), flatten(self.resolved())
        names = sorted((old.keys() | new.keys()) - {"name", "output_dir", "overwrite"})
        differ = {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}
        fixed = [f"{name}: {before} -> {after}" for name, (before, after) in differ.items() if name not in FREE]
        if fixed:
            raise ValueError(f"{self.final} holds a run of another recipe ({'; '.join(fixed)}). {OTHERS}")
        return differ

    # Beginning: after the last refusal

    def check_data(self, splits: Mapping) -> None:
        """ValueError if a run that goes on has met other data; to be called before anything is made of them."""
        if not self.is_main:
            return
        self.data = data_of(splits)
        before = self.note().get("data") if self.resumes else None
        if self.resumes and before is None:
            logger.warning(f"{self.final} was begun before runs kept digests of their data: they are not compared.")
        elif before is not None:
            refuse_other_data(self.final, before, self.data)

    def kept_tokenizer(self) -> Path | None:
        """The folder of the tokenizer that a run which goes on began with."""
        folder = self.folder / "tokenizer"
        return folder if self.resumes and (folder / "tokenizer.json").is_file() else None

    def begin(self, tokenizer, state: State) -> None:
        """Write what comes before the first update; `state` is that of the checkpoint the run goes on from, or fresh.

        Raises:
            ValueError: tokenizer or starting weights are not those the run began with, or the folder cannot be
                written.
        """
        if not self.is_main:
            return
        began = {"tokenizer": tokenizer_of(tokenizer), "start": self.starting_weights()}
        before = self.note() if self.resumes else {}
        if before.get("tokenizer", began["tokenizer"]) != began["tokenizer"]:
            raise ValueError(f"the tokenizer is not the one {self.final} began with: restore it. {OTHERS}")
        for name, digest in (before.get("start") or {}).items():
            if began["start"].get(name) != digest:
                raise ValueError(
                    f"the weights in {vars_at(self.recipe, name)} ({name}) are not those {self.final} began with: "
                    f"restore them. {OTHERS}"
                )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not before.get("data"):
                self.write_note(format=1, data=self.data, **began)
            if not (self.folder / "tokenizer" / "tokenizer.json").is_file() or not self.resumes:
                self.save_folder("tokenizer", tokenizer)
            self.trim_metrics(state)
            self.drop_before(self.checkpoints / f"step-{state.step:09d}")  # a kill may have interrupted that
            if not self.resumes or self.changed:
                text = to_yaml(self.resolved())
                self.note_file("recipe.yaml", hashlib.sha256(text.encode()).hexdigest())
                write_whole(self.folder / "recipe.yaml", text)
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.folder} ({error}): free it, or choose another --output_dir."
            ) from error

    def starting_weights(self) -> dict[str, str]:
        """Field of the recipe -> digest of the weights in the folder that it names."""
        named = {"init_from": self.recipe.init_from, "distill.teacher": self.recipe.distill.teacher}
        return {
            name: weights_of(Path(path)) for name, path in named.items() if path is not None and Path(path).is_dir()
        }

    def trim_metrics(self, state: State) -> None:
        """Drop rows that a resumed run will write again and lines that are no rows; say where the recipe changed."""
        step = state.step or -1
        lines = (
            self.metrics.read_text(encoding="utf-8", errors="replace").splitlines() if self.metrics.exists() else []
        )
        kept, damaged = [], 0
        for line in lines:
            try:
                row = json.loads(line)
                kept += [row] if row["step"] <= step else []
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        if damaged > 1:  # the last one is cut short where a run was killed
            logger.warning(f"{self.metrics}: {damaged} lines are damaged and were dropped.")
        if self.changed:
            row = {"step": state.step, "seconds": state.seconds, "recipe_changed": self.changed}
            kept += [row] if row not in kept else []
        write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    # Checkpoints

    def save_checkpoint(self, accelerator, state: State) -> None:
        """Write the training state of all ranks to checkpoints/step-N at once or not at all, and keep the last two."""
        partial = self.checkpoints / "partial"
        if self.is_main:
            remove_whole(partial)
        accelerator.wait_for_everyone()
        # Not safetensors: it would warn of the tied head at every save.
        accelerator.save_state(partial, safe_serialization=False)
        accelerator.wait_for_everyone()
        if self.is_main:
            digests = {
                path.relative_to(partial).as_posix(): sha256_of(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            write_whole(partial / "state.json", json.dumps({"state": asdict(state), "sha256": digests}))
            complete = self.checkpoints / f"step-{state.step:09d}"
            # Only a damaged checkpoint that this run fell back from can be in the way, or be of a later step.
            replace_folder(partial, complete, self.ours(self.folder))
            self.drop_before(complete)
            for checkpoint in self.checkpoints.glob("step-*/"):
                if checkpoint > complete:
                    self.drop(checkpoint)
            if self.folder != self.final:
                replace_folder(self.staging, self.final, self.ours(self.final))
        self.folder = self.final
        accelerator.wait_for_everyone()

    def drop_before(self, newest: Path) -> None:
        """Keep one checkpoint before the newest."""
        for checkpoint in [path for path in sorted(self.checkpoints.glob("step-*/")) if path < newest][:-1]:
            self.drop(checkpoint)

    def drop(self, checkpoint: Path) -> None:
        """Remove a checkpoint, state.json first so that it is none any more, but nothing that was put into it."""
        if checkpoint.is_symlink() or not re.fullmatch(r"step-\d{9}", checkpoint.name):
            return
        (checkpoint / "state.json").unlink(missing_ok=True)
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            if (
                path.is_file()
                and not path.is_symlink()
                and owned(f"checkpoints/{path.relative_to(self.checkpoints).as_posix()}")
            ):
                path.unlink()
            elif path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
        if not any(checkpoint.iterdir()):
            checkpoint.rmdir()

    def load_checkpoint(self, accelerator) -> State | None:
        """Restore the newest checkpoint that is whole and return its state, or None; warns of those that are not.

        Raises:
            ValueError: it is whole, and this model does not take it.
        """
        for checkpoint in sorted(self.checkpoints.glob("step-*"), reverse=True):
            try:
                state = read_state(checkpoint)
            except ValueError as error:
                if self.is_main:
                    logger.warning(
                        f"{checkpoint} is incomplete or corrupt ({error}): trying the checkpoint before it."
                    )
                continue
            try:
                accelerator.load_state(checkpoint)
            except (RuntimeError, ValueError, KeyError, OSError) as error:
                raise ValueError(f"{checkpoint} does not fit this model ({error}): delete it. {OTHERS}") from error
            return state
        return None

    # The result

    def note_file(self, name: str, sha256: str) -> None:
        """Remember that a file of this digest is ours, before it is written."""
        files = self.note().get("files") or {}
        if sha256 not in files.setdefault(name, []):
            files[name].append(sha256)
            self.write_note(files=files)

    def save_folder(self, name: str, *parts) -> None:
        """Write what `parts` save (model, tokenizer) to the folder `name` at once or not at all, and note it."""
        with replaced_folder(self.folder / name, self.ours(self.folder)) as partial:
            for part in parts:
                part.save_pretrained(partial)
            files = self.note().get("files") or {}
            for path in map(partial.joinpath, files_in(partial)):
                digests = files.setdefault(f"{name}/{path.relative_to(partial).as_posix()}", [])
                digests += [sha256_of(path)] if sha256_of(path) not in digests else []
            changes = {"files": files}
            if name == "model":
                self.adopt_records()
                changes["weights"] = weights_of(partial)
            self.write_note(**changes)

    def adopt_records(self) -> None:
        """Measurements without an entry are of the model that is about to be replaced."""
        model, known = self.folder / "model", _records_or_none(self.folder)
        names = [
            path for path in files_in(self.folder) if any(fnmatch.fnmatchcase(path, record) for record in RECORDS)
        ]
        unknown = [name for name in names if name not in known]
        if unknown:
            with suppress(ValueError):
                weights = {"model": weights_of(model)}
                note_records(
                    self.folder, {n: {"sha256": sha256_of(self.folder / n), "weights": weights} for n in unknown}
                )

    def write_summary(self, summary: dict) -> None:
        """Write summary.json, the last file of a run."""
        text = json.dumps(summary, indent=2) + "\n"
        self.note_file("summary.json", hashlib.sha256(text.encode()).hexdigest())
        write_whole(self.folder / "summary.json", text)

    def summary(self) -> dict:
        """summary.json of a run that is complete."""
        path = self.final / "summary.json"
        found = read_object(path, f"there are no checkpoints to write it from. {OTHERS}")
        if weights_of(self.final / "model") != self.note().get("weights", weights_of(self.final / "model")):
            raise ValueError(f"{self.final}/model does not hold the weights that {path} is of. {OTHERS}")
        return found


@contextmanager
def held(recipe: Recipe, accelerator) -> Iterator[RunFolder]:
    """The folder of `recipe`'s run, held by this training until it ends.

    Raises:
        ValueError: another process trains there, the folder cannot be written, or what is there would be lost.
    """
    run = RunFolder(recipe, accelerator.is_main_process)
    with ExitStack() as stack:
        if run.is_main:
            try:
                run.final.parent.mkdir(parents=True, exist_ok=True)
                place = run.final.with_name(f".{recipe.name}.lock")
                stack.enter_context(locked(place, f"another process trains in {run.final}"))
            except OSError as error:
                raise ValueError(
                    f"cannot write to {run.final} ({error}): free it, or choose another --output_dir."
                ) from error
            run.repair()
            stack.callback(remove_whole, run.staging)
        accelerator.wait_for_everyone()
        run.look()
        yield run


def made_here(folder: Path) -> bool:
    """Whether train.py made the folder: it has our run.json, or a recipe.yaml from before there was one."""
    with suppress(ValueError):
        if "format" in read_object(folder / "run.json", ""):
            return True
    try:
        recipe = read_yaml(folder / "recipe.yaml")
    except ValueError:
        return any(folder.glob("checkpoints/step-?????????/state.json"))
    return isinstance(recipe, dict) and {"name", "model", "data", "depth", "optim"} <= recipe.keys()


def holds_results(folder: Path) -> bool:
    """Whether a run has what would be a loss: a checkpoint, a model, a summary, a measurement."""
    names = ("checkpoints/step-?????????", "model/config.json", "summary.json", *RECORDS)
    return any(any(folder.glob(name)) for name in names)


def files_in(folder: Path) -> list[str]:
    """Files below a folder, relative to it, links included and not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def defaults(section: type) -> dict:
    """Field -> default, of a section of the recipe and of the sections in it; fields without one are None."""
    values = {}
    for item in fields(section):
        if item.default is not MISSING:
            values[item.name] = item.default
        elif item.default_factory is not MISSING:
            made = item.default_factory()
            values[item.name] = asdict(made) if hasattr(made, "__dataclass_fields__") else made
        else:
            values[item.name] = None
    return values


def vars_at(recipe: Recipe, name: str):
    """The value of a dotted field."""
    value = recipe
    for part in name.split("."):
        value = vars(value)[part]
    return value


def refuse_other_data(folder: Path, before: dict, after: dict) -> None:
    """ValueError, with what changed, if two results of `data_of` differ."""
    changes = data_changes(before, after)
    if changes:
        raise ValueError(
            f"the data of {folder} are not those it began with ({changes}): restore the files its recipe names, or "
            "train on the new ones under another --name."
        )
