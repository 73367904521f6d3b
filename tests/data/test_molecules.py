"""Laws of molecules: splits that share nothing, SMILES that come back from their tokens, spellings of one molecule."""

import csv
import gzip
import hashlib
import json
import re
import sys
import zipfile
from collections import Counter
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import train
from data_builders import (
    DepthSampler,
    MoleculeBatches,
    Molecules,
    PackedMolecules,
    augment,
    canonical_smiles,
    dataset_smiles_tokenizer,
    encode_text,
    export_parquet,
    load_task,
    random_smiles,
    smiles_tokenizer,
    train_byte_bpe,
)
from data_builders import molecules as molecules_module
from data_builders import tokenizers as tokenizers_module
from data_builders.builders import BUILDERS
from data_builders.packing import first_fit
from data_builders.text_batches import SmilesTable
from data_builders.tokenizers import SMILES_TOKEN
from looplab.cli import main
from looplab.pretrained.parts import PARTS, Part, part_folder, unpack_moses
from toys import FP32, make_model

# 180 molecules.
TOYS = [
    f"{head}{chain}{tail}"
    for head, chain, tail in product(
        ("C", "CC(C)", "O=C(O)", "NC", "ClC", "FC(F)"),
        ("O", "NC", "C(F)", "C(=O)N", "CC(Br)", "C#C"),
        ("c1ccccc1", "C1CCCC1", "c1ccc[nH]1", "c1ccsc1", "c1ccc2ccccc2c1"),
    )
]
SHARES = {"validation_share": 0.2, "test_share": 0.2}

# Stereochemistry, charges, isotopes, salts, ring bonds of two digits: more than MOSES has.
HARD = [
    "C[C@H](N)C(=O)O",
    "C[C@@H](O)[C@H](F)Cl",
    "C/C=C/C(=O)N/N=C\\c1ccccc1",
    "[O-][n+]1ccccc1",
    "[Na+].[O-]C(=O)c1ccccc1",
    "[13CH4]",
    "[H]/N=C(\\C)c1cc[nH]c1",
    "C1CC2CCC1CC2",
    "CC(C)(C)[Si](C)(C)O[C@@H]1C[C@H]2CC[C@@H]1C2",
    "C%10CCCC%10C1CC1",
    "FC(F)(F)S(=O)(=O)c1nnc(Br)o1",
    "C1CC%12CCC1C%12I",
]


@pytest.fixture
def toys(tmp_path):
    """load(**fields): the splits of the toy molecules, of which a file holds two thirds and another the rest."""
    (tmp_path / "toys").mkdir()
    write_csv(tmp_path / "toys" / "a.csv", TOYS[:120])
    (tmp_path / "toys" / "b.smi").write_text("".join(f"{smiles} toy{i}\n\n" for i, smiles in enumerate(TOYS[120:])))
    files = [str(tmp_path / "toys" / "*")]
    return lambda **fields: load_task("molecules", "files", **({"files": files} | SHARES | fields))


def write_csv(path: Path, smiles: list[str], column: str = "SMILES"):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["number", column])
        rows.writerows(enumerate(smiles))


def texts(dataset) -> dict[str, list[str]]:
    return {split: list(rows["text"]) for split, rows in dataset.items()}


# Splits


def test_splits_share_no_molecule_and_hold_all(toys):
    dealt = texts(toys())
    assert list(dealt) == ["train", "validation", "test"]
    assert sorted(text for split in dealt.values() for text in split) == sorted(TOYS)
    assert all(len(rows) > 0.1 * len(TOYS) for rows in dealt.values())


