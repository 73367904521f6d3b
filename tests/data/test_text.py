"""Laws of text: splits that share nothing, data that follow from contents and seed, blocks against a naive twin."""

import gzip
import json
import os
import random
import struct
import tarfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_builders import (
    DepthSampler,
    TextBatches,
    TextBlocks,
    dataset_byte_bpe,
    encode_text,
    load_task,
    train_byte_bpe,
)
from data_builders.text import documents
from looplab.pretrained import corpora
from toys import write_pages

SIZES = {"document_characters": 150, "validation_share": 0.2, "test_share": 0.2}


@pytest.fixture
def pages(tmp_path):
    """load(**fields): the splits of forty toy pages."""
    files = write_pages(tmp_path / "pages")
    return lambda **fields: load_task("text", "files", **({"files": files} | SIZES | fields))


def texts(dataset) -> dict[str, list[str]]:
    return {split: list(rows["text"]) for split, rows in dataset.items()}


# Documents and splits


def test_splits_share_no_document_and_hold_all(pages, tmp_path):
    dealt = texts(pages())
    found = [text for split in dealt.values() for text in split]
    assert len(found) == len(set(found))
    pieces = [documents(path.read_text(), 150) for path in (tmp_path / "pages").iterdir()]
    assert set(found) == {piece for page in pieces for piece in page}
    assert all(len(dealt[split]) > 0.1 * len(found) for split in dealt)


def test_the_same_text_and_seed_give_the_same_bytes(pages, tmp_path):
    """Also from another folder, packed, with a byte order mark or Windows line ends; another seed deals otherwise."""
    first = pages()
    other = tmp_path / "elsewhere"
    other.mkdir()
    for path in (tmp_path / "pages").iterdir():
        raw = path.read_bytes()
        raw = b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n") if path.name < "page020" else raw
        (other / (path.name + ".gz")).write_bytes(gzip.compress(raw))
    assert texts(pages(files=[str(other / "*.gz")])) == texts(first)
    assert texts(pages(seed=1)) != texts(first)
    again = load_task("text", "files", files=[str(tmp_path / "pages" / "*.txt")], cache_dir=tmp_path / "b", **SIZES)
    assert texts(again) == texts(first)
    assert list(again["train"]["source"]) == list(first["train"]["source"])


def test_a_document_stays_in_its_split_whatever_else_is_read(pages, tmp_path):
    first, seventh = texts(pages()), texts(pages(files=[str(tmp_path / "pages" / "page00*.txt")]))
    assert all(set(seventh[split]) <= set(first[split]) for split in first)


def test_copies_are_dropped(pages, tmp_path):
    before = texts(pages())
    for path in list((tmp_path / "pages").iterdir())[:10]:
        (path.parent / f"copy-of-{path.name}").write_text(path.read_text())
    assert {split: set(rows) for split, rows in texts(pages()).items()} == {k: set(v) for k, v in before.items()}
    assert sum(map(len, texts(pages()).values())) == sum(map(len, before.values()))


def test_a_changed_file_is_read_again(pages, tmp_path):
    before = texts(pages())
    (tmp_path / "pages" / "page000.txt").write_text("Something else altogether stands here now.")
    after = texts(pages())
    found = [text for split in after.values() for text in split]
    assert "Something else altogether stands here now." in found
    assert after != before


def test_documents_are_whole_paragraphs():
    paragraphs = [f"{'word ' * n}end." for n in (1, 30, 2, 3, 60, 1)]
    pieces = list(documents("\n\n \t\n".join(paragraphs) + "\n\n\n", 100))
    assert [paragraph for piece in pieces for paragraph in piece.split("\n\n")] == paragraphs
    assert all(len(piece) >= 100 for piece in pieces[:-1])
    assert list(documents(" \n\n ", 10)) == []


def test_any_dataset_of_texts_is_text(pages, tmp_path):
    rows = [{"page": (tmp_path / "pages" / f"page{i:03}.txt").read_text()} for i in range(40)] if pages() else []
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train"}
    assert texts(pages(files=[], dataset=dataset, column="page")) == texts(pages())
    with pytest.raises(ValueError, match=r"column must be one of page, got 'text'"):
        pages(files=[], dataset=dataset)
    with pytest.raises(ValueError, match=r"add `split` to its arguments"):
        pages(files=[], dataset={k: v for k, v in dataset.items() if k != "split"}, column="page")


