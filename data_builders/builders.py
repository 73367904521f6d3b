"""The data of a task by its name: built into the `datasets` cache, or exported as a Hub data folder."""

import difflib
import inspect
import os
import tempfile
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from datasets import BuilderConfig, DatasetBuilder, DatasetDict
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard, DatasetCardData

from .composition import Composition
from .generators.addition import Addition
from .generators.list_ops import ListOps
from .generators.mano import Mano
from .generators.mazes import Mazes
from .generators.p_hop import PHop
from .generators.parity import Parity
from .generators.permutations import Permutations
from .generators.prefix_sums import PrefixSums
from .generators.reasoning_gym import ReasoningGym
from .generators.sudoku import Sudoku
from .khop import Khop
from .molecules import Molecules
from .questions import Questions
from .text import Text

# The generators of the task sequence.
GENERATORS = {
    "addition": Addition,
    "parity": Parity,
    "prefix_sums": PrefixSums,
    "p_hop": PHop,
    "permutations": Permutations,
    "mano": Mano,
    "list_ops": ListOps,
    "sudoku": Sudoku,
    "mazes": Mazes,
    "reasoning_gym": ReasoningGym,
}
BUILDERS = {"khop": Khop, "composition": Composition, "text": Text, "molecules": Molecules, "sequence": Questions}
BUILDERS |= GENERATORS


def task_builder(name: str, config_name: str, *, cache_dir: str | Path | None = None, **overrides) -> DatasetBuilder:
    """Builder of a task's preset `config_name`, with `overrides` in place of fields of the preset.

    Raises ValueError for an unknown task, preset or field, naming the nearest one, and for a value out of range.
    """
    preset_fields(name, config_name, overrides)
    # An override equal to the preset's value must not build the same data into a second cache folder.
    known = _own_fields(BUILDERS[name].builder_configs[config_name])
    changed = {override: value for override, value in overrides.items() if value != known[override]}
    return BUILDERS[name](config_name=config_name, cache_dir=cache_dir, **changed)


def preset_fields(name: str, config_name: str, overrides: dict) -> dict:
    """The fields of a task's preset, with `overrides` in their places. Raises ValueError as `task_builder`, except for
    values out of range."""
    if name not in BUILDERS:
        raise ValueError(_unknown("task", name, BUILDERS))
    presets = BUILDERS[name].builder_configs
    if config_name not in presets:
        raise ValueError(_unknown(f"config of {name}", config_name, presets))
    known = _own_fields(presets[config_name])
    for override, value in overrides.items():
        if override not in known:
            raise ValueError(_unknown(f"field of {name}", override, known))
        if value is None:
            raise ValueError(f"{override} must have a value, got None: leave it out for the preset's.")
    return known | overrides


def load_task(name: str, config_name: str, *, cache_dir: str | Path | None = None, **overrides) -> DatasetDict:
    """Splits train, validation and test of a task, built into the `datasets` cache on first use.

    `load_task("khop", "cpu", seed=1, train_hops=4)`. Molecules may have a split test_scaffolds, too.

    Raises ValueError as `task_builder`.
    """
    return build_splits(task_builder(name, config_name, cache_dir=cache_dir, **overrides))


def generator_of(name: str) -> tuple[str, dict]:
    """The builder of a generator NAME or NAME/PART, and the fields that its name sets, see `sequences.py`.

    Raises ValueError for an unknown name, naming the nearest one, and for a part that is missing or that the builder
    does not have.
    """
    builder, slash, part = name.partition("/")
    if builder not in GENERATORS:
        raise ValueError(_unknown("generator", builder, GENERATORS))
    wanted = GENERATORS[builder].PART
    if bool(slash) != (wanted is not None) or (slash and not part):
        form = builder if wanted is None else f"{builder}/{wanted.upper()}"
        raise ValueError(f"the generator is called {form}, got {name!r}.")
    return builder, {} if wanted is None else {wanted: part}


def build_splits(builder: DatasetBuilder) -> DatasetDict:
    """All splits of a builder, built into the `datasets` cache on first use. Raises ValueError as the builder does."""
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset()