def test_the_same_molecules_and_seed_give_the_same_bytes(toys, tmp_path):
    """Also from another folder, packed, in another form, and with line ends in the cells; another seed deals
    otherwise."""
    first = toys()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "a.txt.gz").write_bytes(gzip.compress("\r\n".join(TOYS[:120]).encode()))
    write_csv(other / "b.csv", [f"{smiles}\n" for smiles in TOYS[120:]], column="smiles")
    assert texts(toys(files=[str(other / "*")])) == texts(first)
    assert texts(toys(seed=1)) != texts(first)
    again = toys(cache_dir=tmp_path / "again")
    assert [rows[:] for rows in again.values()] == [rows[:] for rows in first.values()]
    assert set(first["train"]["source"]) == {"a.csv", "b.smi"}


def test_a_molecule_stays_in_its_split_whatever_else_is_read(toys, tmp_path):
    both, one = texts(toys()), texts(toys(files=[str(tmp_path / "toys" / "a.csv")]))
    assert all(set(one[split]) <= set(both[split]) for split in both)


def test_what_is_in_a_test_file_is_not_trained_on(toys, tmp_path):
    """Nor validated, nor tested twice; without test files, the test is a share."""
    write_csv(tmp_path / "test.csv", TOYS[10:40])
    write_csv(tmp_path / "scaffolds.csv", TOYS[30:60])
    held_out = {"test_files": [str(tmp_path / "test.csv")]}
    held_out["test_scaffolds_files"] = [str(tmp_path / "scaffolds.csv")]
    dealt = texts(toys(**held_out, test_share=0))
    assert dealt["test_scaffolds"] == TOYS[30:60]
    assert dealt["test"] == TOYS[10:30]
    assert sorted(dealt["train"] + dealt["validation"]) == sorted(TOYS[:10] + TOYS[60:])
    assert set(dealt["validation"]) <= set(texts(toys())["validation"]) | set(texts(toys())["test"])


def test_copies_are_dropped(toys, tmp_path):
    before = texts(toys())
    write_csv(tmp_path / "toys" / "c.csv", TOYS[50:70] * 2)
    assert texts(toys()) == before


def test_other_spellings_are_copies_if_asked(toys, tmp_path):
    """Otherwise a molecule that is written in two ways may be trained on and tested."""
    spellings = [random_smiles(smiles, 0, 0, row) for row, smiles in enumerate(TOYS)]
    write_csv(tmp_path / "toys" / "c.csv", spellings)
    plain, canonical = texts(toys()), texts(toys(canonical=True))
    known = {split: {canonical_smiles(text) for text in rows} for split, rows in plain.items()}
    assert known["train"] & known["test"]
    assert sorted(text for rows in canonical.values() for text in rows) == sorted(map(canonical_smiles, TOYS))


def test_a_sample_of_the_training_molecules_is_seeded(toys):
    """A smaller one is part of a larger one; what is measured on stays whole."""
    whole = texts(toys())
    large, small, other = (texts(toys(train_rows=n, seed=seed)) for n, seed in ((60, 0), (20, 0), (20, 1)))
    assert (len(large["train"]), len(small["train"])) == (60, 20)
    assert set(small["train"]) < set(large["train"]) < set(whole["train"])
    assert large["train"] == [text for text in whole["train"] if text in set(large["train"])]
    assert large["train"] != whole["train"][:60]
    assert set(small["train"]) != set(other["train"])
    assert (large["validation"], large["test"]) == (whole["validation"], whole["test"])
    with pytest.raises(ValueError, match=rf"train_rows must be at most {len(whole['train'])}, .*; got 500"):
        toys(train_rows=500)


