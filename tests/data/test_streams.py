"""Laws of streams: blocks against a naive twin, parts that share nothing, and a resumed stream is the same stream."""

import io

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from data_builders import DepthSampler, StreamBatches, load_streams, train_byte_bpe
from data_builders import streams as module
from data_builders.seeding import stream
from toys import make_texts, write_shards

ASCII = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"<eos>": 0, "a": 1}, [])), eos_token="<eos>")
DEPTH = DepthSampler("uniform", minimum=1, maximum=5, seed=3)
LENGTH = 16
TEXTS = make_texts()
TOKENIZER = train_byte_bpe([text for shard in TEXTS for text in shard], 300)


@pytest.fixture(params=["json", "parquet"])
def source(request, tmp_path):
    return write_shards(tmp_path / "shards", request.param, TEXTS)


def batches(source: dict, **fields) -> StreamBatches:
    fields = {"batch_size": 4, "seed": 7, "buffer": 8} | fields
    train = load_streams(source, held_out_documents=2)["train"]
    return StreamBatches(train, TOKENIZER, LENGTH, depth=DEPTH, **fields)


def taken(these: StreamBatches, number: int) -> list:
    return [these[step] for step in range(these.step, these.step + number)]


def same(one: list, two: list) -> bool:
    return len(one) == len(two) and all(
        a["num_loops"] == b["num_loops"]
        and a["num_labels"] == b["num_labels"]
        and torch.equal(a["input_ids"], b["input_ids"])
        and torch.equal(a["shift_labels"], b["shift_labels"])
        for a, b in zip(one, two, strict=True)
    )


def naive_blocks(texts: list[str]) -> list[list[int]]:
    tokens = [token for text in texts for token in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]]
    return [tokens[at : at + LENGTH + 1] for at in range(0, len(tokens) - LENGTH, LENGTH)]


def naive_draws(blocks: list[list[int]], buffer: int, rank: int) -> list[list[int]]:
    waiting, coming, found = blocks[:buffer], blocks[buffer:], []
    places = stream(7, "blocks of a stream", rank, 0).integers(buffer, size=module.DRAWS)
    for place, block in zip(places, coming, strict=False):
        found.append(waiting[place])
        waiting[place] = block
    return found


def documents_of(these: StreamBatches) -> list[str]:
    """The documents of one epoch of a part, in the order in which its reader has them."""
    lane = these.lanes[0] if these.lanes else these._lane(these.rank)
    lane.reader.state_dict()
    return [row["text"] for row in lane.reader.part if module.digest_of(row["text"]) not in these.text.held_out]


@pytest.mark.parametrize("buffer", [1, 8])
def test_batches_are_what_a_naive_twin_makes_of_the_documents(source, buffer):
    these = batches(source, buffer=buffer)
    wanted = naive_draws(naive_blocks(documents_of(these)), buffer, 0)
    got = taken(these, 40)
    rows = [
        [*ids, labels[-1]]
        for batch in got
        for ids, labels in zip(batch["input_ids"].tolist(), batch["shift_labels"].tolist(), strict=True)
    ]
    assert rows == wanted[:160]
    assert [batch["num_loops"] for batch in got] == [DEPTH(step) for step in range(40)]
    assert {batch["num_labels"] for batch in got} == {4 * LENGTH}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_share_no_document_and_hold_all(source, world):
    parts = [documents_of(batches(source, batch_size=6, rank=rank, world=world)) for rank in range(world)]
    found = [text for part in parts for text in part]
    held_out = load_streams(source, held_out_documents=2)
    assert len(found) == len(set(found))
    kept = {text for name in ("validation", "test") for text in held_out[name]["text"]}
    assert len(kept) == 4
    assert set(found) == {text for shard in TEXTS for text in shard} - kept


