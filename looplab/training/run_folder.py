"""The run folder of a training, `<output_dir>/<name>/`: what is written, in which order, and what may be removed.

    new        nothing of a run is there           run.json, recipe.yaml and tokenizer/ come first
    begun      no checkpoint yet                   nothing to lose: a corrected recipe starts over
    going on   checkpoints/step-N                  the same command resumes; the budget may have changed (FREE)
    finished   model/ and summary.json             protected like checkpoints, with or without them
    replacing  `--overwrite true` over these       the new run grows in .NAME.new; at its first checkpoint it takes the
                                                   place of the old one, which until then is whole

Three laws hold at every moment, a kill included. A file is the old one or the new one, and the files of one
measurement change together. A file is removed only if this project wrote it: its name is one that runs/records.py or
a task knows, and its digest is the noted one. Every measurement names the weights that were measured.
`docs/guides/run_folders.md` has the files and what to do about each refusal.
"""

import fnmatch
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from accelerate.utils import broadcast_object_list
from datasets import DatasetDict

from looplab.runs.digests import data_of, refuse_other_data, sha256_of, tokenizer_of, weights_of
from looplab.runs.folder import Run
from looplab.runs.records import (
    OLD,
    commit,
    locked,
    note_records,
    owned,
    read_object,
    records_or_none,
    remove_whole,
    replace_folder,
    replaced_folder,
    settle,
    to_json,
)
from looplab.runs.sections import flatten
from looplab.runs.writing import remove_partials, write_whole
from looplab.runs.yaml_text import read_yaml, to_yaml
from looplab.tasks.data import COPY, Copy
from looplab.tasks.registry import measured_files, written_files
from looplab.tasks.training import State

from .checkpoints import TrainingState
from .processes import ModelFiles
from .recipe import Recipe, move_check_every, recipe_defaults

logger = logging.getLogger(__name__)

# Fields of a recipe that may change when a run goes on: none of them changes what an update does, but for schedules
# that follow the budget, and the last digits where layers are compiled.
FREE = frozenset(
    {
        "max_steps", "max_seconds", "log_every", "checkpoint_every", "checkpoint_seconds", "keep_checkpoints",
        "max_shard_size", "eval_loops", "snapshots", "spike", "trackers", "compile",
        "data.prefetch",
    }
)  # fmt: skip

# Fields that say where something is -> the digest in run.json that tells whether it is the same. They may change, too.
PLACES = {
    r"data\.(files|tokens|dataset(\..*)?|overrides\.(dataset\..*|.*files))": "data",
    r"data\.tokenizer": "tokenizer",
    r"init_from|distill\.teacher": "start",
}