OWN = {
    "train": [f"Text {n} is trained on." for n in range(30)] + ["Both.", "All."],
    "validation": [f"Text {n} is checked." for n in range(4)] + ["Both.", "All.", "Text 0 is checked."],
    "test": [f"Text {n} is measured." for n in range(4)] + ["All."],
}


def own_data(kind: str, folder: Path) -> dict:
    """Fields of `load_task` for the splits `OWN`, kept as a `kind` of data."""
    splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in OWN.items()})
    if kind == "saved":
        splits.save_to_disk(folder / "saved")
        return {"dataset": {"path": str(folder / "saved"), "split": "train"}}
    if kind == "files":
        for name, rows in splits.items():
            (folder / name).mkdir()
            for number, row in enumerate(rows):
                (folder / name / f"{number}.txt").write_text(row["text"])
        held_out = {f"{name}_files": [str(folder / name / "*.txt")] for name in ("validation", "test")}
        return {"files": [str(folder / "train" / "*.txt")], **held_out}
    for name, rows in splits.items():
        (rows.to_parquet if kind == "parquet" else rows.to_json)(folder / f"{name}.{kind}")
    files = {name: str(folder / f"{name}.{kind}") for name in splits}
    return {"dataset": {"path": kind, "data_files": files, "split": "train"}}


@pytest.mark.parametrize("kind", ["saved", "files", "parquet", "json"])
@pytest.mark.parametrize("names", [("validation", "test"), ("validation",), ("test",), ()])
def test_a_data_set_keeps_its_own_splits_and_never_trains_on_them(tmp_path, kind, names):
    """What a split of its own holds is in no other; what is not named is dealt as ever, from the training rows."""
    fields = own_data(kind, tmp_path)
    if kind == "files":
        fields = {field: value for field, value in fields.items() if field.partition("_")[0] in ("files", *names)}
    else:
        fields |= {f"{name}_split": name for name in names}
    shares = {f"{name}_share": 0.2 for name in ("validation", "test") if name not in names}
    found = {split: set(rows) for split, rows in texts(load_task("text", "files", **fields, **shares)).items()}
    held_out = set()
    for name in ("test", "validation"):
        if name in names:
            assert found[name] == set(OWN[name]) - held_out
            held_out |= set(OWN[name])
    assert all(found.values())
    assert set().union(*found.values()) == set(OWN["train"]) | held_out
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