def load_text(files: list[str] | None, /, *, cache_dir: str | Path | None = None, **overrides) -> DatasetDict:
    """Splits of the task text, from `files`, from a `dataset` among the overrides, or from the fetched corpus.

    Raises ValueError as `task_builder`.
    """
    named = {} if files is None else {"files": files}
    config = "files" if named or "dataset" in overrides else "corpus"
    return load_task("text", config, cache_dir=cache_dir, **(named | overrides))


def load_molecules(
    config_name: str, files: list[str] | None, /, *, cache_dir: str | Path | None = None, **overrides
) -> DatasetDict:
    """Splits of the task molecules, from `files` or from a preset such as moses.

    Raises ValueError as `task_builder`.
    """
    named = {} if files is None else {"files": files}
    return load_task("molecules", "files" if named else config_name, cache_dir=cache_dir, **(named | overrides))


def export_parquet(
    name: str,
    config_name: str,
    folder: str | Path,
    *,
    splits: DatasetDict | None = None,
    cache_dir: str | Path | None = None,
    **overrides,
) -> Path:
    """Write a task as a Hub data folder, which `load_dataset(folder, config_name)` reads without our code.

    The folder gets `config_name/SPLIT-00000-of-00001.parquet` and a README.md; another config of the task may be added
    to it later. The data appear whole or not at all, and the README names them only once they are there. `splits` are
    rows that the task was built to once, for data whose files are elsewhere now.

    Raises ValueError as `task_builder`, and if the folder already has this config or holds something else.
    """
    folder = Path(folder)
    config = preset_fields(name, config_name, overrides)
    readme = folder / "README.md"
    if (folder / config_name).exists():
        raise ValueError(f"{folder / config_name} exists: delete it or choose another folder.")
    card = _card(readme if readme.exists() else None, name, config_name, config)
    if card.data.pretty_name != name or (folder.exists() and any(folder.iterdir()) and not readme.exists()):
        raise ValueError(f"{folder} holds something else than the task {name}: choose an empty or a new folder.")
    dataset = splits or load_task(name, config_name, cache_dir=cache_dir, **overrides)
    files = [{"split": split, "path": f"{config_name}/{split}-*.parquet"} for split in dataset]
    card.data["configs"] = [*(card.data.get("configs") or []), {"config_name": config_name, "data_files": files}]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        data = Path(temporary, config_name)
        data.mkdir()
        for split, rows in dataset.items():
            rows.to_parquet(data / f"{split}-00000-of-00001.parquet")
        card.save(Path(temporary, "README.md"))
        data.rename(folder / config_name)
        os.replace(Path(temporary, "README.md"), readme)
    return folder


def _card(readme: Path | None, name: str, config_name: str, values: dict) -> DatasetCard:
    """The folder's card with one more config: its text gets a table of the fields that made the data."""
    if readme is None:
        tags = ["looped-transformers", *BUILDERS[name].TAGS]
        data = DatasetCardData(pretty_name=name, task_categories=["text-generation"], tags=tags)
        text = f"# {name}\n\n{inspect.getdoc(BUILDERS[name]).partition('One example')[0].rstrip()}\n"
        card = DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    else:
        card = DatasetCard.load(readme)
    sizes = "".join(f"| {field} | {_shown(value)} |\n" for field, value in values.items())
    head = f"\n## {config_name}\n\n{BUILDERS[name].builder_configs[config_name].description}\n\n"
    card.text += f"{head}| field | value |\n| --- | --- |\n{sizes}"
    return card


def _shown(value):
    """The value of a field as a card shows it; files lose their folders, which mean nothing on another machine."""
    if isinstance(value, list):
        return ", ".join(os.path.basename(path) if os.path.isabs(path) else path for path in value) or "none"
    return value


def _own_fields(config: BuilderConfig) -> dict:
    """The fields of a config that make the data: all but the fields that every config of `datasets` has."""
    inherited = {field.name for field in fields(BuilderConfig)}
    return {field.name: vars(config)[field.name] for field in fields(config) if field.name not in inherited}


def _unknown(what: str, name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"unknown {what}: {name!r}. Did you mean {nearest[0]!r}? There are {', '.join(known)}."
