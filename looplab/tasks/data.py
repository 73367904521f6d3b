"""The sections of a recipe that belong to its task: `data` and `curriculum`.

A task has a class for each, so that a field of another task is unknown. Nothing here imports torch.

Where the data of a run are, also after the run was moved (`Data.find`), and docs/guides/run_folders.md says the same:

    1. the files that the recipe names; a relative name is below the folder where the training began (run.json has it).
       A data set of the Hub comes after the copy: it is asked for only where there is none
    2. the copy in RUN/data, which a run keeps of files that a user named, if it is small (`keep`)
    3. the same names below the current folder

The first place where there is something counts. Whatever it is, its digests must be those of the training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from huggingface_hub.dataclasses import strict

from data_builders.fields import number
from looplab.runs.folder import Run

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

COPY = "data"  # the folder of a run with the copy of its data
KEPT_BYTES = 32 * 2**20  # the most rows that a run keeps a copy of, as Arrow has them in memory


@dataclass(frozen=True)
class RowShape:
    """What rows of training data are to a model, as far as a recipe alone says it.

    Args:
        vocabulary: tokens of the tokenizer; None where they are known with the data only.
        tokens: length of the rows -> share of the updates with rows of that length; None as above.
        logits: positions of a row that are learnt, counted from its end; 0 for all.
    """

    vocabulary: int | None = None
    tokens: dict[int, float] | None = None
    logits: int = 0


@strict
@dataclass
class Data:
    """The fields of `data` that every task has."""

    task: str = "khop"  # what the run is trained and measured on; its choices are below
    seed: int = number(0, at_least=0)  # of what the builder draws
    overrides: dict = field(default_factory=dict)  # fields of the builder's config

    @classmethod
    def of(cls, run: Run) -> Self:
        """The section in a run's recipe. Fields that the task does not have are ignored, because older versions wrote
        the fields of all tasks into recipe.yaml.

        Raises ValueError for a field of the user that there is not, and as `check`.
        """
        names, values = cls.__dataclass_fields__, dict(run.section())
        if run.bare:
            for name in values.keys() - names.keys():
                raise ValueError(f"--data has no field {name!r}; it has {', '.join(names)}.")
            section = cls(**values)
            section.check(str(run.model_folder()))
            return section
        for name, value in run.data.items():
            values[name] = merged(values.get(name), value)
        return cls(**{name: value for name, value in values.items() if name in names})

    def check(self, init_from: str | None) -> None:
        """Raise ValueError for fields that contradict each other or the recipe's `init_from`."""
        for name in self.overrides.keys() & {"seed", "files", "dataset"}:
            if vars(self).get(name):
                raise ValueError(f"data.{name} and data.overrides.{name} name the same thing: leave one of them out.")

    @property
    def builder(self) -> str:
        """The builder of the data, a name of `data_builders.builders.BUILDERS`."""
        return self.task

    def preset(self) -> tuple[str, dict]:
        """(preset of the builder, fields in place of the preset's)."""
        return "default", {"seed": self.seed} | self.overrides

    def shape(self) -> RowShape:
        """What is known of the rows without reading them."""
        return RowShape()

    def load(self, **changed) -> "DatasetDict":
        """The splits, built into the `datasets` cache on first use.

        Args:
            changed: fields of the builder, in place of those from `preset`.
        """
        from data_builders import load_task

        preset, fields = self.preset()
        return load_task(self.builder, preset, **(fields | changed))

    def kept(self, splits: Mapping) -> Mapping:
        """The splits that a run keeps a copy of: of files that the user named, and not of what is made or fetched."""
        return {}

    def check_published(self) -> None:
        """Raise ValueError for data that `looped publish --dataset` cannot publish."""

    def here(self) -> bool:
        """Whether the data are looked for on this machine alone."""
        return True

    def located(self, folder: Path) -> Self:
        """The same section with the names of files below `folder`, if they are relative."""
        return self

    def splits_of(self, run: Run, **changed) -> "DatasetDict":
        """The splits of a run, to be compared by `Run.check_data`: of what the user names for it now, or `find`."""
        return self.load(**changed) if run.data else self.find(run, **changed)

    def find(self, run: Run, **changed) -> "DatasetDict":
        """The splits of a run, see the module docstring.

        Args:
            changed: fields of the builder, as in `load`.

        Raises:
            MissingData: they are nowhere.
            ValueError: they cannot be read.
        """
        from data_builders.files import MissingData

        began_in, copy = run.note().get("folder"), run.folder / COPY
        named = self if began_in is None else self.located(Path(began_in))
        if copy.is_dir() and not named.here():
            return read_copy(copy)
        try:
            return named.load(**changed)
        except MissingData as error:
            gone = error
        if copy.is_dir():
            return read_copy(copy)
        if named != self:
            try:
                return self.load(**changed)
            except MissingData:
                pass
        raise MissingData(
            f"the data of {run} are not on this machine, and it keeps no copy of them ({gone}) Say where they are "
            "by --data.files FILE [FILE ...], or by --data.overrides."
        ) from gone


def read_copy(folder: Path) -> "DatasetDict":
    """The splits that `Copy` wrote. Raises ValueError for a damaged file."""
    from datasets import load_dataset

    files = {path.stem: str(path) for path in sorted(folder.glob("*.parquet"))}
    try:
        return load_dataset("parquet", data_files=files)
    except Exception as error:
        raise ValueError(f"{folder} is damaged ({error}): delete it, and name the data by --data.files.") from error


def merged(old, new):
    """`new` over `old`: fields of fields are put in their places, everything else is replaced."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return dict(old) | {name: merged(old.get(name), value) for name, value in new.items()}


@dataclass(frozen=True)
class Copy:
    """Splits of a run, as it keeps them."""

    splits: Mapping[str, "Dataset"]

    def small(self) -> bool:
        """Whether the rows are at most `KEPT_BYTES` in memory, so that a run keeps a copy of them."""
        return sum(rows.data.nbytes for rows in self.splits.values()) <= KEPT_BYTES

    def save_pretrained(self, folder: Path) -> None:
        """Write SPLIT.parquet for each split."""
        import pyarrow.parquet as pq

        for split, rows in self.splits.items():
            pq.write_table(rows.with_format("arrow")[:], folder / f"{split}.parquet")


@strict
@dataclass
class Curriculum:
    """The section of a task without stages of training: it has no fields. A task with stages has a subclass."""

    def check(self) -> None:
        """Raise ValueError for fields that contradict each other."""
