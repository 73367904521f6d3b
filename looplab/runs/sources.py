"""Find the model that a command is given: a run, a folder, the name of a model of this package, or an id on the Hub.

    runs/quickstart     a run folder: it has recipe.yaml; RUN/model is the same run
    FOLDER              what save_pretrained wrote or a download left: it has config.json
    khop-51k            a model that comes with this package, a folder in models/
    USER/NAME           a model on the Hugging Face Hub; its files go into the cache of huggingface_hub

The first that there is counts, from top to bottom. A published model carries the recipe and the records of its
training below run/, so that it can be measured like a run: `opened_run` makes a run folder of it. One rule for all
commands: results of a model that is not a run are printed and not kept, unless `--to FOLDER` names a folder for them,
which then is a run with a copy of the model. Nothing is written beside a downloaded or a shipped model.
"""

import difflib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from looplab.shipped import recipe_files, shipped

from .digests import weights_of
from .folder import ORIGIN, TRAINED, Run, open_run
from .records import MODEL_FILES, to_json
from .writing import whole_folder, write_whole

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
OURS = ("looped", "frozen_looped")  # values of model_type
RECORDS = (*TRAINED, "run.json", "records/index.json")
# Files of other tokenizers than ours; none of them is code.
TOKENIZER_FILES = ("*.txt", "*.model", "processor_config.json")


@dataclass(frozen=True)
class Source:
    """What a name stands for.

    Args:
        name: as the user wrote it.
        kind: "run", "folder", "shipped" or "Hub".
        folder: the run folder, or else the folder with config.json.
    """

    name: str
    kind: str
    folder: Path

    def model_folder(self) -> Path:
        """The folder to load from. Raises ValueError for a run that has no model yet."""
        return Run(self.folder).model_folder() if self.kind == "run" else self.folder

    def records(self) -> tuple[Path, list[str]]:
        """A folder, and the paths in it to files about the training and about measurements of the model."""
        if (self.folder / "run" / "recipe.yaml").is_file():  # published, or a copy of that
            place = self.folder / "run"
            measured = sorted(path.name for path in place.glob("*.json*"))
            return place, [name for name in dict.fromkeys([*RECORDS, *measured]) if (place / name).is_file()]
        for place in self.folder.resolve().parents[:2]:  # RUN/model_int4 and RUN/snapshots/step-9
            if (place / "recipe.yaml").is_file():  # what else is there was measured with other weights
                return place, [name for name in (*TRAINED, "run.json") if (place / name).is_file()]
        return self.folder, []

    def copy_model(self, folder: Path) -> None:
        """Copy the files that a model is loaded from to `folder`/model."""
        files = {path for pattern in (*MODEL_FILES, *TOKENIZER_FILES) for path in self.folder.glob(pattern)}
        (folder / "model").mkdir()
        for path in sorted(files):
            shutil.copyfile(path, folder / "model" / path.name)

    def write_run(self, folder: Path) -> None:
        """Make `folder` a run with everything but the model."""
        place, files = self.records()
        for name in files:
            write_whole(folder / name, (place / name).read_bytes())
        for path in sorted(self.folder.glob("figures/*.png")):
            write_whole(folder / "figures" / path.name, path.read_bytes())
        commit = {"commit": self.folder.name} if self.kind == "Hub" else {}
        write_whole(folder / ORIGIN, to_json({"model": self.name, "kind": self.kind, **commit}))


