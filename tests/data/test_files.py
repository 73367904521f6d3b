"""A file is read as a whole or refused, by its name and the place of what is wrong: every reader, every damage."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders import MultipleChoice, load_task
from data_builders.builders import build_splits
from data_builders.files import find_files, read_text
from data_builders.molecules import MoleculesConfig, read_smiles
from data_builders.text import TextConfig
from looplab.runs.yaml_text import read_yaml

LAW = settings(derandomize=True, max_examples=80, deadline=None, database=None)
MOLECULES = ["CCO", "c1ccccc1", "C[C@H](N)C(=O)O", "[Na+].[Cl-]", "C%10CCCC%10", "*C"]
SMILES = st.sampled_from(MOLECULES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def encoded(text: str, ends: str, mark: bool, packed: bool) -> bytes:
    raw = (("\ufeff" if mark else "") + text.replace("\n", ends)).encode()
    return gzip.compress(raw) if packed else raw


FORMS = {"ends": st.sampled_from(["\n", "\r\n", "\r"]), "mark": st.booleans(), "packed": st.booleans()}


# What is written is read, with the line where it begins


@pytest.mark.slow
@LAW
@given(
    rows=st.lists(st.tuples(SMILES, st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=6))),
    blanks=st.lists(st.integers(0, 5), max_size=3),
    form=st.fixed_dictionaries(FORMS),
)
def test_a_table_is_read_as_it_was_written(folder, rows, blanks, form):
    """Names of molecules may hold anything that CSV can quote; blank lines may lie anywhere between rows."""
    lines, expected = [["name", "smiles"], *([name, smiles] for smiles, name in rows)], []
    file = io.StringIO()
    for number, row in enumerate(lines):
        file.write("\n" * blanks.count(number) if number else "")
        if number:
            expected.append((file.getvalue().count("\n") + 1, row[1]))
        csv.writer(file, lineterminator="\n").writerow(row)
    path = folder / f"table.csv{'.gz' * form['packed']}"
    path.write_bytes(encoded(file.getvalue(), **form))
    assert list(read_smiles(path)) == expected


@LAW
@given(
    rows=st.lists(st.tuples(st.sampled_from(["", " ", "\t"]), SMILES, st.sampled_from(["", " ethanol", "\tx y\x0b"]))),
    blanks=st.lists(st.integers(0, 5), max_size=3),
    form=st.fixed_dictionaries(FORMS),
)
def test_lines_are_read_as_they_were_written(folder, rows, blanks, form):
    text, expected = "", []
    for number, (before, smiles, name) in enumerate(rows):
        text += " \n" * blanks.count(number)
        expected.append((text.count("\n") + 1, smiles))
        text += f"{before}{smiles}{name}\n"
    path = folder / f"lines.smi{'.gz' * form['packed']}"
    path.write_bytes(encoded(text + "\n", **form))
    assert list(read_smiles(path)) == expected


SIGNS = st.text(st.sampled_from([*'CO1#"", \t\n\n\r', "\ufeff", "é", "\x0b", "\x1c", "\u2028"]), max_size=40)


@LAW
@given(SIGNS, st.sampled_from(["SMILES\n", "SMILES,x\n", 'x,SMILES\n"', ""]))
def test_whatever_a_table_holds_is_read_whole_or_refused(folder, text, header):
    """Its twin is pandas, which is told to leave everything as it is."""
    path = folder / "any.csv"
    path.write_text(header + text, encoding="utf-8", newline="")
    try:
        found = [smiles for _, smiles in read_smiles(path)]
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    twin = pandas.read_csv(io.StringIO(read_text(path)), dtype=str, na_filter=False, index_col=False)
    assert found == [cell.strip() for cell in twin["SMILES"]]


@LAW
@given(SIGNS)
def test_whatever_lines_hold_is_read_whole_or_refused(folder, text):
    path = folder / "any.smi"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        found = [smiles for _, smiles in read_smiles(path)]
    except ValueError as error:
        assert re.match(rf"{re.escape(str(path))}( cannot|, line \d+: )", str(error))  # noqa: PT017
        return
    lines = [line.strip(" \t") for line in read_text(path).split("\n") if line.strip()]
    assert [re.split("[ \t]", line)[0] for line in lines] == found


# Damages


def utf_16(raw: bytes) -> bytes:
    return raw.decode().encode("utf-16")


DAMAGES = {
    "no bytes": (lambda raw: b"", "0 bytes"),
    "latin-1": (lambda raw: raw + b"caf\xe9\n", r"line \d+, column 4: byte 0xe9 is no UTF-8"),
    "utf-16": (utf_16, "byte 0xff is no UTF-8"),
    "utf-16 without a mark": (lambda raw: utf_16(raw)[2:], "line 1, column 2: a NUL character"),
    "binary": (lambda raw: raw[:9] + b"\0" + raw[9:], r"line \d+, column \d+: a NUL character"),
}
PACKED = {
    "cut short": (lambda raw: gzip.compress(raw)[:-9], "end-of-stream"),
    "cut to its header": (lambda raw: gzip.compress(raw)[:5], "end-of-stream"),
    "nothing": (lambda raw: b"", "0 bytes"),
    "not packed": (lambda raw: raw, "Not a gzipped file"),
    "another file behind it": (lambda raw: gzip.compress(raw) + b"more", "Not a gzipped file"),
    "a flipped bit": (lambda raw: gzip.compress(raw)[:-8] + b"\0" * 8, "CRC"),
    "latin-1": (lambda raw: gzip.compress(raw + b"\xe9"), "is no UTF-8"),
}


def smiles_of(path: Path):
    return list(read_smiles(path))


def text_of(path: Path):
    return load_task("text", "files", files=[str(path)])


def molecules_of(path: Path):
    return load_task("molecules", "files", files=[str(path)])


READERS = {
    ".smi": (b"CCO ethanol\nCC\n", smiles_of),
    ".txt": (b"One paragraph.\n\nAnother one.\n", text_of),
    ".md": (b"# Head\n\nText.\n", text_of),
    ".csv": (b"SMILES,name\nCCO,ethanol\n", smiles_of),
    " of molecules.csv": (b"SMILES,name\nCCO,ethanol\n", molecules_of),
    ".yaml": (b"name: run\nmodel: {}\n", read_yaml),
}
CASES = [(end, name) for end in READERS for name in DAMAGES]
PACKED_CASES = [(end, name) for end in READERS if end != ".yaml" for name in PACKED]


@pytest.mark.parametrize(("end", "damage"), CASES)
def test_a_damaged_file_is_refused_by_its_name(end, damage, tmp_path):
    raw, read = READERS[end]
    spoil, message = DAMAGES[damage]
    path = tmp_path / f"file{end}"
    path.write_bytes(spoil(raw))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} cannot be read as text \(.*{message}"):
        read(path)


@pytest.mark.parametrize(("end", "damage"), PACKED_CASES)
def test_a_damaged_packed_file_is_refused_by_its_name(end, damage, tmp_path):
    raw, read = READERS[end]
    spoil, message = PACKED[damage]
    path = tmp_path / f"file{end}.gz"
    path.write_bytes(spoil(raw))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} cannot be read as text \(.*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SMILES,name\nCCO,a\nCC\n", "line 3: the row has 1 cells, and the header 2"),
        ("SMILES,name\nCCO,a\n\nCC,b,c\n", "line 4: the row has 3 cells, and the header 2"),
        ('SMILES,name\nCCO,"a\nCC,b\nCN,c\n', "line 2: the row that begins there is no CSV .unexpected end of data"),
        ('SMILES,name\nCCO,"a\n"CC,b\n', "line 2: the row that begins there is no CSV"),
        ('SMILES,name\nCCO,"a\nb"\n"CC"x,b\n', "line 4: the row that begins there is no CSV"),
        ("SMILES,name\nCCO," + "a" * 140_000 + "\n", "line 2: .*field larger"),
        ("SMILES,SMILES\nC,C\n", "must have one column called SMILES or smiles, and has SMILES, SMILES"),
        ("SMILES,smiles\nC,C\n", "must have one column called SMILES or smiles"),
        ("name\nethanol\n", "must have one column called SMILES or smiles, and has name"),
        ("\nSMILES\nC\n", "must have one column called SMILES or smiles"),
        ("SMILES,name\nCCO,a\n,b\n", "line 3: '' is not a SMILES: take"),
        ("SMILES,name\n  ,b\n", "line 2: '' is not a SMILES"),
        ("SMILES,name\n17,b\n", "line 2: '17' is not a SMILES .there is no atom"),
        ("SMILES,name\nnan,b\n", "line 2: 'nan' is not a SMILES .what is 'a'"),
        ("SMILES,name\nNULL,b\n", "line 2: 'NULL' is not a SMILES .what is 'U'"),
        ('SMILES,name\n"[\'C\', \'CC\']",b\n', "line 2: .* is not a SMILES"),
        ("SMILES;name\nC;b\n", "must have one column"),
        ('SMILES\n"C\nC"\n', "line 2: .* is not a SMILES"),
    ],
)  # fmt: skip
def test_a_table_with_a_bad_row_is_refused_with_its_line(text, message, tmp_path):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"t\.csv,? {message}"):
        list(read_smiles(tmp_path / "t.csv"))


@pytest.mark.parametrize("row", ["smiles name", "CCO,ethanol", "C\u2028C", "17", "# comment", "C\x0bC", "x"])
def test_a_line_that_is_no_smiles_is_refused_with_its_number(row, tmp_path):
    (tmp_path / "t.smi").write_text(f"CC\n\n{row}\nCO\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.smi, line 3: .* is not a SMILES"):
        list(read_smiles(tmp_path / "t.smi"))


def test_what_rdkit_cannot_read_is_refused_with_its_line(tmp_path):
    (tmp_path / "t.smi").write_text("CC\nC(C)(C)(C)(C)C\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.smi, line 2: rdkit cannot read"):
        load_task("molecules", "files", files=[str(tmp_path / "t.smi")], canonical=True)


# Datasets of texts


def write_rows(path: Path, rows: list[dict]):
    frame = pandas.DataFrame(rows)
    match path.suffix:
        case ".parquet":
            frame.to_parquet(path)
        case ".csv":
            frame.to_csv(path, index=False)
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(path: Path, kind: str, column: str = "text"):
    dataset = {"path": kind, "data_files": str(path), "split": "train"}
    return load_task("text", "files", dataset=dataset, column=column)


GOOD = [{"text": f"Text {i}.", "name": f"n{i}"} for i in range(3)]
ENDS = {"json": ".jsonl", "csv": ".csv", "parquet": ".parquet"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((kind, value) for kind in ENDS for value in (None, 7, 2.5, True)),
        *((kind, value) for kind in ("json", "parquet") for value in (["a", "b"], {"a": "b"})),
    ],
    ids=repr,
)
def test_a_row_that_is_no_text_is_named(kind, value, tmp_path):
    """All rows are like it, or all but one are texts, where the format can say so."""
    path = tmp_path / f"t{ENDS[kind]}"
    write_rows(path, [{"text": value, "name": "n"}] * 3)
    with pytest.raises(ValueError, match=rf"row 0 .*, column text of dataset .*{path.name}.*is no text"):
        rows_of(path, kind)
    if value is None:
        write_rows(path, [*GOOD, {"text": None, "name": "n"}])
        with pytest.raises(ValueError, match=rf"row 3 .*, column text of dataset .*{path.name}.*None is no text"):
            rows_of(path, kind)


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        ("json", b'{"text": "a"}\n{"name": "b"}\n', r"row 1 .*column text .*None is no text"),
        ("json", b'{"text": "a"}\n{"text": "b"\n', "cannot be read"),
        ("json", b'{"text": "a"}\n{"text": "\xe9"}\n', r"row 1 .*column text .* is no UTF-8|cannot be read"),
        ("json", b'{"text": "a"}\n{"text": 3}\n', r"row 1 .*column text .*3 is no text|cannot be read"),
        ("json", b'{"text": "a", "text": "b"}\n', "cannot be read"),
        ("json", b'{"name": "a"}\n', "column must be one of name, got 'text'"),
        ("json", b"", "cannot be read|has no documents"),
        ("csv", b"text,name\na,b\nc,d,e\n", "cannot be read"),
        ("csv", b'text,name\na,"b\nc,d\n', "cannot be read"),
        ("csv", b"name,text\nx,a\ny\n", r"row 1 .*None is no text"),
        ("csv", b"text,text\na,b\n", "column text is there twice"),
        ("csv", b"text,name\n\xe9,b\n", "cannot be read"),
        ("csv", b"text,name\nNA,b\n", r"row 0 .*None is no text"),
        ("csv", b"text,name\n", "no documents|cannot be read"),
        ("csv", b"", "cannot be read"),
        ("parquet", b"PAR1 and no more", "cannot be read"),
    ],
)
def test_a_damaged_dataset_is_refused(kind, raw, message, tmp_path):
    path = tmp_path / f"t{ENDS[kind]}"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as raised:
        rows_of(path, kind)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "end"), [("json", ".jsonl"), ("json", ".jsonl.gz"), ("csv", ".csv.gz"), ("parquet", ".parquet")]
)
def test_a_dataset_that_is_cut_short_is_refused(kind, end, tmp_path):
    path = tmp_path / f"whole{ENDS[kind]}"
    write_rows(path, GOOD)
    raw = gzip.compress(path.read_bytes()) if end.endswith(".gz") else path.read_bytes()
    cut = tmp_path / f"cut{end}"
    cut.write_bytes(raw[: len(raw) * 3 // 4])
    with pytest.raises(ValueError, match=r"cut\."):
        rows_of(cut, kind)


@pytest.mark.parametrize(
    "arguments", [{"path": "json"}, {"path": "json", "data_files": "nowhere.jsonl"}, {"pat": "json"}]
)
def test_a_dataset_that_cannot_be_found_is_named(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a name of files, `datasets` looks at all that are here
    with pytest.raises(ValueError, match=r"dataset \{.*\} cannot be read"):
        load_task("text", "files", dataset=arguments | {"split": "train"})


# Benchmarks


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw, rows: raw[:-12], r"requests\.jsonl\.gz cannot be read after line \d+"),
        (lambda raw, rows: b"no gzip", r"requests\.jsonl\.gz cannot be read after line 0"),
        (lambda raw, rows: pack(rows[:1] + rows[2:]), r"line 2 has row 2 in the place of row 1"),
        (lambda raw, rows: pack([rows[0], rows[1] | {"doc": {}}]), r"line 2 is no request .*query"),
        (lambda raw, rows: pack([rows[0] | {"doc_id": "0"}]), r"line 1 is no request .*doc_id"),
        (lambda raw, rows: pack([put(rows[0], query=None)]), r"line 1 is no request .*doc\.query"),
        (lambda raw, rows: pack([put(rows[0], choices=["a", 3])]), r"line 1 is no request .*doc\.choices"),
        (lambda raw, rows: pack([put(rows[0], gold=2)]), r"line 1 is no request .*doc\.gold 2 is none of the 2"),
        (lambda raw, rows: gzip.compress(b'{"doc": \n'), r"line 1 is no request"),
        (lambda raw, rows: gzip.compress(b"[1]\n"), r"line 1 is no request"),
        (lambda raw, rows: gzip.compress(b""), r"split validation of piqa has no rows"),
    ],
    ids=range(11),
)
def test_a_damaged_benchmark_is_refused_with_its_line(spoil, message, tmp_path):
    rows = [
        {"doc_id": i, "doc": {"query": f"Goal: {i}?\nAnswer:", "choices": ["a", "b"], "gold": i % 2}, "idx": 0}
        for i in range(4)
    ]
    config = MultipleChoice.builder_configs["piqa"]
    for split in ("test", "validation"):
        (tmp_path / config.file(split)).parent.mkdir(parents=True)
    tested = [put(row, query=f"Goal: {i} or not?\nAnswer:") for i, row in enumerate(rows)]
    (tmp_path / config.file("test")).write_bytes(pack(tested))
    (tmp_path / config.file("validation")).write_bytes(spoil(pack(rows), rows))
    builder = MultipleChoice(config_name="piqa", data_dir=str(tmp_path), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        build_splits(builder)


def pack(rows: list[dict]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def put(row: dict, **fields) -> dict:
    return row | {"doc": row["doc"] | fields}


# Files by their names


def test_a_file_is_found_by_its_own_name_and_from_home(tmp_path, monkeypatch):
    """Also where the name has the brackets of a glob."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a[1].txt", "b.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    found = find_files("files", ["~/*.txt", str(tmp_path / "a[1].txt")], (".txt",), Path("nowhere"), "nothing")
    assert [path.name for path in found] == ["a[1].txt", "b.txt"]
    for name in ("", "~nobody_here/a.txt", "a\0b"):
        with pytest.raises(ValueError, match=r"^files"):
            find_files("files", [name], (".txt",), Path("nowhere"), "nothing")
    write_rows(tmp_path / "t.jsonl", GOOD)
    dataset = {"path": "json", "data_files": {"train": ["~/t.jsonl"]}, "split": "train"}
    assert [text for _, text in TextConfig(dataset=dataset).texts()] == [row["text"] for row in GOOD]


# Splits


@pytest.mark.parametrize("shares", [{}, {"validation_share": 0.2, "test_share": 0.2}])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 10, 40])
def test_every_split_of_molecules_has_rows_or_is_named(number, shares, tmp_path):
    (tmp_path / "t.csv").write_text(
        "".join(f"{row}\n" for row in ["SMILES", *("C" * i for i in range(1, number + 1))])
    )
    config = MoleculesConfig(files=[str(tmp_path / "t.csv")], **shares)
    try:
        splits = config.deal()
    except ValueError as error:
        said = re.match(
            r"the split (\w+) has no molecules and needs one at least \(train (\d+), validation (\d+), test (\d+);",
            str(error),
        )
        counts = dict(zip(("train", "validation", "test"), map(int, said.groups()[1:]), strict=True))
        assert counts[said[1]] == 0
        assert sum(counts.values()) == number
        assert number < 40 or not shares
    else:
        assert min(map(len, splits.values())) > 0
        assert sum(map(len, splits.values())) == number


def test_a_test_file_without_molecules_of_its_own_is_named(tmp_path):
    (tmp_path / "a.smi").write_text("".join("C" * i + "\n" for i in range(1, 60)), encoding="utf-8")
    (tmp_path / "b.csv").write_text("SMILES\n", encoding="utf-8")
    fields = {"files": [str(tmp_path / "a.smi")], "validation_share": 0.2}
    for name in ("test_files", "test_scaffolds_files"):
        more = {name: [str(tmp_path / "b.csv")]} | ({"test_share": 0} if name == "test_files" else {"test_share": 0.2})
        with pytest.raises(ValueError, match=rf"the split {name.removesuffix('_files')} has no molecules"):
            load_task("molecules", "files", **fields, **more)


@pytest.mark.parametrize("number", [0, 1, 2, 12])
def test_every_split_of_text_has_rows_or_is_named(number, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(f"Paragraph {i}." for i in range(number)) or "\n", encoding="utf-8")
    fields = {"files": [str(tmp_path / "t.txt")], "document_characters": 5, "validation_share": 0.3, "test_share": 0.3}
    if number == 12:
        assert sum(map(len, load_task("text", "files", **fields).values())) == number
    else:
        message = rf"the split \w+ has no documents and needs one at least \(there are {number}, with validation_share"
        with pytest.raises(ValueError, match=message):
            load_task("text", "files", **fields)