def kept(these: StreamBatches) -> dict:
    """Its state, through a file."""
    file = io.BytesIO()
    torch.save(these.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_stream_is_the_same_stream(source, world, workers):
    """At the beginning, within a shard, and epochs later; the state is plain values and tensors."""
    fields = {"batch_size": 16, "world": world, "workers": workers}
    whole = [batches(source, rank=rank, **fields) for rank in range(world)]
    wanted = [taken(these, 90) for these in whole]
    assert whole[0].lanes[0].reader.epoch > 0 or world == 2
    for stop in (1, 85) if workers else (0, 1, 30, 85):
        begun = [batches(source, rank=rank, **fields) for rank in range(world)]
        assert all(same(taken(these, stop), before[:stop]) for these, before in zip(begun, wanted, strict=True))
        states = [kept(these) for these in begun]
        for rank in range(world):
            resumed = batches(source, rank=rank, **fields)
            resumed.begin(states)
            assert same(taken(resumed, 90 - stop), wanted[rank][stop:])


def test_any_number_of_processes_that_divides_the_parts_sees_the_same_batches(source):
    """4 processes, then 2, then 1, then 4, against one process with the parts of 4."""

    def rows(ranks: list[StreamBatches], number: int) -> list[set]:
        found = [taken(these, number) for these in ranks]
        return [{tuple(row) for rank in found for row in rank[i]["input_ids"].tolist()} for i in range(number)]

    wanted = rows([batches(source, batch_size=8, parts=4)], 40)
    ranks = [batches(source, batch_size=8, rank=rank, world=4) for rank in range(4)]
    found = rows(ranks, 10)
    for world in (2, 1, 4):
        states = [kept(these) for these in ranks]
        ranks = [batches(source, batch_size=8, rank=rank, world=world) for rank in range(world)]
        for these in ranks:
            these.begin(states)
        found += rows(ranks, 10)
    assert found == wanted


def test_what_was_read_is_not_read_again(tmp_path, monkeypatch):
    """Nor tokenised. Shards that were read to their end may be lost; `datasets` opens the last of them once more."""
    source = write_shards(tmp_path / "shards", "json", TEXTS)
    seen = []
    plain = module.Tokenizing.__call__
    monkeypatch.setattr(
        module.Tokenizing,
        "__call__",
        lambda self, rows: (seen.extend(row["text"] for row in rows), plain(self, rows))[1],
    )
    these = batches(source)
    taken(these, 180)
    state = these.state_dict()
    before = list(dict.fromkeys(text[1] for text in seen))  # shards, in the order in which they were read
    assert len(before) > 3
    for shard in set(before[:-2]) - {"0"}:  # whose first row is looked at whenever a stream is opened
        (tmp_path / "shards" / f"{shard}.jsonl").write_text("this is no JSON\n" * 3)
    wanted = taken(batches(write_shards(tmp_path / "again", "json", TEXTS)), 200)[180:]
    seen.clear()
    held_out = {
        name: rows
        for name, rows in load_streams(write_shards(tmp_path / "again", "json", TEXTS), held_out_documents=2).items()
        if name != "train"
    }
    train = load_streams(source, held_out=held_out)["train"]
    resumed = StreamBatches(train, TOKENIZER, LENGTH, 4, seed=7, depth=DEPTH, buffer=8)
    resumed.begin([state])
    assert same(taken(resumed, 20), wanted)
    assert not {text[1] for text in seen} & set(before[:-1])
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("named", [(), ("validation",), ("test", "validation")])
def test_what_is_held_out_is_not_trained_on_wherever_it_stands(tmp_path, named):
    """Copies of held-out documents stand in every shard."""
    held_out = {name: [f"{name} {number}" for number in range(5)] for name in ("test", "validation")}
    first = [*held_out["test"], *held_out["validation"]]
    source = write_shards(
        tmp_path / "shards", "json", [[*first, *TEXTS[0], *first, " \n", first[0]], [*TEXTS[1], *first]]
    )
    files = {"train": source["data_files"]["train"]}
    for name in named:
        files[name] = write_shards(tmp_path / name, "json", [[*held_out[name], held_out[name][0]]])["data_files"][
            "train"
        ]
    splits = load_streams(
        source | {"data_files": files}, held_out_documents=5, **{f"{name}_split": name for name in named}
    )
    assert {name: list(splits[name]["text"]) for name in ("test", "validation")} == held_out
    assert list(splits["train"].documents()) == [*TEXTS[0], *TEXTS[1]]
    these = StreamBatches(splits["train"], TOKENIZER, LENGTH, 4, seed=7, depth=DEPTH, buffer=4)
    text = "".join(TOKENIZER.decode(batch["input_ids"].flatten()) for batch in taken(these, 100))
    assert these.lanes[0].reader.epoch > 0
    assert "validation" not in text
    assert "test" not in text


def test_seeds_and_epochs_have_their_own_order(source):
    def order(seed: int, number: int) -> list[str]:
        these = batches(source, seed=seed)
        these.lanes = [these._lane(0)]
        these.lanes[0].reader.epoch = number
        return documents_of(these)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(each) for each in orders}) == 4
    assert len({tuple(sorted(each)) for each in orders}) == 1