OTHERS = "Give this run another --name, or replace the one there with --overwrite true."


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
        starts: field of the recipe -> folder of the weights that the run starts or learns from, or None.
        changed: field -> [old, new], of the fields that differ from those the run went by so far, FREE and PLACES.
        complete: the run has finished, and there are no checkpoints to go on from.
    """

    def __init__(self, recipe: Recipe, is_main: bool):
        self.recipe, self.is_main = recipe, is_main
        self.final = Path(recipe.output_dir) / recipe.name
        self.staging = self.final.with_name(f".{recipe.name}.new")
        self.folder = self.final
        self.starts = {"init_from": recipe.init_from, "distill.teacher": recipe.distill.teacher}
        self.changed: dict[str, list] = {}
        self.complete = self.resumes = False
        self.written: Future | None = None  # files of a checkpoint that is being written, and the state that it is of
        self.of: dict = {}

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def note(self) -> dict:
        """run.json: digests of data, tokenizer and starting weights, and of the files written."""
        return read_object(self.folder / "run.json", "delete it; what the run is of is then not known any more.")

    def write_note(self, **changes) -> None:
        write_whole(self.folder / "run.json", to_json(self.note() | changes))

    def ours(self, noted_in: Path) -> Callable[[Path], bool]:
        """Whether a path in a folder that is being replaced is a file of this project, as it was written.

        noted_in: the run folder whose notes hold the digests of its files; the name decides for files without a note.
        """
        written: dict[str, list[str]] = {}
        with suppress(ValueError):
            files = read_object(noted_in / "run.json", "").get("files")
            written |= files if isinstance(files, dict) else {}
        written |= {name: [entry["sha256"]] for name, entry in records_or_none(noted_in).items()}

        def as_written(path: Path) -> bool:
            # A folder is called NAME.replaced while it goes, be it the run's own or one in it.
            _, *parts = path.relative_to(self.final.parent).parts
            name = "/".join(part.removesuffix(OLD) for part in parts)
            return sha256_of(path) in written[name] if written.get(name) else owned(name, written_files())

        return as_written

    # Opening: refusals and repairs, nothing new is written

    def repair(self) -> None:
        """End what a kill cut short: renames, files of a measurement, half-written files."""
        old = self.final.with_name(self.final.name + OLD)
        if os.path.lexists(old) and made_here(old):
            settle(self.final, self.ours(old), written_files())
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
            *(final / name for name in ("checkpoints", "model", "snapshots", "tokenizer", COPY, "metrics.jsonl")),
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
                if owned(path, written_files()):
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
        """Fields that differ from recipe.yaml and may; ValueError if others do, or the file is damaged."""
        path = self.final / "recipe.yaml"
        try:
            old = read_yaml(path)
            if not isinstance(old, dict):
                raise ValueError("no fields")
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}), so that it is not known what to go on with. {OTHERS}"
            ) from error
        move_check_every(old)
        # A field that one of the two does not have is at its default there: versions and tasks differ in their fields.
        default = recipe_defaults(self.recipe.data.task)
        old, new = default | flatten(old), default | flatten(self.recipe.resolved())
        names = sorted((old.keys() | new.keys()) - {"name", "output_dir", "overwrite"})
        differ = {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}
        fixed = [f"{name}: {before} -> {after}" for name, (before, after) in differ.items() if not self.is_free(name)]
        if fixed:
            raise ValueError(f"{self.final} holds a run of another recipe ({'; '.join(fixed)}). {OTHERS}")
        return differ

    def is_free(self, name: str) -> bool:
        """Whether a field may change when the run goes on."""
        if name in FREE:
            return True
        places = [of for where, of in PLACES.items() if re.fullmatch(where, name)]
        return bool(places) and any(map(self.note().get, places))

    # Beginning: after the last refusal

    @property
    def moved(self) -> bool:
        """Whether the recipe says where the data are now."""
        return any(name.startswith("data.") for name in self.changed)

    def splits(self) -> DatasetDict:
        """The data of the recipe; of a run that goes on, wherever they are now, unless the recipe says it anew."""
        if self.resumes and not self.moved:
            return self.recipe.data.find(Run(self.final))
        return self.recipe.data.load()

    def check_data(self, splits: Mapping) -> None:
        """ValueError if the run goes on and its data have changed; call it before anything uses the data."""
        if not self.is_main:
            return
        self.copy, self.data = Copy(self.recipe.data.kept(splits)), data_of(splits)
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
        """Write the files that come before the first update. `state` is fresh, or comes from the checkpoint.

        Raises:
            ValueError: the run began with another tokenizer or other starting weights, or the folder is read-only.
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
                    f"the weights in {self.starts[name]} ({name}) are not the ones {self.final} began with: restore "
                    f"them. {OTHERS}"
                )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not before.get("data"):
                self.write_note(format=1, data=self.data, **began)
            if not self.resumes or self.moved:
                self.write_note(folder=os.getcwd())  # relative names in the recipe are below it
            if self.copy.splits and self.copy.small() and not (self.resumes and (self.folder / COPY).is_dir()):
                self.save_folder(COPY, self.copy)
            if not (self.folder / "tokenizer" / "tokenizer.json").is_file() or not self.resumes:
                self.save_folder("tokenizer", tokenizer)
            self.trim_metrics(state)
            self.drop_before(self.checkpoints / f"step-{state.step:09d}")  # a kill may have interrupted that
            if not self.resumes or self.changed:
                text = to_yaml(self.recipe.resolved())
                self.note_file("recipe.yaml", hashlib.sha256(text.encode()).hexdigest())
                write_whole(self.folder / "recipe.yaml", text)
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.folder} ({error}): free it, or choose another --output_dir."
            ) from error

    def starting_weights(self) -> dict[str, str]:
        """Field of the recipe -> digest of the weights in the folder that it names."""
        folders = {name: Path(path) for name, path in self.starts.items() if path is not None}
        return {name: weights_of(folder) for name, folder in folders.items() if folder.is_dir()}

    def trim_metrics(self, state: State) -> None:
        """Drop lines that a resumed run will write again and damaged lines; note where the recipe changed."""
        last = state.step if state.step > 0 else -1  # a run that begins writes the row of step 0 again
        lines = (
            self.metrics.read_text(encoding="utf-8", errors="replace").splitlines() if self.metrics.exists() else []
        )
        kept, damaged = [], 0
        for line in lines:
            try:
                row = json.loads(line)
                kept += [row] if row["step"] <= last else []
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
        if damaged > 1:  # the last one is cut short where a run was killed
            logger.warning(f"{self.metrics}: {damaged} lines are damaged and were dropped.")
        if self.changed:
            row = {"step": state.step, "seconds": state.seconds, "recipe_changed": self.changed}
            kept += [row] if row not in kept else []
        write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    # Checkpoints

    def save_checkpoint(self, training: TrainingState, state: State) -> None:
        """Write the training state of all processes to checkpoints/step-N at once or not at all, and keep the newest.

        Several processes write in the background: `end_checkpoint` gives the folder its name.
        """
        self.end_checkpoint()
        partial = self.checkpoints / "partial"
        if self.is_main:
            remove_whole(partial)
            partial.mkdir(parents=True)
        training.accelerator.wait_for_everyone()
        self.written, self.of = training.write(partial), asdict(state)
        if training.accelerator.num_processes == 1:
            self.end_checkpoint()

    def end_checkpoint(self, wait: bool = True) -> None:
        """End the checkpoint that is being written. wait: for its files, of which some may still be missing."""
        if self.written is None or not (wait or self.written.done()):
            return
        digests, self.written = self.written.result(), None
        if self.is_main:
            partial, complete = self.checkpoints / "partial", self.checkpoints / f"step-{self.of['step']:09d}"
            write_whole(partial / "state.json", json.dumps({"state": self.of, "sha256": digests}))
            # Only a damaged checkpoint that this run fell back from can be in the way, or be of a later step.
            replace_folder(partial, complete, self.ours(self.folder))
            self.drop_before(complete)
            for checkpoint in self.checkpoints.glob("step-*/"):
                if checkpoint > complete:
                    self.drop(checkpoint)
            if self.folder != self.final:
                replace_folder(self.staging, self.final, self.ours(self.final), written_files())
        self.folder = self.final

    def drop_before(self, newest: Path) -> None:
        """Keep so many checkpoints as the recipe says, the newest among them."""
        before = [path for path in sorted(self.checkpoints.glob("step-*/")) if path < newest]
        for checkpoint in before[: max(0, len(before) + 1 - self.recipe.keep_checkpoints)]:
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

    def load_checkpoint(self, training: TrainingState) -> State | None:
        """Restore the newest whole checkpoint and return its state, None without any; warn of each damaged one.

        Raises:
            ValueError: none is whole, or this model does not take it.
        """
        (state,) = broadcast_object_list([self.newest_state() if self.is_main else None])
        if state is None:
            return None
        checkpoint = self.checkpoints / f"step-{state.step:09d}"
        try:
            training.read(checkpoint)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise ValueError(f"{checkpoint} does not fit this model ({error}): delete it. {OTHERS}") from error
        return state

    def newest_state(self) -> State | None:
        """The state of the newest whole checkpoint, as `load_checkpoint`."""
        damaged = ""
        for checkpoint in sorted(self.checkpoints.glob("step-*"), reverse=True):
            try:
                return read_state(checkpoint)
            except ValueError as error:
                damaged = damaged or f"{checkpoint} is incomplete or corrupt ({error})"
                logger.warning(f"{checkpoint} is incomplete or corrupt ({error}): trying the checkpoint before it.")
        if damaged:
            raise ValueError(f"{damaged}, and no other is whole: bring back what is missing. {OTHERS}")
        return None

    # The result

    def note_file(self, name: str, sha256: str) -> None:
        """Remember that a file of this digest is ours, before it is written."""
        files = self.note().get("files") or {}
        if sha256 not in files.setdefault(name, []):
            files[name].append(sha256)
            self.write_note(files=files)

    def save_model(self, name: str, files: ModelFiles, tokenizer) -> None:
        """Write a model folder as `save_folder`; every process must call this."""
        if self.is_main:
            self.save_folder(name, files, tokenizer)
        else:
            files.help_to_save()

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
        """Note that measurements without an entry are of the model that is about to be replaced."""
        model, known = self.folder / "model", records_or_none(self.folder)
        names = [
            path
            for path in files_in(self.folder)
            if any(fnmatch.fnmatchcase(path, record) for record in measured_files())
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
    """Whether the folder holds something worth keeping: a checkpoint, a model, a summary, a measurement."""
    names = ("checkpoints/step-?????????", "model/config.json", "summary.json", *measured_files())
    return any(any(folder.glob(name)) for name in names)


def files_in(folder: Path) -> list[str]:
    """Files below a folder, relative to it, links included and not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)