def test_a_changed_file_is_read_again(toys, tmp_path):
    toys()
    write_csv(tmp_path / "toys" / "a.csv", ["CCCCCCCCCCO"])
    found = [text for rows in texts(toys()).values() for text in rows]
    assert sorted(found) == sorted([*TOYS[120:], "CCCCCCCCCCO"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": []}, r"files must name the molecules to train on"),
        ({"files": ["nowhere/*.smi"]}, r"files: nothing matches 'nowhere/\*\.smi'"),
        ({"files": ["FOLDER/picture.png"]}, r"files: .*picture\.png is not one of \.csv, \.smi"),
        ({"test_files": ["nowhere.csv"], "test_share": 0}, r"test_files: nothing matches 'nowhere\.csv'"),
        ({"test_files": ["FOLDER/toys/a.csv"]}, r"test_share must be 0 beside test_files, got 0\.2"),
        ({"test_share": 0}, r"test_share must be above 0 and below 0\.5 where there are no test_files, got 0"),
        ({"validation_share": 0.5}, r"validation_share must be above 0 and below 0\.5, got 0\.5"),
        ({"train_rows": 0}, r"train_rows must be a whole number >= 1, got 0"),
        ({"column": "smile"}, r"a\.csv must have one column called smile, and has number, SMILES: set column"),
        ({"files": ["FOLDER/twice.csv"]}, r"twice\.csv must have one column called SMILES or smiles, and has"),
        ({"files": ["FOLDER/empty.csv"]}, r"empty\.csv, line 3: '' is not a SMILES: take the row out"),
        ({"files": ["FOLDER/name.csv"]}, r"name\.csv, line 2: 'CC ethane' is not a SMILES"),
        ({"files": ["FOLDER/valence.smi"], "canonical": True}, r"rdkit cannot read 'C\(C\)\(C\)\(C\)\(C\)C'"),
        ({"file": ["a.smi"]}, r"unknown field of molecules: 'file'. Did you mean 'files'"),
    ],
)
def test_molecules_that_cannot_be_read_raise(toys, tmp_path, fields, message):
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / "twice.csv").write_text("SMILES,smiles\nC,C\n")
    (tmp_path / "empty.csv").write_text("SMILES,name\nC,methane\n,nothing\n")
    (tmp_path / "name.csv").write_text("SMILES\nCC ethane\n")
    (tmp_path / "valence.smi").write_text("C(C)(C)(C)(C)C\n")
    for name in {"files", "test_files"} & set(fields):
        fields = fields | {name: [pattern.replace("FOLDER", str(tmp_path)) for pattern in fields[name]]}
    with pytest.raises(ValueError, match=message):
        toys(**fields)


def test_an_exported_card_names_every_split(toys, tmp_path):
    toys()
    files = {"files": [str(tmp_path / "toys" / "b.smi")], "test_files": [str(tmp_path / "toys" / "a.csv")]}
    write_csv(tmp_path / "scaffolds.csv", ["C1CC1"])
    files["test_scaffolds_files"] = [str(tmp_path / "scaffolds.csv")]
    folder = export_parquet("molecules", "files", tmp_path / "hub", **files, test_share=0)
    loaded = datasets.load_dataset(str(folder), "files", cache_dir=str(tmp_path / "loaded"))
    assert set(loaded) == {"train", "validation", "test", "test_scaffolds"}
    assert loaded["test_scaffolds"]["text"][:] == ["C1CC1"]
    card = (folder / "README.md").read_text()
    assert "Configs: `moses`" in card
    assert not re.search("multi-hop|>>>|One example", card)


def test_training_refuses_a_task_it_does_not_know():
    recipe = Path(train.__file__).parent / "recipes" / "smoke.yaml"
    assert set(train.TASKS) <= set(BUILDERS)  # generators of questions have no task of their own
    with pytest.raises(
        ValueError, match=r"data\.task must be one of khop, .*, got 'molecule'; did you mean molecules\?"
    ):
        train.read_recipe(recipe, ["--data.task=molecule"])


# MOSES