def test_a_saved_data_set_is_text_like_any_other(tmp_path):
    """`Dataset.save_to_disk`, which has no splits, and `DatasetDict.save_to_disk`, against the same rows as JSON."""
    rows = datasets.Dataset.from_dict({"text": OWN["train"]})
    rows.save_to_disk(tmp_path / "rows")
    rows.to_json(tmp_path / "rows.json")
    json_rows = {"path": "json", "data_files": str(tmp_path / "rows.json"), "split": "train"}
    given = {"validation_share": 0.2, "test_share": 0.2}
    wanted = texts(load_task("text", "files", dataset=json_rows, **given))
    assert texts(load_task("text", "files", dataset={"path": str(tmp_path / "rows")}, **given)) == wanted
    assert texts(load_task("text", "files", dataset=own_data("saved", tmp_path)["dataset"], **given)) == wanted


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "saved",
            {"validation_split": "dev"},
            r"validation_split must be one of train, validation, test, .* got 'dev'",
        ),
        (
            "json",
            {"validation_split": "dev"},
            r"validation_split: Unknown split \"dev\"\. Should be one of \['train', ",
        ),
        ("saved", {"split": None}, r"add `split` to its arguments, one of train, validation, test"),
        ("json", {"split": None}, r"add `split` to its arguments, one of train, validation, test"),
        ("saved", {"data_dir": "x"}, r"was written by save_to_disk, and beside its path takes only a split"),
        (
            "json",
            {"validation_split": "test", "validation_share": 0.2},
            r"the split that validation_split names: leave",
        ),
        ("json", {"test_split": "test", "test_files": ["x.txt"]}, r"test_files and test_split name the same thing"),
        ("files", {"test_split": "test"}, r"test_files and test_split name the same thing"),
        ("files", {"test_split": "test", "test_files": []}, r"test_split is a split of dataset, and there is none"),
    ],
)
def test_splits_that_there_are_not_are_refused_with_those_there_are(tmp_path, kind, fields, message):
    given = own_data(kind, tmp_path)
    arguments = {name: value for name, value in fields.items() if name in ("split", "data_dir")}
    if arguments:
        merged = given["dataset"] | arguments
        given["dataset"] = {name: value for name, value in merged.items() if value is not None}
    given |= {name: value for name, value in fields.items() if name not in arguments}
    with pytest.raises(ValueError, match=message):
        load_task("text", "files", **given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": ["nowhere/*.txt"]}, r"nothing matches 'nowhere/\*\.txt'"),
        ({"files": []}, r"name the text: either files"),
        ({"dataset": {"path": "json"}}, r"name the text: either files"),
        ({"files": ["FOLDER/picture.png"]}, r"picture\.png is not one of \.txt"),
        ({"files": ["FOLDER/latin.txt"]}, r"latin\.txt cannot be read as text.*convert it to UTF-8"),
        ({"files": ["FOLDER/cut.txt.gz"]}, r"cut\.txt\.gz cannot be read as text"),
        ({"test_share": 0}, r"test_share must be above 0 and below 0\.5, got 0"),
        ({"document_characters": 0}, r"document_characters must be a whole number >= 1"),
        ({"file": ["a.txt"]}, r"unknown field of text: 'file'. Did you mean 'files'"),
    ],
)
def test_text_that_cannot_be_read_raises(pages, tmp_path, fields, message):
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a" * 1000)[:-12])
    if "files" in fields:
        fields = {"files": [name.replace("FOLDER", str(tmp_path)) for name in fields["files"]]}
    with pytest.raises(ValueError, match=message):
        pages(**fields)


def test_a_corpus_that_was_not_fetched_is_asked_for(monkeypatch, tmp_path):
    from data_builders import text

    monkeypatch.setattr(text, "CORPUS", tmp_path)
    with pytest.raises(ValueError, match=r"run `looped fetch corpus`"):
        load_task("text", "files", files=[str(tmp_path / "**" / "*.txt")])


# Tokens

SAMPLE = ["The loop reads the state.", "It writes the state again, and again.", "Then another layer of tokens."] * 5


def test_any_text_decodes_to_itself():
    tokenizer = train_byte_bpe(SAMPLE, 300)
    assert len(tokenizer) == 300
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for text in (*SAMPLE, "naïve — 日本語 \U0001f642\t\r\n x", " lead , and trail ", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_texts_give_the_same_tokenizer(tmp_path):
    first, second = (train_byte_bpe(iter(SAMPLE), 300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SAMPLE)["input_ids"] == second(SAMPLE)["input_ids"]
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258, got 257"):
        train_byte_bpe(SAMPLE, 257)


def test_the_tokenizer_of_a_dataset_is_learnt_from_its_training_text_once(pages, monkeypatch):
    train = pages()["train"]
    learnt = dataset_byte_bpe(train, 280)
    assert learnt.get_vocab() == train_byte_bpe(train["text"], 280).get_vocab()
    monkeypatch.setattr("data_builders.tokenizers.train_byte_bpe", None)
    assert dataset_byte_bpe(pages()["train"], 280).get_vocab() == learnt.get_vocab()


def test_documents_end_with_the_end_of_text_token_and_only_they(tmp_path):
    """A document that spells the token out does not end there."""
    tokenizer = train_byte_bpe(SAMPLE, 300)
    rows = datasets.Dataset.from_dict({"text": ["one <eos> two", "three<pad>"]})
    first, second = encode_text(rows, tokenizer)["input_ids"]
    assert [first.count(1), second.count(1), second.count(0)] == [1, 1, 0]
    assert tokenizer.decode(first[:-1]) == "one <eos> two"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no eos_token"):
        encode_text(rows, tokenizer)


@pytest.mark.parametrize("character", ["é", "\U0001f600", "z"])
def test_a_character_that_a_tokenizer_would_drop_is_named(character):
    """BPE without the bytes leaves out what is not in its alphabet, and says nothing."""
    plain = Tokenizer(BPE())
    plain.pre_tokenizer = Whitespace()
    plain.train_from_iterator(["a b c hello"] * 9, BpeTrainer(special_tokens=["<eos>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    rows = {"text": ["a b\t\n c", f"hello {character}"], "source": ["x.txt", "y.txt"]}
    assert encode_text(datasets.Dataset.from_dict({"text": rows["text"][:1]}), tokenizer)["input_ids"][:]
    with pytest.raises(ValueError, match=rf"no token for '{character}' in 'hello {character}' .*source y\.txt"):
        encode_text(datasets.Dataset.from_dict(rows), tokenizer)
    assert encode_text(datasets.Dataset.from_dict(rows), train_byte_bpe(rows["text"], 300))


def test_text_is_tokenised_once(pages, monkeypatch):
    """Using the tokenizer does not make it another; another vocabulary does."""
    train = pages()["train"]
    tokenizer, larger = train_byte_bpe(train["text"], 280), train_byte_bpe(train["text"], 290)
    first = encode_text(train, tokenizer)
    tokenizer(["a longer text", "b"], padding=True, truncation=True, max_length=2)
    assert encode_text(pages()["train"], tokenizer).cache_files == first.cache_files
    assert encode_text(train, larger).cache_files != first.cache_files


# Blocks and batches

DEPTH = DepthSampler("uniform", minimum=1, maximum=5, seed=3)


def naive_stream(split, tokenizer) -> list[int]:
    return [token for text in split["text"] for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


@pytest.mark.parametrize("length", [1, 7, 64])
def test_blocks_are_the_documents_in_a_row(pages, length):
    """Also where they reach over the chunks of the file; every token but the first is predicted once."""
    train = pages()["train"]
    tokenizer = train_byte_bpe(train["text"], 280)
    stream = naive_stream(train, tokenizer)
    blocks = TextBlocks(train, tokenizer, length)
    # Chunks of five tokens: longer than a block, and shorter.
    blocks._parts = np.split(np.array(stream, dtype=np.int32), range(5, len(stream), 5))
    blocks._starts = np.cumsum([0, *map(len, blocks._parts)])
    for these in (blocks, TextBlocks(train, tokenizer, length)):
        assert these.num_tokens == len(stream)
        assert len(these) == (len(stream) - 1) // length
        rows = these.rows(torch.arange(len(these)))
        assert rows["input_ids"].flatten().tolist() == stream[: len(these) * length]
        assert rows["shift_labels"].flatten().tolist() == stream[1 : len(these) * length + 1]


def batches(pages, **fields) -> TextBatches:
    train = pages()["train"]
    tokenizer = train_byte_bpe(train["text"], 280)
    return TextBatches(train, tokenizer, 16, 4, seed=2, depth=DEPTH, **fields)


def equal(one: dict, two: dict) -> bool:
    return one["num_loops"] == two["num_loops"] and all(
        torch.equal(one[k], two[k]) for k in ("input_ids", "shift_labels")
    )


def test_a_batch_follows_from_seed_and_step(pages):
    first, second = batches(pages), batches(pages)
    steps = list(range(3 * len(first.blocks)))
    expected = [first[step] for step in steps]
    random.Random(0).shuffle(steps)
    assert all(equal(second[step], expected[step]) for step in steps)
    assert [batch["num_loops"] for batch in expected] == [DEPTH(step) for step in range(len(expected))]
    with pytest.raises(IndexError, match=r"step must be >= 0, got -1"):
        first[-1]


def test_ranks_share_the_batch_of_one(pages):
    whole, ranks = batches(pages), [batches(pages, rank=rank, world=2) for rank in range(2)]
    for step in (0, 1, 50):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), whole[step]["input_ids"])
        assert {part["num_loops"] for part in parts} == {whole[step]["num_loops"]}
    with pytest.raises(ValueError, match=r"positive multiple of the 3 ranks, got 4"):
        batches(pages, rank=0, world=3)


def test_an_epoch_has_each_block_once(pages):
    these = batches(pages)
    count = len(these.blocks)
    rows = torch.cat([these[step]["input_ids"] for step in range(count)])  # four epochs
    every = sorted(these.blocks.rows(torch.arange(count))["input_ids"].tolist())
    epochs = [rows[start : start + count].tolist() for start in range(0, 4 * count, count)]
    assert all(sorted(epoch) == every for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_batch_names_the_documents_that_it_has_tokens_of(pages):
    """Against a twin that knows of every token whose it is."""
    these, train = batches(pages), pages()["train"]
    tokenizer = train_byte_bpe(train["text"], 280)
    owners = [n for n, text in enumerate(train["text"]) for _ in naive_stream({"text": [text]}, tokenizer)]
    for step in range(20):
        blocks = these._epochs.between(step * 4, 4).tolist()
        assert these.chosen(step).tolist() == sorted({n for i in blocks for n in owners[i * 16 : i * 16 + 17]})


def test_too_little_text_for_a_block_raises(pages):
    train, tokenizer = pages()["train"], train_byte_bpe(SAMPLE, 300)
    with pytest.raises(ValueError, match=r"the split train has \d+ tokens, too few for a block of 100000"):
        TextBlocks(train, tokenizer, 100_000)
    with pytest.raises(ValueError, match=r"has 0 tokens, too few"):
        TextBlocks(train.select([]), tokenizer, 8)
    with pytest.raises(ValueError, match=r"sequence_length must be >= 1, got 0"):
        TextBlocks(train, tokenizer, 0)


# The corpus

PAGE = """<html><head><title>No title at all, although it is long enough to be read as a sentence.</title></head><body>
<div class=menu><a href=x>Home</a> | <a href=y>Index</a></div><p>Prose is what stays: a sentence with
<code>words</code> in it,

and &amp; other things that are long enough to keep.
<table><tr><td>Cells of a table are left out, as long as they may be, and be they prose.</td></tr></table>
<pre>if (x) { return "no listing, however much it may look like a sentence of words."; }</pre>
<p>After a listing, the text goes on as before and is kept, to its very last word.</p></body></html>"""


def test_a_page_is_read_as_its_prose(tmp_path):
    (tmp_path / "page.html").write_text(PAGE)
    assert list(corpora.read_html(tmp_path / "page.html")) == [
        "Prose is what stays: a sentence with words in it, and & other things that are long enough to keep.",
        "After a listing, the text goes on as before and is kept, to its very last word.",
    ]


def test_pod_is_read_without_its_codes(tmp_path):
    (tmp_path / "page.pod").write_text(
        "=head1 A HEADING\n\n"
        "A B<bold I<and slanted>> word, C<< a >> and L<a link|perlop> are kept, E<lt>so is thisE<gt>."
        "\n\n    verbatim, code;\n\n=cut\n"
    )
    kept = "A bold and slanted word, a and a link are kept, <so is this>."
    assert corpora.plain_pod("C<< $x->y >> E<gt>") == "$x->y >"
    assert list(corpora.read_pod(tmp_path / "page.pod")) == [kept]


def test_articles_lose_their_brackets(tmp_path):
    (tmp_path / "toy.dict.dz").write_bytes(
        gzip.compress(
            b"00-database-info\n   Made by hand, and with this line to be longer than the shortest of paragraphs.\n\n"
            b"Loop \\Loop\\, n.\n   1. A {fold}; a {doubling} of a thread, through which\n"
            b"      another may pass. [1913 Webster]\n"
            b"\n   2. The same again.\n\nShort \\Short\\, a.\n   Not long.\n"
        )
    )
    assert list(corpora.read_dictionary(tmp_path / "toy.dict.dz")) == [
        "Loop, n. 1. A fold; a doubling of a thread, through which another may pass. 2. The same again."
    ]


@pytest.mark.parametrize("version", [2, 3])
def test_r_lines_are_read_as_paragraphs(tmp_path, version):
    """Two vectors of strings, one of numbers, one missing value."""
    head = b"X\n" + struct.pack(">iii", version, 0, 0)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    lines = [b"It is a truth that is told on two lines, of which", b"this is the second.", b"", None, b"Short."]
    strings = b"".join(struct.pack(">ii", 9, -1 if s is None else len(s)) + (s or b"") for s in lines)
    vectors = [head + struct.pack(">ii", 16, len(lines)) + strings, head + struct.pack(">iid", 14, 1, 0.5)]
    chunks = [struct.pack(">i", len(v)) + zlib.compress(v) for v in vectors]
    (tmp_path / "Rdata.rdb").write_bytes(b"".join(chunks))
    assert list(corpora.read_r_lines(tmp_path / "Rdata.rdb")) == [
        "It is a truth that is told on two lines, of which this is the second."
    ]


@pytest.fixture
def toy_debian(tmp_path, monkeypatch):
    """Commands with Debian's names, found before Debian's, over two packages that are tar files."""
    packages, commands = tmp_path / "packages", tmp_path / "bin"
    for name in ("toy-doc-9", "toy-doc-10"):
        place = tmp_path / name / "usr" / "share" / "doc" / name
        place.mkdir(parents=True)
        (place / "copyright").write_text("anyone may copy this")
        (place / "page.html").write_text(PAGE)
        packages.mkdir(exist_ok=True)
        with tarfile.open(packages / f"{name}.deb", "w") as archive:
            archive.add(tmp_path / name, ".")
    scripts = {
        "apt-cache": "echo toy-doc-9; echo toy-doc-10; echo toy-document",
        "apt-get": f'cp {packages}/$2.deb . || {{ echo "no $2" >&2; exit 100; }}',
        "dpkg-deb": "if [ $1 = -x ]; then mkdir -p $3 && tar xf $2 -C $3; else echo 1.2-3; fi",
    }
    commands.mkdir()
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setattr(
        corpora,
        "SOURCES",
        [corpora.Source(r"toy-doc-\d+", "toys", "free", "usr/share/doc/*/*.html", corpora.read_html)],
    )
    return packages


