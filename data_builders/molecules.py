"""Molecules as SMILES, a line of text that spells out a graph of atoms: MOSES, or files that the user names.

    file        .csv with a column of SMILES, or .smi and .txt with a SMILES at the start of each line; each also .gz
    molecule    one SMILES; copies of a SMILES are dropped
    split       test files make the split test; other molecules are dealt by a seeded hash of the SMILES

Equal SMILES go to the same split, so that the splits are disjoint. MOSES: Polykovskiy et al. 2020, arXiv 1811.12823.

A molecule has many SMILES, one for each walk along its atoms and bonds: `augment` gives each training row another
SMILES in every epoch.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher
from huggingface_hub.constants import HF_HOME

from .fields import check_fields, number
from .files import find_files, read_csv, read_text
from .seeding import TABLE_ROWS, source_hash, stream
from .tokenizers import SMILES_TOKEN

VERSION = datasets.Version("1.0.0")

# The folder that `looped fetch moses` writes.
MOSES = Path(HF_HOME) / "looped" / "moses"

SUFFIXES = (".csv", ".smi", ".txt", ".csv.gz", ".smi.gz", ".txt.gz")

FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "source": datasets.Value("string"), "line": datasets.Value("int64")}
)

SMILES, ATOM = re.compile(f"(?:{SMILES_TOKEN})+"), re.compile(r"[A-Za-z*]")


@dataclass
class MoleculesConfig(datasets.BuilderConfig):
    """Where the SMILES come from; any field may be given to `Molecules` or `load_task` by name."""

    version: datasets.Version = VERSION
    files: list[str] = field(default_factory=list)  # paths and globs; `**` is any number of folders
    test_files: list[str] = field(default_factory=list)  # the split test, in place of `test_share`
    test_scaffolds_files: list[str] = field(default_factory=list)  # the split test_scaffolds
    column: str | None = None  # of .csv files; by default the column called SMILES or smiles
    canonical: bool = False  # take rdkit's canonical SMILES, so that two spellings of a molecule are copies
    validation_share: int | float = number(0.01, above=0, below=0.5)  # share of the molecules of `files`
    test_share: int | float = number(0.01, at_least=0, below=0.5)  # share of the molecules of `files`
    train_rows: int | None = number(at_least=1, whole=True)  # a seeded choice; a smaller one is part of a larger one
    seed: int = number(0, at_least=0, whole=True)  # of the split and of that choice

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Name of the cache folder: the name that `datasets` gives, and a fingerprint of the files themselves.

        Raises ValueError as `check_fields` and `sources`.
        """
        self.check_fields()
        contents = hashlib.sha256(rdkit_version().encode() if self.canonical else b"")
        for split, sources in self.sources().items():
            for source, path in sources.items():
                contents.update(f"{split}\n{source}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return f"{super().create_config_id(config_kwargs, custom_features)}-{contents.hexdigest()[:16]}"

    def check_fields(self):
        """Raise ValueError for a field that is missing or out of range."""
        check_fields(self)
        if not self.files:
            raise ValueError("files must name the molecules to train on: a list of paths and globs.")
        if self.test_files and self.test_share != 0:
            raise ValueError(f"test_share must be 0 beside test_files, got {self.test_share}.")
        if not self.test_files and self.test_share == 0:
            raise ValueError(
                f"test_share must be above 0 and below 0.5 where there are no test_files, got {self.test_share}."
            )

    def sources(self) -> dict[str, dict[str, Path]]:
        """Field -> name -> file, for the fields that name files; a name is the path below the deepest shared folder.

        Raises ValueError as `find_files`.
        """
        paths = {
            name: find_files(name, vars(self)[name], SUFFIXES, MOSES, "looped fetch moses")
            for name in ("files", "test_files", "test_scaffolds_files")
            if vars(self)[name]
        }
        shared = os.path.commonpath([path.parent for found in paths.values() for path in found])
        return {name: {path.relative_to(shared).as_posix(): path for path in found} for name, found in paths.items()}

    def deal(self) -> dict[str, list[tuple[str, str, int]]]:
        """Split -> its rows (SMILES, source, line), in the order of the files; no SMILES comes twice.

        Raises ValueError for a split without rows.
        """
        seen, splits = set(), {"train": [], "validation": [], "test": []}
        if self.test_scaffolds_files:
            splits["test_scaffolds"] = []
        # Test files first: a SMILES that is in them is not trained on.
        for name in ("test_scaffolds_files", "test_files", "files"):
            for smiles, source, line in self.molecules(name):
                if smiles not in seen:
                    seen.add(smiles)
                    split = self.split_of(smiles) if name == "files" else name.removesuffix("_files")
                    splits[split].append((smiles, source, line))
        for split, rows in splits.items():
            if not rows:
                dealt = ", ".join(f"{name} {len(found)}" for name, found in splits.items())
                raise ValueError(
                    f"the split {split} has no molecules and needs one at least ({dealt}; validation_share "
                    f"{self.validation_share:g}, test_share {self.test_share:g}): add molecules, or change the shares."
                )
        if self.train_rows is not None:
            splits["train"] = self.sample(splits["train"])
        return splits

    def molecules(self, name: str) -> Iterator[tuple[str, str, int]]:
        """(SMILES, source, line) of every molecule in the files of one field."""
        for source, path in self.sources().get(name, {}).items():
            for line, smiles in read_smiles(path, self.column):
                yield self.spelt(path, line, smiles), source, line

    def spelt(self, path: Path, line: int, smiles: str) -> str:
        """The SMILES of a line, canonical if the config says so. Raises ValueError, with the line, as rdkit does."""
        try:
            return canonical_smiles(smiles) if self.canonical else smiles
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error

    def split_of(self, smiles: str) -> str:
        """The split of a molecule of `files`, from a hash of its SMILES."""
        place = self.place(smiles, "split")
        if place < self.test_share:
            return "test"
        return "validation" if place < self.test_share + self.validation_share else "train"

    def sample(self, rows: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
        """The `train_rows` rows whose `place` is smallest, in their order. Raises ValueError if there are fewer."""
        if self.train_rows > len(rows):
            raise ValueError(
                f"train_rows must be at most {len(rows)}, the molecules there are; got {self.train_rows}."
            )
        places = [self.place(smiles, "sample") for smiles, *_ in rows]
        chosen = sorted(range(len(rows)), key=places.__getitem__)[: self.train_rows]
        return [rows[i] for i in sorted(chosen)]

    def place(self, smiles: str, purpose: str) -> float:
        """A number in [0, 1), evenly spread over the SMILES, from a hash of seed, purpose and SMILES."""
        digest = hashlib.sha256(f"{self.seed}\n{purpose}\n{smiles}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


class Molecules(datasets.ArrowBasedBuilder):
    """SMILES in splits train, validation and test, pairwise disjoint and without duplicates.

    Configs: `moses` (the files that `looped fetch moses` wrote: test and test_scaffolds as published, validation a
    hundredth of the published train; a scaffold, the rings of a molecule and their links, that is in test_scaffolds is
    in no other split) and `files`, where you name them: `files=["zinc.csv"]`, perhaps `test_files`, too. `source` is
    the file, `line` the line in it, from 1. One example:

    >>> load_task("molecules", "moses")["test"][0]
    {'text': 'CC1C2CCC(C2)C1CN(CCO)C(=O)c1ccc(Cl)cc1', 'source': 'test.csv.gz', 'line': 2}

    Two SMILES of one molecule are two rows and may go to different splits. `canonical=True` prevents that; it needs
    rdkit and a few minutes per million molecules. In MOSES all SMILES but 2 in 10,000 are canonical already. The cache
    follows the contents of the files.

    Raises ValueError for a config field that is unknown or out of range, files that are missing, of another kind, not
    UTF-8 or without a column of SMILES, rows with characters that no SMILES has, with `canonical` rows that rdkit
    cannot read, and a split without a molecule.
    """

    VERSION = VERSION
    TAGS = ("chemistry", "smiles")  # what the card of an exported data set is found by on the Hub
    BUILDER_CONFIG_CLASS = MoleculesConfig
    BUILDER_CONFIGS = [  # noqa: RUF012 (`datasets` reads it from the class)
        MoleculesConfig(
            name="moses",
            description="MOSES: 1.9 million drug-like molecules from ZINC, without charges and stereochemistry.",
            files=[str(MOSES / "train.csv.gz")],
            test_files=[str(MOSES / "test.csv.gz")],
            test_scaffolds_files=[str(MOSES / "test_scaffolds.csv.gz")],
            test_share=0.0,
        ),
        MoleculesConfig(name="files", description="Files of SMILES that the user names."),
    ]

    def __init__(self, *args, hash: str | None = None, **kwargs):
        super().__init__(*args, hash=hash or source_hash(__file__), **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES, description=self.config.description)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(split, {"rows": rows}) for split, rows in self.config.deal().items()]

    def _generate_tables(self, rows: list[tuple[str, str, int]]):
        for start in range(0, len(rows), TABLE_ROWS):
            columns = zip(*rows[start : start + TABLE_ROWS], strict=True)
            yield start, pa.table(dict(zip(FEATURES, columns, strict=True)), schema=FEATURES.arrow_schema)


def read_smiles(path: Path, column: str | None = None) -> Iterator[tuple[int, str]]:
    """(line, SMILES) of every row of a file, in order; blank lines are skipped.

    Raises ValueError, with the line, for characters that no SMILES has, and as `read_text` and `csv_cells`.
    """
    text = read_text(path)
    if path.name.endswith((".csv", ".csv.gz")):
        # Cells may end in line ends: those of the ZINC-250K file do.
        rows = ((line, cell.strip()) for line, cell in csv_cells(path, text, column))
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = ((line, re.split(r"[ \t]", row.lstrip(" \t"))[0]) for line, row in lines if row.strip())
    for line, smiles in rows:
        if not (SMILES.fullmatch(smiles) and ATOM.search(smiles)):
            rest = SMILES.sub("", smiles)
            cause = f" (what is {rest[0]!r}?)" if rest else " (there is no atom)" if smiles else ""
            said = f"{path}, line {line}: {smiles!r} is not a SMILES{cause}"
            raise ValueError(f"{said}: take the row out, or correct it.")
        yield line, smiles


def csv_cells(path: Path, text: str, column: str | None) -> Iterator[tuple[int, str]]:
    """(line, cell) of one column of a CSV text; `line` is where the row begins. Blank lines are skipped.

    Raises ValueError for a header that has the column not at all or twice, a row with more or fewer cells than the
    header, and quotes that are not closed.
    """
    rows = read_csv(path, text)
    _, header = next(rows)
    names = ["SMILES", "smiles"] if column is None else [column]
    found = [i for i, name in enumerate(header) if name in names]
    if len(found) != 1:
        raise ValueError(
            f"{path} must have one column called {' or '.join(names)}, and has {', '.join(header)}: set column."
        )
    for line, row in rows:
        yield line, row[found[0]]


def augment(train: datasets.Dataset, seed: int, epoch: int) -> datasets.Dataset:
    """The split train with another SMILES of each molecule, a function of (seed, epoch, row); needs rdkit.

    The result is written once into the `datasets` cache, with a progress bar. Raises ValueError for another split than
    train, since measurements belong on the SMILES as they are, and for a row that rdkit cannot read.
    """
    if train.split != datasets.Split.TRAIN:
        raise ValueError(f"only the split train is augmented, got {train.split}: measure on the SMILES as they are.")

    def rewrite(texts: list[str], rows: list[int]) -> dict:
        return {"text": [random_smiles(text, seed, epoch, row) for text, row in zip(texts, rows, strict=True)]}

    made_of = (train._fingerprint, seed, epoch, rdkit_version(), source_hash(__file__))
    return train.map(
        rewrite,
        with_indices=True,
        batched=True,
        input_columns="text",
        new_fingerprint=Hasher.hash(made_of),
        desc="Randomise SMILES",
    )


def random_smiles(smiles: str, seed: int, epoch: int, row: int) -> str:
    """Another SMILES of the same molecule: the order of its atoms is drawn for (seed, epoch, row).

    Bjerrum 2017, arXiv 1703.07076. Raises ValueError if rdkit is not installed, or cannot read the SMILES.
    """
    chem, molecule = rdkit_chem(), parsed(smiles)
    order = stream(seed, "order of atoms", epoch, row).permutation(molecule.GetNumAtoms())
    return chem.MolToSmiles(chem.RenumberAtoms(molecule, order.tolist()), canonical=False)


def canonical_smiles(smiles: str) -> str:
    """The canonical SMILES of the molecule, by rdkit. Raises ValueError as `random_smiles`."""
    return rdkit_chem().MolToSmiles(parsed(smiles))


def parsed(smiles: str):
    """The rdkit molecule of a SMILES. Raises ValueError if rdkit cannot read it; rdkit says why on stderr."""
    molecule = rdkit_chem().MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"rdkit cannot read {smiles!r} as a molecule: see its message, and take the row out.")
    return molecule


def rdkit_chem():
    """The module rdkit.Chem. Raises ValueError, with the extra to install, if there is no rdkit."""
    try:
        from rdkit import Chem
    except ImportError as error:
        raise ValueError("this needs rdkit: pip install 'looped-transformers[molecules]'.") from error
    return Chem


def rdkit_version() -> str:
    rdkit_chem()
    import rdkit

    return rdkit.__version__