@pytest.fixture
def moses(tmp_path, monkeypatch):
    """A wheel in the place of molsets, with three small files and a licence, and an empty cache."""
    index, data = tmp_path / "index", "moses/dataset/data"
    index.mkdir()
    wheel = index / "toy_moses-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for split, smiles in (("train", TOYS[:120]), ("test", TOYS[120:150]), ("test_scaffolds", TOYS[150:])):
            text = "".join(f"{line}\n" for line in ["SMILES", *smiles])
            archive.writestr(f"{data}/{split}.csv.gz", gzip.compress(text.encode()))
        about = "toy_moses-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: toy-moses\nVersion: 1.0\n")
        archive.writestr(f"{about}/LICENSE", "Copyright of the toys")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    toy = Part(
        folder="moses",
        package="toy-moses",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        megabytes=1,
        unpack=partial(unpack_moses, licence=f"{about}/LICENSE"),
    )
    monkeypatch.setitem(PARTS, "moses", toy)
    return tmp_path / "home" / "looped"


def test_what_is_fetched_is_what_the_builder_reads(moses, capfd, monkeypatch):
    """The files as published, their licence, and how many molecules each has; then the splits of the preset."""
    assert main(["fetch", "moses"]) == 0
    folder = Path(capfd.readouterr().out.strip())
    assert [path.name for path in moses.iterdir()] == ["moses"]  # nothing temporary is left
    assert (folder / "LICENSE").read_text() == "Copyright of the toys"
    source = json.loads((folder / "source.json").read_text())
    assert source["molecules"] == {"train.csv.gz": 120, "test.csv.gz": 30, "test_scaffolds.csv.gz": 30}
    assert (source["licence"], source["wheel_sha256"]) == ("MIT", PARTS["moses"].sha256)

    preset = Molecules.builder_configs["moses"]
    names = ("files", "test_files", "test_scaffolds_files")
    there = {name: [str(folder / Path(path).name) for path in vars(preset)[name]] for name in names}
    dealt = texts(load_task("molecules", "moses", **there, validation_share=0.2))
    assert sorted(dealt["train"] + dealt["validation"]) == sorted(TOYS[:120])
    assert min(len(dealt["train"]), len(dealt["validation"])) > 10
    assert (dealt["test"], dealt["test_scaffolds"]) == (TOYS[120:150], TOYS[150:])


def test_the_preset_reads_where_fetch_writes():
    preset = Molecules.builder_configs["moses"]
    for path in (*preset.files, *preset.test_files, *preset.test_scaffolds_files):
        assert Path(path).parent == part_folder("moses")


def test_molecules_that_were_not_fetched_are_asked_for(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(molecules_module, "MOSES", tmp_path)
    with pytest.raises(ValueError, match=r"run `looped fetch moses`"):
        toys(files=[str(tmp_path / "train.csv.gz")])


# Tokens


def test_ids_are_specials_then_tokens_in_order():
    tokenizer = smiles_tokenizer(["C[nH]Cl", "O=C%12CN%12"])
    words = ["<pad>", "<bos>", "<eos>", "%12", "=", "C", "Cl", "N", "O", "[nH]"]
    assert tokenizer.convert_ids_to_tokens(list(range(10))) == words
    assert len(tokenizer) == 10
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("ClC[nH]")["input_ids"] == [1, 6, 5, 9]
    assert tokenizer("")["input_ids"] == [1]
    assert tokenizer(["C", "CC"], padding=True)["input_ids"] == [[0, 1, 5], [1, 5, 5]]


@pytest.mark.parametrize("smiles", [*HARD, "N->[Pt]<-N", "C:1:C:C1", "C$C", "*C", "bcnops", "C%(123)CC%(123)"])
def test_a_smiles_is_its_tokens_in_a_row(smiles):
    """Nothing between them, nothing lost; the language of Python's `re` and of `tokenizers` is one."""
    tokenizer = smiles_tokenizer([smiles])
    tokens = tokenizer.tokenize(smiles)
    assert tokens == re.findall(SMILES_TOKEN, smiles)
    assert "".join(tokens) == smiles
    assert set(tokenizer.get_vocab()) == {"<pad>", "<bos>", "<eos>", *tokens}
    assert tokenizer.decode(tokenizer(smiles)["input_ids"], skip_special_tokens=True) == smiles
    assert tokenizer.decode(tokenizer(smiles)["input_ids"]) == f"<bos>{smiles}"


def test_auto_tokenizer_loads_what_is_saved(tmp_path):
    """Two files, no class of ours, hence no remote code."""
    tokenizer = smiles_tokenizer(HARD, max_length=128)
    tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(HARD)["input_ids"] == tokenizer(HARD)["input_ids"]
    assert loaded.batch_decode(loaded(HARD)["input_ids"], skip_special_tokens=True) == HARD
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 128)
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<bos>", "<eos>")
    with pytest.raises(Exception, match="Missing"):
        loaded("C[Xe]")


