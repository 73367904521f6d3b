"""Laws of token shards: the documents of the source and nothing else, written once, and read as text is."""

import gc
import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from data_builders import DepthSampler, TextBatches, load_streams, token_shards, train_byte_bpe
from data_builders.epochs import WindowedEpochs
from data_builders.token_shards import TokenBlocks, load_tokens, named_source, write_tokens
from toys import make_texts, write_shards

TEXTS = make_texts()
TOKENIZER = train_byte_bpe([text for shard in TEXTS for text in shard], 300)


@pytest.fixture(params=["json", "parquet"])
def source(request, tmp_path):
    return write_shards(tmp_path / "shards", request.param, TEXTS)


def write(source: dict, folder: Path, **fields) -> dict:
    return write_tokens(source, TOKENIZER, "digest", folder, held_out_documents=3, **({"processes": 1} | fields))


def tokens_of(texts: list[str]) -> list[list[int]]:
    return [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in texts]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}


def test_shards_hold_the_documents_of_the_source(source, tmp_path):
    """In its order; those that are held out are in a split of their own alone."""
    note = write(source, tmp_path / "tokens")
    splits, streams = load_tokens(tmp_path / "tokens"), load_streams(source, held_out_documents=3)
    assert list(splits["train"].rows["input_ids"]) == tokens_of(streams["train"].documents())
    for split in ("validation", "test"):
        assert list(splits[split].rows["input_ids"]) == tokens_of(streams[split]["text"])
        assert len(splits[split].rows) == 3
    total = sum(len(split.rows) for split in splits.values())
    assert total == sum(map(len, TEXTS)) == sum(shard["documents"] for shard in note["shards"].values())
    assert len(note["shards"]) == 2 + (5 if source["path"] == "json" else 12)


@pytest.mark.parametrize(("words", "ids"), [(300, "uint16"), (299, "int32")])
def test_ids_are_as_wide_as_the_vocabulary(tmp_path, monkeypatch, words, ids):
    monkeypatch.setattr(token_shards, "SMALL", words)
    assert write(write_shards(tmp_path / "shards", "json", TEXTS), tmp_path / "tokens")["ids"] == ids
    rows = datasets.Dataset.from_file(str(tmp_path / "tokens" / "train-00000.arrow"))
    assert rows.features["input_ids"].feature.dtype == ids
    assert rows[0]["input_ids"] == tokens_of([TEXTS[0][6]])[0]


def test_blocks_of_shards_are_blocks_of_text(source, tmp_path, monkeypatch):
    """Also over the ends of record batches and shards."""
    monkeypatch.setattr(token_shards, "TOKENS", 100)
    write(source, tmp_path / "tokens")
    split = load_tokens(tmp_path / "tokens")["train"]
    stream = [token for ids in split.rows["input_ids"] for token in ids]
    blocks = TokenBlocks(split, TOKENIZER, 16)
    rows = blocks.rows(torch.arange(len(blocks)))
    assert blocks.num_tokens == len(stream)
    assert rows["input_ids"].flatten().tolist() == stream[: len(blocks) * 16]
    assert rows["shift_labels"].flatten().tolist() == stream[1 : len(blocks) * 16 + 1]
    depth = DepthSampler("fixed", mean=2)
    whole = TextBatches(blocks, TOKENIZER, 16, 4, 0, depth)
    ranks = [TextBatches(blocks, TOKENIZER, 16, 4, 0, depth, rank=rank, world=2) for rank in range(2)]
    for step in (0, 7, 500):
        assert torch.equal(torch.cat([rank[step]["input_ids"] for rank in ranks]), whole[step]["input_ids"])