def find(name: str, looped: bool = True) -> Source:
    """The model called `name`, see the module docstring. Files of a model on the Hub are downloaded if need be.

    Args:
        looped: refuse other models on the Hub.

    Raises:
        ValueError: there is no such model, with the nearest name; or the Hub's is not a looped one or cannot be had.
        OSError: the Hub refuses a request, or a disk error.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "recipe.yaml").is_file() or (folder / ORIGIN).is_file():
            return Source(name, "run", folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is not a run folder: it has no recipe.yaml; nor a model: it has no config.json.")
        if folder.resolve().name == "model" and (folder.resolve().parent / "recipe.yaml").is_file():
            return Source(name, "run", folder.parent if folder.name == "model" else folder.resolve().parent)
        return Source(name, "folder", folder)
    if name in shipped_models():
        return Source(name, "shipped", shipped("models") / name)
    if name in recipe_files() or folder.suffix in (".yaml", ".yml"):
        raise ValueError(
            f"{name} is a recipe, not a run: train it by `looped train {name}`, and name the run it makes."
        )
    near = nearest(name)
    if HUB_ID.fullmatch(name) and not folder.exists() and (near is None or not folder.parent.is_dir()):
        return Source(name, "Hub", download(name, looped))
    known = "".join(f", {each}" for each in shipped_models())
    raise ValueError(
        f"there is no run folder {name}; "
        + (f"did you mean {near}?" if near else f"name a run, a folder with a model, USER/NAME on the Hub{known}.")
    )


def shipped_models() -> list[str]:
    """Names of the models that come with this package."""
    return sorted(path.parent.name for path in shipped("models").glob("*/config.json"))


def nearest(name: str) -> str | None:
    """The folder or model that a name was probably meant to be."""
    parent = Path(name).parent
    beside = [str(path) for path in parent.glob("*/")] if parent.is_dir() else []
    known = {path: path for path in beside} | {each: each for each in shipped_models()}
    known |= {path.name: str(path) for path in Path("runs").glob("*/")} if parent == Path() else {}
    return next((known[found] for found in difflib.get_close_matches(name, known, n=1)), None)


def download(name: str, looped: bool) -> Path:
    """The folder in the cache of huggingface_hub with the files of the model USER/NAME, as it is on the Hub now, or as
    it was downloaded if the Hub cannot be reached. Arguments and errors are those of `find`."""
    from httpx2 import TransportError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = [*MODEL_FILES, *TOKENIZER_FILES, "run/*", "figures/*.png"]
    api = HfApi()
    try:
        api.model_info(name)  # fails at once, where a download tries again and again
    except (TransportError, OfflineModeIsEnabled) as error:
        try:
            return Path(api.hf_hub_download(name, "config.json", local_files_only=True)).parent
        except LocalEntryNotFoundError:
            raise ValueError(
                f"there is no run folder {name}, and no model {name} was downloaded before; the Hub cannot be reached "
                f"to look for it ({' '.join(str(error).split())})."
            ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated on the Hub: ask for access on its page, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no run folder {name}, and the Hub has no model {name}, or it is private: check the spelling, "
            "or run `hf auth login`."
        ) from error
    try:
        config = api.hf_hub_download(name, "config.json")
        if looped:
            check_kind(name, Path(config))
        return Path(api.snapshot_download(name, allow_patterns=patterns))
    except (TransportError, LocalEntryNotFoundError) as error:
        raise ValueError(f"the download of {name} broke off: run the same command again, and it goes on.") from error
    except EntryNotFoundError as error:
        raise ValueError(f"{name} on the Hub is not a model of transformers: it has no config.json.") from error


def check_kind(name: str, config: Path) -> None:
    """Raise ValueError unless config.json is of a looped model: others are refused before their weights come."""
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"config.json of {name} on the Hub cannot be read ({error}): it is not a model.") from error
    if kind not in OURS:
        raise ValueError(
            f"{name} on the Hub is a {kind}, not a looped model: make one of it with `looped convert {name} FOLDER`."
        )


@contextmanager
def opened_run(name: str, to: str | None = None, copied: bool = False) -> Iterator[Run]:
    """Within the block, the model called `name` as a run.

    Args:
        to: for a model that is not a run, the folder that becomes one; a folder that has become one by an earlier call
            goes on. Without it the run is a temporary one, and gone after the block.
        copied: a temporary run has a copy of the model, not a link to it.

    Raises:
        ValueError: as `find`; or `to` is given for a run, or holds something else.
    """
    source = find(name)
    if source.kind == "run":
        if to is not None:
            raise ValueError(f"{name} is a run, and results go into it: leave --to out.")
        yield open_run(source.folder)
    elif to is not None:
        yield kept_run(source, Path(to))
    else:
        with tempfile.TemporaryDirectory(prefix="looped-") as place:
            folder = Path(place) / (name if source.kind == "Hub" else source.folder.resolve().name)
            source.write_run(folder)
            if copied:
                source.copy_model(folder)
            else:
                (folder / "model").symlink_to(source.folder.resolve(), target_is_directory=True)
            yield Run(folder, name)


@contextmanager
def opened_runs(names: Sequence[str], to: str | None = None, copied: bool = False) -> Iterator[list[Run]]:
    """Within the block, the models called `names` as runs, see `opened_run`."""
    with ExitStack() as stack:
        yield [stack.enter_context(opened_run(name, to, copied)) for name in names]


def kept_run(source: Source, folder: Path) -> Run:
    """The run `folder` with a copy of the model; it is made unless it is there. Raises ValueError if it is another."""
    if folder.exists():
        if not Run(folder).copied or weights_of(folder / "model") != weights_of(source.folder):
            raise ValueError(f"{folder} exists and was not made from {source.name}: name a new folder.")
        return open_run(folder)
    with whole_folder(folder) as new:
        source.write_run(new)
        source.copy_model(new)
    return open_run(folder)