@pytest.mark.parametrize(
    "text", ["CX", "C C", " C", "CC\n", "C[OH]", "C%1", "C9", "C[nH", "xyz", "C\u0661", "c1cccc1\u00e9", "CCl2"]
)
def test_what_is_unknown_raises(text):
    """The official code drops such characters, and trains on another molecule."""
    tokenizer = smiles_tokenizer(["CCl", "C[nH]", "c1cccc1", "C%12CC%12"])
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer(text)


@pytest.mark.parametrize(
    ("smiles", "message"), [("CCX", "'X' in 'CCX'"), ("C C", "' ' in 'C C'"), ("C[nH", r"'H' in 'C\[nH'")]
)
def test_no_vocabulary_is_made_of_what_is_no_smiles(smiles, message):
    with pytest.raises(ValueError, match=f"{message} is no token of SMILES"):
        smiles_tokenizer(["C", smiles])


def test_the_vocabulary_is_that_of_the_training_molecules(toys, tmp_path):
    """An atom that only the test has is not known."""
    write_csv(tmp_path / "test.csv", ["CC[Se]C"])
    dataset = toys(test_files=[str(tmp_path / "test.csv")], test_share=0)
    tokenizer = dataset_smiles_tokenizer(dataset)
    assert tokenizer.get_vocab() == smiles_tokenizer(dataset["train"]["text"]).get_vocab()
    message = r"no token for '\[Se\]' in 'CC\[Se\]C' \(split test, source test\.csv, line 2\)"
    with pytest.raises(ValueError, match=message):
        encode_text(dataset["test"], tokenizer)


def test_molecules_in_a_row_end_with_the_end_token(toys):
    dataset = toys()
    tokenizer = dataset_smiles_tokenizer(dataset)
    rows = encode_text(dataset["validation"], tokenizer)["input_ids"][:]
    assert all(row[-1] == 2 and min(row[:-1]) > 2 for row in rows)
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == list(dataset["validation"]["text"])


SINGLE = st.sampled_from("BCNOPSFIbcnops*-=#$:/\\().0123456789")
LONG = st.sampled_from(
    ["Br", "Cl", "[nH]", "[Cl-]", "[Br]", "[C@@H]", "[->]", "%10", "%12", "%(7)", "%(123)", "->", "<-"]
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(SINGLE | LONG, min_size=1).map("".join), min_size=1, max_size=8),
    odd=st.text(alphabet="CBrl[]%->< \ne\ue000<bos>", max_size=4),
)
def test_a_table_has_the_ids_of_the_tokenizer(rows, odd):
    """Of any row of tokens of the language, also "CBr", "--->" and "%123"; and it leaves to the tokenizer what is no
    SMILES, in which a token of several characters may begin and not end."""
    tokenizer = smiles_tokenizer(rows)
    table = SmilesTable.of(tokenizer)
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in rows]
    assert table.encode(rows).to_pylist() == ids
    assert table.encode([]).to_pylist() == []
    mixed = [*rows, rows[0] + odd]
    try:
        ids.append([*tokenizer(mixed[-1], add_special_tokens=False, split_special_tokens=True)["input_ids"], 2])
    except Exception:  # `tokenizers` raises plain Exceptions
        assert table.encode(mixed) is None
    else:
        assert table.encode(mixed).to_pylist() == ids