@pytest.mark.parametrize(("rows", "window"), [(1, 4), (7, 7), (10, 4), (12, 4), (50, 1), (23, 100)])
def test_a_windowed_epoch_has_each_row_once(rows, window):
    these = WindowedEpochs(rows, 3, "rows", window)
    wanted = these.between(0, 5 * rows)
    epochs = wanted.split(rows)
    assert all(sorted(epoch.tolist()) == list(range(rows)) for epoch in epochs)
    assert rows < 5 or len({tuple(epoch.tolist()) for epoch in epochs}) == 5
    draw = np.random.default_rng(0)
    for start in draw.integers(4 * rows, size=20):
        count = int(draw.integers(1, rows + 1))
        assert torch.equal(WindowedEpochs(rows, 3, "rows", window).between(int(start), count), wanted[start:][:count])
    # A window is left when all of it was taken.
    begins = (wanted[:rows] // window).tolist()
    assert len([1 for one, two in pairwise(begins) if one != two]) == -(-rows // window) - 1


def test_an_interrupted_call_goes_on(source, tmp_path, monkeypatch):
    """Finished shards are not made again; the folder is then as if nothing had happened."""
    whole = write(source, tmp_path / "whole")
    plain, calls = token_shards.ShardWriter.write, []

    def interrupted(self, name, *arguments):
        calls.append(name)
        if len(calls) == 5:
            (self.folder / f".{name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return plain(self, name, *arguments)

    monkeypatch.setattr(token_shards.ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"parts lacks token shards, since `looped tokenize` was interrupted: run it"):
        load_tokens(tmp_path / "parts")
    before = times(tmp_path / "parts")
    assert len(before) == 4
    assert write(source, tmp_path / "parts") == whole
    assert before.items() <= times(tmp_path / "parts").items()
    assert not set(calls[5:]) & before.keys()
    finished = times(tmp_path / "parts")
    assert write(source, tmp_path / "parts") == whole
    assert times(tmp_path / "parts") == finished


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    source = write_shards(tmp_path / "shards", "json", TEXTS)
    assert write(source, tmp_path / "two", processes=2) == write(source, tmp_path / "one")


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_damaged_shard_is_named_and_written_again(source, tmp_path, harm):
    whole, folder = write(source, tmp_path / "tokens"), tmp_path / "tokens"
    digest = load_tokens(folder)["train"].digest
    shard = folder / "train-00001.arrow"
    shard.unlink() if harm == "missing" else shard.write_bytes(shard.read_bytes()[:-8])
    message = "is missing: run" if harm == "missing" else r"has \d+ bytes, and had \d+ when it was written: run"
    with pytest.raises(ValueError, match=rf"train-00001\.arrow {message} `looped tokenize` again"):
        load_tokens(folder)
    before = times(folder)
    assert write(source, folder) == whole
    assert load_tokens(folder)["train"].digest == digest
    assert {name for name, time in times(folder).items() if before.get(name) != time} == {shard.name}


def test_a_folder_of_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine holds something else than token shards: name a new folder"):
        write(source, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"notes\.txt is a file: name a new folder"):
        write(source, tmp_path / "mine" / "notes.txt")
    with pytest.raises(ValueError, match=r"there are no token shards in .*mine: write them by `looped tokenize`"):
        load_tokens(tmp_path / "mine")
    write(source, tmp_path / "tokens")
    wrong = write_shards(tmp_path / "wrong", "json", [*TEXTS, ["a", None]])
    with pytest.raises(ValueError, match=r"^column text of split train .* has None, which is no text"):
        write(wrong, tmp_path / "third")
    other = write_shards(tmp_path / "shards", source["path"], [["new", *TEXTS[0]], *TEXTS[1:]])
    with pytest.raises(ValueError, match=r"holds tokens of something else \(source: \w+ -> \w+\): name a new folder"):
        write(other, tmp_path / "tokens")
    (tmp_path / "tokens" / "tokens.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokens\.json is damaged .*: delete .*tokens, and write it again"):
        load_tokens(tmp_path / "tokens")
    with token_shards.claimed(tmp_path / "new"), pytest.raises(ValueError, match=r"another process writes to .*new"):
        write(source, tmp_path / "new")


def test_what_a_user_names_is_one_kind_of_file(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl", "d.md.gz"):
        (tmp_path / name).write_text("x")
    found = named_source([str(tmp_path / "*.txt")])
    assert found["path"] == "text"
    assert found["data_files"] == {"train": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]}
    assert named_source(["user/name"], "sample", "dev") == {"path": "user/name", "name": "sample", "split": "dev"}
    assert named_source([str(tmp_path / "d.md.gz")])["path"] == "text"
    with pytest.raises(ValueError, match=r"are of several kinds, json and text: name those of one"):
        named_source([str(tmp_path / "*.txt"), str(tmp_path / "c.jsonl")])
    with pytest.raises(ValueError, match=r"the files to tokenise: nothing matches '.*gone\.jsonl'"):
        named_source([str(tmp_path / "gone.jsonl")])
    with pytest.raises(ValueError, match=r"files have no parts and no splits of a data set"):
        named_source([str(tmp_path / "c.jsonl")], "sample")


def test_a_text_file_is_one_document(tmp_path):
    for number, texts in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(texts))
    write_tokens(
        named_source([str(tmp_path / "*.txt")]), TOKENIZER, "d", tmp_path / "t", held_out_documents=1, processes=1
    )
    rows = load_tokens(tmp_path / "t")["train"].rows["input_ids"]
    assert list(rows) == tokens_of(["\n\n".join(texts) for texts in TEXTS[2:]])
    assert json.loads((tmp_path / "t" / "tokens.json").read_text())["complete"]


def test_tokens_stay_in_their_files(tmp_path):
    """Arrow allocates nothing for them, and Python hardly anything, however many blocks are read."""
    source = write_shards(tmp_path / "shards", "json", [TEXTS[1] * 60] * 2)
    note = write(source, tmp_path / "tokens")
    gc.collect()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    blocks = TokenBlocks(load_tokens(tmp_path / "tokens")["train"], TOKENIZER, 16)
    for numbers in torch.arange(len(blocks)).split(50):
        blocks.rows(numbers)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pa.total_allocated_bytes() == before
    assert held < sum(shard["bytes"] for shard in note["shards"].values()) / 4