def test_the_corpus_says_where_it_came_from(toy_debian, tmp_path):
    folder = corpora.fetch_corpus(tmp_path / "looped" / "corpus")
    (page,) = folder.rglob("*.txt")
    assert page.parent.name == "toy-doc-10"  # and not 9
    assert page.read_text().startswith("Prose is what stays")
    assert (page.parent / "copyright").read_text() == "anyone may copy this"
    record = json.loads((folder / "sources.json").read_text())
    assert record["bytes"] == len(page.read_bytes())
    assert record["sources"][0]["version"] == "1.2-3"
    assert len(record["sources"][0]["sha256"]) == 64
    assert corpora.describe_corpus(folder).endswith("0.0 MB of text, 1 files from 1 packages")
    page.unlink()
    assert corpora.fetch_corpus(folder) == folder  # what is there is kept
    assert not page.exists()


def test_a_corpus_is_there_whole_or_not_at_all(toy_debian, tmp_path, monkeypatch):
    (toy_debian / "toy-doc-10.deb").unlink()
    with pytest.raises(ValueError, match=r"apt-get download toy-doc-10` failed: [^`]*no toy-doc-10"):
        corpora.fetch_corpus(tmp_path / "looped" / "corpus")
    assert list((tmp_path / "looped").iterdir()) == []
    monkeypatch.setattr(corpora, "SOURCES", [corpora.Source("absent", "toys", "free", "*", corpora.read_html)])
    with pytest.raises(ValueError, match=r"knows no package absent: run `apt-get update`"):
        corpora.fetch_corpus(tmp_path / "looped" / "corpus")
    with pytest.raises(ValueError, match=r"holds something else than the corpus"):
        corpora.fetch_corpus(toy_debian)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no apt-get here: name text files"):
        corpora.fetch_corpus(tmp_path / "looped" / "corpus")


def test_every_source_has_a_reader_and_a_licence():
    names = [source.package for source in corpora.SOURCES]
    assert len(names) == len(set(names))
    assert all(source.licence and callable(source.read) for source in corpora.SOURCES)
    assert {source.genre for source in corpora.SOURCES} == {"books", "manuals", "reference", "standards"}
    assert Path(corpora.CORPUS).parts[-2:] == ("looped", "corpus")