def test_a_table_is_made_of_a_tokenizer_of_smiles_alone(tmp_path):
    tokenizer = smiles_tokenizer(HARD)
    tokenizer.save_pretrained(tmp_path)
    assert SmilesTable.of(AutoTokenizer.from_pretrained(tmp_path)).encode(HARD) is not None
    assert SmilesTable.of(train_byte_bpe(HARD, 300)) is None
    tokenizer.add_tokens(["CC"])  # is found before anything else
    assert SmilesTable.of(tokenizer) is None


def test_the_tokenizer_is_kept_beside_the_molecules(toys, monkeypatch):
    """It is made once per split of the cache, and a part of a split has its own."""
    train = toys()["train"]
    first = dataset_smiles_tokenizer({"train": train})
    with monkeypatch.context() as patched:
        patched.setattr(tokenizers_module, "smiles_tokens", None)
        again = dataset_smiles_tokenizer({"train": toys()["train"]})
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert again.special_tokens_map == first.special_tokens_map
    assert again.padding_side == first.padding_side
    part = dataset_smiles_tokenizer({"train": train.select([0])})
    assert set(part.get_vocab()) < set(first.get_vocab())


# Spellings


@pytest.mark.parametrize("smiles", [*HARD, *TOYS[::30]])
def test_a_random_smiles_is_the_same_molecule(smiles):
    spellings = [random_smiles(smiles, 0, epoch, 0) for epoch in range(20)]
    assert {canonical_smiles(spelling) for spelling in spellings} == {canonical_smiles(smiles)}
    if smiles not in ("[13CH4]", "C1CC2CCC1CC2"):  # few orders look different
        assert len(set(spellings)) > 3


def test_spellings_follow_from_seed_epoch_and_row():
    smiles = TOYS[-1]
    drawn = {
        (seed, epoch, row): random_smiles(smiles, seed, epoch, row) for seed, epoch, row in product((0, 1), repeat=3)
    }
    assert len(set(drawn.values())) > 4
    assert all(random_smiles(smiles, *key) == drawn[key] for key in reversed(drawn))


def test_an_epoch_of_the_training_split_is_written_once(toys):
    """Row by row what `random_smiles` gives; another epoch or seed is another; the columns stay."""
    rows = toys()["train"]
    first = augment(rows, seed=3, epoch=1)
    expected = [random_smiles(text, 3, 1, row) for row, text in enumerate(rows["text"])]
    assert list(first["text"]) == expected != list(rows["text"])
    assert list(first["source"]) == list(rows["source"])
    assert augment(toys()["train"], seed=3, epoch=1).cache_files == first.cache_files
    assert list(augment(rows, seed=3, epoch=2)["text"]) != expected
    assert list(augment(rows, seed=4, epoch=1)["text"]) != expected


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_is_measured_on_stays_as_it_is(toys, split):
    with pytest.raises(ValueError, match=f"only the split train is augmented, got {split}"):
        augment(toys()[split], seed=0, epoch=0)


def test_without_rdkit_the_extra_is_named(toys, monkeypatch):
    """The data themselves need none."""
    monkeypatch.setitem(sys.modules, "rdkit", None)
    rows = toys()["train"]
    with pytest.raises(ValueError, match=r"pip install 'looped-transformers\[molecules\]'"):
        augment(rows, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"pip install 'looped-transformers\[molecules\]'"):
        toys(canonical=True)


# Packed rows


@pytest.fixture
def packed(toys):
    """packed(split, length): the molecules of a split, and their tokenizer."""
    dataset = toys()
    tokenizer = dataset_smiles_tokenizer(dataset)
    return lambda split="validation", length=40: (PackedMolecules(dataset[split], tokenizer, length), tokenizer)