def test_a_stream_is_read_in_order(source):
    these = batches(source)
    taken(these, 2)
    for step in (1, 3):
        with pytest.raises(IndexError, match=rf"step 2 is next, got {step}"):
            these[step]
    with pytest.raises(
        ValueError, match=r"the stream has 1 parts, which 2 processes cannot share equally: start as many"
    ):
        batches(source, world=2).begin([these.state_dict()])
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of the 3 parts, got 4"):
        batches(source, parts=3).begin()


def test_the_digest_of_a_stream_is_of_its_beginning(tmp_path):
    def digest(name: str, shards: list) -> str:
        return load_streams(write_shards(tmp_path / name, "json", shards), held_out_documents=1)["train"].digest

    assert digest("a", TEXTS) == digest("b", TEXTS)
    assert len({digest("a", TEXTS), digest("c", TEXTS[:-1]), digest("d", [["new", *TEXTS[0]], *TEXTS[1:]])}) == 3


NUMBERS = [[1, 2], [3]]
WRONG = {
    "column": (TEXTS, {"column": "page"}, r"column must be one of text, row, got 'page'"),
    "numbers": (
        NUMBERS,
        {},
        r"column text of split train .* (holds Value\('int64'\), and no text|has 1, which is no)",
    ),
    "empty": ([*TEXTS, []], {}, r"5\.(jsonl|parquet) is empty: restore it, or leave it out"),
    "split": (TEXTS, {"validation_split": "dev"}, r"validation_split: Bad split: dev\. Available splits: \['train'\]"),
    "short": (TEXTS, {"held_out_documents": 10_000}, r"the split validation has no documents"),
    "shards": ([TEXTS[0][:40]], {"world": 2}, r"has 1 shards for 2 processes: split it into more files, start fewer"),
    "part": ([TEXTS[0][:2], [" "]], {"world": 2}, r"part 0 of split train .* have no documents but those that are"),
    "null": (
        [[*TEXTS[0], None]],
        {},
        r"column text of split train .* has None, which is no text: write it as one, or",
    ),
    "unknown": (
        [["a", "aa", "aaa"], ["aa日a"]],
        {"tokenizer": ASCII},
        r"no token for '日' in 'aa日a' \(split train of dataset",
    ),
}


@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize(("shards", "changed", "message"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_stream_is_told_in_one_sentence(tmp_path, kind, shards, changed, message):
    """Before the first update: by opening it, or by filling the buffer."""
    source, loading = write_shards(tmp_path / "shards", kind, shards), {"held_out_documents": 1}
    reading = {"tokenizer": TOKENIZER, "buffer": 200}
    for name, value in changed.items():
        (reading if name in ("world", "tokenizer") else loading)[name] = value

    def read():
        train = load_streams(source, **loading)["train"]
        StreamBatches(train, sequence_length=LENGTH, batch_size=2, seed=0, depth=DEPTH, **reading).begin()

    with pytest.raises(ValueError, match=message) as error:
        read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_shard_that_cannot_be_read_is_told_with_the_data_set(tmp_path, workers):
    source = write_shards(tmp_path / "shards", "json", TEXTS)
    (tmp_path / "shards" / "3.jsonl").write_text("no JSON\n")
    these = batches(source, workers=workers)
    with pytest.raises(ValueError, match=r"^dataset {'path': 'json', .*} cannot be read: [^\n]*$") as error:
        taken(these, 1000)
    assert "Traceback" not in str(error.value)


def test_a_stream_names_one_split(tmp_path):
    source = write_shards(tmp_path / "shards", "json", TEXTS)
    with pytest.raises(ValueError, match=r"add `split` to its arguments, such as split: train"):
        load_streams({name: value for name, value in source.items() if name != "split"})
