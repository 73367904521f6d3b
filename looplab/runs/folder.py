"""Read a run folder, `runs/<name>/`, in which training and evaluation meet.

recipe.yaml     the resolved recipe                      written before the first step
metrics.jsonl   records of training, held-out checks     while training
model/          weights, config, tokenizer, model code   at the end
summary.json    the results of the training              at the end
run.json        digests of data, tokenizer and files     before the first step, and with every file
data/           a copy of the data, if they are small     before the first step
records/        the weights that were measured           with every measurement
checkpoints/    states to resume from                    while training
snapshots/      the model at steps that the recipe names while training
export/         the model for other engines              `looped export`
model_int4/     weights of few bits, dequantised         `looped quantize`
figures/        PNG                                      `looped plot`, `looped lens`
origin.json     what model/ was copied from              `--to FOLDER` on a model that is not a run (sources.py)

The measured files depend on the task: `Task.records` names them.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from .digests import data_changes, data_of, refuse_other_data, sha256_of, weights_of
from .records import commit, note_records, read_object, read_records, to_json, write_records, writing_records
from .writing import below, write_whole
from .yaml_text import parse_yaml

logger = logging.getLogger(__name__)

AGAIN = "run train.py again: it resumes from the last checkpoint."
UNFINISHED = f"the training has not finished; {AGAIN}"
TRAINED = ("recipe.yaml", "summary.json", "metrics.jsonl")  # what the training writes beside the model
ORIGIN = "origin.json"


@dataclass(frozen=True)
class Run:
    """The files of one run. A reader raises ValueError, with the remedy, if its file is missing or broken.

    Args:
        folder: with the files.
        given: what the user called it, if that is a model and no run (sources.py): `folder` is then a temporary one.
        data: fields of the recipe's section `data` that say where the data of the run are now; of a model without a
            recipe, the whole section, which says what it is measured on.
    """

    folder: Path
    given: str | None = None
    data: Mapping = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.given or str(self.folder)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def again(self) -> str:
        """The remedy for a damaged model, or for another one than was measured."""
        if self.given is not None:
            return "save it again, or delete it and download it again."
        return f"delete {self}, and make it again by --to {self}." if self.copied else AGAIN

    @property
    def unfinished(self) -> str:
        """What it means, and what to do, where the end of a training is missing."""
        trained = self.given is None and not self.copied
        return UNFINISHED if trained else "it was saved without the records of its training."

    @property
    def copied(self) -> bool:
        """Whether the run was made from a model that is not a run (sources.py)."""
        return (self.folder / ORIGIN).is_file()

    @property
    def bare(self) -> bool:
        """Whether there is only a model, without the recipe of its training."""
        return not (self.folder / "recipe.yaml").is_file()

    def recipe(self) -> dict:
        """`recipe.yaml`, as the run was trained; ValueError where it is missing or damaged."""
        parse = partial(parse_yaml, where="as YAML")
        return self._parse("recipe.yaml", parse, "was it written by train.py?", RECIPE)

    def section(self) -> Mapping:
        """The recipe's section `data`; of a model without a recipe, what the user says in its place."""
        if not self.bare:
            return self.recipe().get("data", {})
        if "task" not in self.data:
            raise ValueError(
                f"{self} is a model without run/recipe.yaml, which says what it was trained on: name the run, or a "
                "model that `looped publish` has published; or say by `looped eval --data` which questions it is to "
                "answer."
            )
        return self.data

    def task(self) -> str:
        """Name of the task in the recipe."""
        data = self.section()
        if "task" not in data:
            raise ValueError(f"{self}/recipe.yaml has no data.task: was it written by train.py?")
        return data["task"]

    def summary(self) -> dict:
        """`summary.json`, which a finished training writes; ValueError where it is missing or damaged."""
        return self._parse("summary.json", json.loads, self.unfinished, SUMMARY)

    def check_summary(self) -> None:
        """Raise ValueError if model/ does not hold the weights that the training ended with."""
        if self.note().get("weights", self.weights) != self.weights:
            raise ValueError(f"{self}/model does not hold the weights that summary.json describes: {self.again}")

    def metrics(self) -> list[dict]:
        """The lines of `metrics.jsonl`; ValueError where it is missing or damaged."""
        return self._parse("metrics.jsonl", json_lines, "nothing was trained here; run train.py.", METRICS)

    def read(self, record: "RecordFile"):
        """A measurement: the lines of a .jsonl file, or the object in a .json file."""
        path = self.folder / record.name
        keep, then = ("", ".") if self.given is None else (" --to FOLDER", ", and name FOLDER.")
        remedy = f"run `looped {record.verb} {self}{keep}` {'again' if path.is_file() else 'first'}{then}"
        parse = json_lines if record.name.endswith(".jsonl") else json.loads
        found = self._parse(record.name, parse, remedy, record.shape)
        self.check_record(record.name, remedy)
        return found

    def has(self, record: "RecordFile") -> bool:
        """Whether something was measured, and is on file."""
        return (self.folder / record.name).is_file()

    def model_folder(self) -> Path:
        """The folder `model/`; ValueError where nothing was saved."""
        folder = self.folder / "model"
        if not (folder / "config.json").is_file():
            raise ValueError(f"{self} has no model/config.json: {self.again if self.copied else UNFINISHED}")
        return folder if self.given is None else folder.resolve()

    def trained_loops(self) -> tuple[int, int]:
        """Smallest and largest loop count of the training batches."""
        loops = self.summary()["trained_loops"]
        return loops["minimum"], loops["maximum"]

    @cached_property
    def weights(self) -> str:
        """Digest of the weights in model/ at the first time that this is read."""
        return weights_of(self.model_folder())

    def note(self) -> dict:
        """The object in run.json; {} for a run that an older version made without it."""
        return read_object(self.folder / "run.json", f"delete it, or {self.again}")

    def check_data(self, splits: Mapping, only: str | None = None) -> None:
        """Check that the run was trained on these data.

        Args:
            splits: the data that the recipe gives now.
            only: the one split to compare; all unless given.

        Raises:
            ValueError: the data differ; the message says which files or splits.
        """
        before = self.note().get("data")
        if before is None:
            say_once(f"{self} is from before runs kept digests of their data: the data are not compared.")
            return
        after = data_of(splits if only is None else {only: splits[only]})
        if only is not None:
            before = {"splits": {only: before["splits"].get(only)}, "sources": {}}
            after["sources"] = {}
        refuse_other_data(self, before, after)

    def data_changes(self, splits: Mapping) -> str:
        """What has changed in the data of the run, in words for a message; '' if nothing has, or nothing is known."""
        before = self.note().get("data")
        said = "" if before is None else data_changes(before, data_of(splits))
        return said and f" ({said})"

    def write(self, files: Mapping[str, str], weights: Mapping[str, str] | None = None) -> Path:
        """Write the files of one measurement, all or none, note the measured weights, and return the last file.

        Args:
            files: name -> text.
            weights: folder in the run -> digest of the weights in it that were measured; model/ unless given.
        """
        write_records(self.folder, files, {"model": self.weights} if weights is None else weights)
        return self.folder / list(files)[-1]

    def drew(self, figures: Iterable[Path], weights: Mapping[str, str] | None = None) -> list[Path]:
        """Note which weights the figures inside the run show, and return all `figures`. weights: as in `write`."""
        figures = list(figures)
        if weights is None and not (self.folder / "model" / "config.json").is_file():
            return figures  # the run is still in training
        weights = {"model": self.weights} if weights is None else dict(weights)
        own = [path for path in figures if path.is_relative_to(self.folder)]
        made = {path.relative_to(self.folder).as_posix(): sha256_of(path) for path in own}
        note_records(self.folder, {name: {"sha256": digest, "weights": weights} for name, digest in made.items()})
        return figures

    def generation_settings(self) -> dict:
        """The fields of model/generation_config.json; {} if there is none."""
        return read_object(self.model_folder() / "generation_config.json", self.again)

    def save_generation_settings(self, **settings) -> Path:
        """Set fields of model/generation_config.json; the weights and what was measured of them stay as they are.

        The digest of the file is noted in run.json first, as for every file that this project wrote.

        Raises:
            ValueError: the file is missing or damaged, or model/ is a link.
        """
        path = below(self.folder, "model") / "generation_config.json"
        fields = read_object(path, self.again)
        if not fields:
            raise ValueError(f"{self} has no model/generation_config.json: {self.again}")
        if fields.get("_from_model_config"):
            fields["_from_model_config"] = False  # of a file marked so, transformers drops our fields on load
        text = json.dumps(fields | settings, indent=2, sort_keys=True) + "\n"
        with writing_records(self.folder):
            note = self.note()
            if note:  # a run of an older version has none
                written = note.setdefault("files", {}).setdefault(f"model/{path.name}", [])
                digest = hashlib.sha256(text.encode()).hexdigest()
                if digest not in written:
                    written.append(digest)
                    write_whole(self.folder / "run.json", to_json(note))
            return write_whole(path, text)

    def check_record(self, file: str, remedy: str, strict: bool = False) -> None:
        """Raise ValueError if a file was measured on other weights than the run has now.

        strict: raise also if the weights of the file are unknown, unless the run is too old to note them. Otherwise a
        warning is logged.
        """
        entry = read_records(self.folder).get(file)
        if entry is None or entry["sha256"] != sha256_of(self.folder / file):
            unknown = f"it is not known which weights {self}/{file} was made with"
            if strict and self.note():
                raise ValueError(f"{unknown}: {remedy}")
            say_once(f"{unknown}.")
            return
        for folder, digest in entry["weights"].items():
            # A folder of weights that the user deleted is no contradiction.
            if (self.folder / folder / "config.json").is_file() and weights_of(self.folder / folder) != digest:
                raise ValueError(f"{self}/{file} was made with other weights than {folder}/ has now: {remedy}")

    def _parse(self, file: str, parse: Callable, remedy: str, shape: Mapping):
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{self} has no {file}: {remedy}")
        try:
            found = parse(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error
        rows = found if parse is json_lines else [found]
        if not rows:
            raise ValueError(f"{path} is empty: {remedy}")
        checked = [checked_record(row, shape, str(path), remedy) for row in rows]
        return checked if parse is json_lines else checked[0]


def open_run(folder: str | Path) -> Run:
    """The run in `folder`. `sources.opened_run` also opens other models, and suggests names.

    Raises:
        ValueError: it is not the folder of a run.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file() and not (folder / ORIGIN).is_file():
        raise ValueError(f"{folder} is not a run folder: it has no recipe.yaml, which train.py writes first.")
    commit(folder)
    return Run(folder)


class Record(dict):
    """A JSON object from a file. A missing field raises ValueError with the file and the remedy."""

    def __init__(self, values: dict, path: str, remedy: str):
        super().__init__(values)
        self.path, self.remedy = path, remedy

    def __missing__(self, name):
        raise ValueError(f"{self.path} lacks {name!r}: {self.remedy}")


def checked_record(value, shape, path: str, remedy: str):
    """`value` with its objects as `Record`. Raises ValueError if a type differs from `shape`.

    shape: a type, several types, SHARE, [shape of the items], or {name: shape}, where "*" stands for all other names;
    a name may be missing.
    """
    if shape == SHARE:
        checked_record(value, NUMBER, path, remedy)
        if not 0 <= value <= 1:
            raise ValueError(f"{path} has {value!r} where a share from 0 to 1 belongs: {remedy}")
        return value
    kind = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        raise ValueError(f"{path} has {value!r} where {shape_name(kind)} belongs: {remedy}")
    if isinstance(value, dict):
        shapes = shape if isinstance(shape, dict) else {}
        items = {n: checked_record(v, shapes.get(n, shapes.get("*", object)), path, remedy) for n, v in value.items()}
        return Record(items, path, remedy)
    if isinstance(value, list):
        items = shape[0] if isinstance(shape, list) else object
        return [checked_record(item, items, path, remedy) for item in value]
    return value


def shape_name(kind) -> str:
    """How a sentence calls a value of this type."""
    names = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
    return names.get(kind, "a number")


NUMBER, SHARE = (int, float), "share"
# Types of fields, see `checked_record`; a field may be missing until it is read.
RECIPE = {"name": str, "data": {"task": str, "overrides": dict}, "model": dict, "eval_loops": [int]}
SUMMARY = {
    "steps": int, "seconds": NUMBER, "tokens": int, "parameters": int, "gate_loops": int, "learnable_depth": int,
    "trained_hops": [int], "trained_loops": {"minimum": int, "maximum": int}, "gate": {"*": NUMBER},
    "hardware": {}, "versions": {"*": str}, "train_tokens": int, "train_molecules": int,
    "held_out": {"loss": NUMBER, "perplexity": NUMBER},
}  # fmt: skip
METRICS = {
    "step": int, "seconds": NUMBER, "loss": NUMBER, "lr": NUMBER, "tokens": int, "num_loops": int, "stage": int,
    "tokens_per_second": NUMBER, "updates_per_second": NUMBER, "data_seconds": NUMBER, "memory_bytes": int,
    "of_peak": NUMBER, "stopped": str, "rows": [int],
    "hops": int, "gate": {"*": NUMBER}, "gate_by_split_kind": {"*": NUMBER},
    "held_out": {"loss": NUMBER, "perplexity": NUMBER}, "held_out_at_loops": {"*": {"loss": NUMBER}},
}  # fmt: skip


@dataclass(frozen=True)
class RecordFile:
    """A file in a run folder that holds a measurement of its model.

    Args:
        name: of the file; .jsonl has an object per line, .json one object.
        verb: of `looped`, which writes the file.
        shape: of an object, see `checked_record`.
        of_snapshots: the verb also writes it for a snapshot, as NAME_step-N.jsonl.
    """

    name: str
    verb: str
    shape: Mapping = field(default_factory=dict)
    of_snapshots: bool = False

    def patterns(self) -> list[str]:
        """Patterns of the file's names, for the model and for snapshots."""
        stem, dot, end = self.name.rpartition(".")
        return [self.name, f"{stem}_step-*{dot}{end}"] if self.of_snapshots else [self.name]


said = set()


def say_once(sentence: str) -> None:
    """Log a warning, once in the life of the process."""
    if sentence not in said:
        said.add(sentence)
        logger.warning(sentence)


def json_lines(text: str) -> list[dict]:
    """The lines of a .jsonl text as objects. The last line is left out if a kill cut it short."""
    lines = [line for line in text.split("\n") if line.strip()]
    rows = [json.loads(line) for line in lines[:-1]]
    try:
        return rows + [json.loads(line) for line in lines[-1:]]
    except json.JSONDecodeError:
        if text.endswith("\n"):
            raise
        return rows


def rows_so_far(path: Path) -> list[dict]:
    """The lines of a .jsonl file that is written bit by bit; none if it is missing or damaged."""
    try:
        rows = json_lines(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return rows if all(isinstance(row, dict) for row in rows) else []


def to_json_lines(rows: Iterable[dict]) -> str:
    """The text of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_on_file(path: Path, facts: dict) -> list[dict]:
    """The lines of a .jsonl file that have all of `facts`: a measurement that was interrupted goes on from them."""
    return [row for row in rows_so_far(path) if facts.items() <= row.items()]