@pytest.mark.parametrize("position_embedding", ["rope", "learned", "none"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_packed_row_is_its_molecules_one_by_one(packed, position_embedding, attn):
    """The logits of each, at every loop count: none sees another, and positions are its own."""
    molecules, tokenizer = packed()
    fields = {"vocab_size": len(tokenizer), "position_embedding": position_embedding}
    model = make_model(attn=attn, **fields)
    numbers = torch.arange(len(molecules))
    rows = molecules.rows(numbers)
    labels = rows.pop("shift_labels")
    with torch.no_grad():
        logits = model(**rows, num_loops=3, use_cache=False).logits
    found = logits[labels >= 0]
    alone = []
    # The order of the rows: by place, not by number.
    spans = (rows["position_ids"] == 0) & (labels >= 0)
    for row, start in spans.nonzero().tolist():
        length = int(labels[row, start:].tolist().index(tokenizer.eos_token_id)) + 1
        ids = rows["input_ids"][row, start : start + length]
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1:].tolist() == labels[row, start : start + length - 1].tolist()
        with torch.no_grad():
            alone.append(model(ids[None], num_loops=3).logits[0])
    torch.testing.assert_close(found, torch.cat(alone), **FP32)
    assert len(alone) == len(molecules)


def test_every_molecule_is_in_a_row_once(packed, toys):
    molecules, tokenizer = packed("train", 40)
    numbers = torch.randperm(len(molecules), generator=torch.Generator().manual_seed(0))[:50]
    labels = molecules.rows(numbers)["shift_labels"]
    text = tokenizer.decode(labels[labels >= 0])
    chosen = toys()["train"].select(numbers.tolist())["text"]
    assert sorted(text.split("<eos>")[:-1]) == sorted(chosen)
    assert labels.shape == (len(labels), 40)
    # No two rows would fit into one.
    filled = sorted((labels >= 0).sum(1).tolist())
    assert filled[0] + filled[1] > 40


def first_fit_by_hand(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """Every molecule looks at every row."""
    places, filled = [(0, 0)] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next(row for row, full in enumerate(filled) if full + lengths[i] <= capacity)
        places[i] = row, filled[row]
        filled[row] += lengths[i]
    return places


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data(), capacity=st.integers(1, 60))
def test_rows_are_those_of_a_search_through_all_rows(data, capacity):
    """Row by row and token by token, so that batches are those of earlier versions."""
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=70))
    assert first_fit(lengths, capacity) == first_fit_by_hand(lengths, capacity)


def test_the_work_of_a_row_grows_with_the_logarithm_of_the_batch():
    """Comparisons are counted; 2,000 molecules that find no room in the rows before theirs took 2,000 x 2,000 / 2."""

    class Counted(int):
        compared = 0

        def __le__(self, other):
            Counted.compared += 1
            return int(self) <= other

    first_fit([Counted(40)] * 2000, 76)
    assert 0 < Counted.compared <= 2000 * 11


@pytest.mark.parametrize("count", [64, 256])
def test_rows_of_real_lengths_are_nearly_full(count):
    """Lengths as those of MOSES in rows of the recipes' length: a tenth of the work is padding at most."""
    lengths = np.random.default_rng(0).normal(36.4, 4.5, count).round().clip(16, 55).astype(int).tolist()
    places = first_fit(lengths, 76)
    rows = 1 + max(row for row, _ in places)
    assert sum(lengths) > 0.9 * 76 * rows
    for row in range(rows):
        inside = sorted((start, start + lengths[i]) for i, (at, start) in enumerate(places) if at == row)
        assert all(stop == begin for (_, stop), (begin, _) in pairwise(inside))
        assert (inside[0][0], inside[-1][1] <= 76) == (0, True)


@pytest.fixture
def make_batches(toys):
    dataset = toys()
    tokenizer = dataset_smiles_tokenizer(dataset)
    depth = DepthSampler("uniform", minimum=1, maximum=4)

    def make(seed=0, batch_size=24, **fields):
        return MoleculeBatches(dataset["train"], tokenizer, 40, batch_size, seed, depth, **fields)

    return make


def smiles_of(batch, tokenizer) -> list[str]:
    labels = batch["shift_labels"]
    return tokenizer.decode(labels[labels >= 0]).split("<eos>")[:-1]


def test_a_batch_of_molecules_follows_from_seed_and_step(make_batches):
    """Whatever was asked for before."""
    first, second = make_batches(), make_batches()
    expected = [first[step] for step in range(12)]
    for step in reversed(range(12)):
        for name, value in second[step].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[step][name]))
    assert any(
        not torch.equal(make_batches(seed=1)[step]["input_ids"][:1], expected[step]["input_ids"][:1])
        for step in range(3)
    )
    with pytest.raises(IndexError):
        first[-1]


def test_a_batch_names_its_molecules(make_batches, toys):
    train, tokenizer, batches = toys()["train"], dataset_smiles_tokenizer(toys()), make_batches()
    for step in range(8):
        named = [train[number]["text"] for number in batches.chosen(step).tolist()]
        assert sorted(named) == sorted(smiles_of(batches[step], tokenizer))


def test_ranks_share_the_molecules_of_a_batch(make_batches, toys):
    tokenizer = dataset_smiles_tokenizer(toys())
    whole = make_batches()
    parts = [make_batches(rank=rank, world=3) for rank in range(3)]
    for step in range(8):
        batches = [part[step] for part in parts]
        dealt = [smiles for batch in batches for smiles in smiles_of(batch, tokenizer)]
        assert sorted(dealt) == sorted(smiles_of(whole[step], tokenizer))
        assert [len(smiles_of(batch, tokenizer)) for batch in batches] == [8] * 3
        labels = sum(int((batch["shift_labels"] >= 0).sum()) for batch in batches)
        assert {batch["num_labels"] for batch in (*batches, whole[step])} == {labels}


@pytest.mark.parametrize("spellings", [None, 3])
def test_every_molecule_comes_once_per_epoch(make_batches, toys, spellings):
    """As it is written, or spelt anew: epoch e has spelling e modulo their number."""
    train_rows = toys()["train"]
    tokenizer = dataset_smiles_tokenizer(toys())
    batches = make_batches(spellings=spellings, spelling_seed=5)
    steps = -(-4 * len(train_rows) // 24)
    found = []
    for step in range(steps):
        found += smiles_of(batches[step], tokenizer) if spellings is None else [batches[step]]
    if spellings is None:
        # Within a batch the order is that of the rows; four epochs are all but the last batch.
        assert sorted(Counter(found[: 3 * 24]).values())[-1] <= 2
        return
    numbers = torch.cat([batches._epochs.between(step * 24, 24) for step in range(steps)]).tolist()
    for step in (0, steps // 2, steps - 1):
        places = range(step * 24, step * 24 + 24)
        expected = [
            random_smiles(train_rows[numbers[at]]["text"], 5, at // len(train_rows) % 3, numbers[at]) for at in places
        ]
        assert sorted(smiles_of(found[step], tokenizer)) == sorted(expected)


def test_molecules_that_do_not_fit_a_row_are_named(packed):
    with pytest.raises(ValueError, match=r"sequence_length must be at least \d+, the tokens of '.*' and one for"):
        packed("train", 8)


def test_an_empty_split_is_refused(toys):
    dataset = toys()
    tokenizer = dataset_smiles_tokenizer(dataset)
    with pytest.raises(ValueError, match="has no molecules"):
        PackedMolecules(dataset["validation"].select([]), tokenizer, 40)


def test_a_tokenizer_that_marks_no_beginning_is_refused(toys):
    with pytest.raises(ValueError, match="need a bos_token and a pad_token"):
        PackedMolecules(toys()["validation"], train_byte_bpe(["C"], 260), 100)
