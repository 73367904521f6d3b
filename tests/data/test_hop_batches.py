"""Laws of hop batches: rows say what the text says, a batch follows from seed and step, every row comes once."""

import re
from collections import Counter

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from data_builders import (
    DepthSampler,
    HopBatches,
    dataset_tokenizer,
    encode_groups,
    encode_hops,
    encode_rows,
    hop_tokenizer,
    load_task,
)
from modeling_looped import LoopedConfig, LoopedForCausalLM
from toys import FP32

PAPER_DEPTH = {"kind": "poisson", "rate": 4, "minimum": 2, "maximum": 8}


@pytest.fixture(scope="module")
def dataset():
    return load_task("khop", "quickstart", train_hops=3, max_hops=8)


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return dataset_tokenizer(dataset)


@pytest.fixture
def make_batches(dataset, tokenizer):
    def make(batch_size: int = 32, seed: int = 0, **options) -> HopBatches:
        return HopBatches(dataset["train"], tokenizer, batch_size, seed, DepthSampler(**PAPER_DEPTH), **options)

    return make


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) if torch.is_tensor(first[key]) else first[key] == second[key]
        for key in first
    )


def row_numbers(batches: HopBatches, batch: dict) -> list[int]:
    """Rows of the split (within their hop count), found again by their tokens."""
    places = {tuple(row): place for place, row in enumerate(batches._rows[batch["hops"]][0].tolist())}
    return [places[tuple(row)] for row in batch["input_ids"].tolist()]


def test_a_batch_names_its_rows(make_batches, dataset, tokenizer):
    batches = make_batches()
    for step in range(8):
        named = dataset["train"].select(batches.chosen(step))
        assert tokenizer(list(named["text"]))["input_ids"] == batches[step]["input_ids"].tolist()


FACTS = [{"text": "e0 r0", "answer": "e1", "hops": 1}, {"text": "e1 r1", "answer": "e0", "hops": 1}]
CHAIN = {"text": "e0 r0 r1", "answer": "e0", "hops": 2}
READERS = {
    "tokenizer": lambda rows: dataset_tokenizer({"train": rows}),
    "hops": lambda rows: encode_hops(rows, hop_tokenizer(2, 2)),
    "rows": lambda rows: encode_rows(rows, hop_tokenizer(2, 2)),
}


class Rows:
    """The simplest collate function that reaches a worker."""

    def __call__(self, rows: list) -> dict:
        return {"rows": rows}


def test_padding_to_a_length_changes_the_work_and_not_the_answer(dataset, tokenizer, make_batches):
    """The paper's code pads every row to 50 and reads at the end; one readout token says the same for less."""
    config = LoopedConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_attention_heads=2, num_core_layers=1,
        num_loops=3, residual_init="normal", initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LoopedForCausalLM(config).eval()
    for step in range(4):
        short, padded = make_batches()[step], make_batches(pad_to=12)[step]
        assert padded["input_ids"].shape == (32, 12)
        logits = [
            model(batch["input_ids"], batch.get("attention_mask"), logits_to_keep=1).logits
            for batch in (short, padded)
        ]
        torch.testing.assert_close(*logits, **FP32)
        # Both kinds of masked copies must be there to be ignored, or this test cannot fail.
        assert (padded["attention_mask"].sum(1) == short["input_ids"].shape[1]).all()


def test_padding_needs_room_and_a_readout_token(dataset, tokenizer, make_batches):
    with pytest.raises(ValueError, match="at least 5, the longest row"):
        make_batches(pad_to=4)
    last = dataset_tokenizer(dataset, readout="last")
    with pytest.raises(ValueError, match="needs a readout token"):
        HopBatches(dataset["train"], last, 32, 0, DepthSampler(**PAPER_DEPTH), pad_to=12)


def test_without_a_readout_token_a_row_ends_at_its_last_relation(dataset, tokenizer):
    """Then a fact and the first hop of a chain are the same tokens at the same places."""
    last = dataset_tokenizer(dataset, readout="last")
    assert last.get_vocab() == tokenizer.get_vocab()
    rows, with_token = encode_hops(dataset["test"], last), encode_hops(dataset["test"], tokenizer)
    for k in rows:
        assert torch.equal(rows[k][0], with_token[k][0][:, :-1])
        assert torch.equal(rows[k][1], with_token[k][1])
        assert (
            rows[k][0][0].tolist()
            == last(dataset["test"].filter(lambda row, k=k: row["hops"] == k)[0]["text"])["input_ids"]
        )


def test_encoding_equals_the_tokenizer_row_by_row(dataset, tokenizer):
    for hops, (input_ids, answers) in encode_hops(dataset["test"], tokenizer).items():
        rows = [row for row in dataset["test"].to_list() if row["hops"] == hops]
        assert input_ids.tolist() == [tokenizer(row["text"])["input_ids"] for row in rows]
        assert answers.tolist() == [tokenizer.convert_tokens_to_ids(row["answer"]) for row in rows]
        assert input_ids.dtype == answers.dtype == torch.long


def test_groups_are_hops_and_split_kind(dataset, tokenizer):
    groups = encode_groups(dataset["test"], tokenizer)
    assert list(groups) == [(2, "id"), (3, "id"), *((hops, "ood") for hops in range(4, 9))]
    by_hops = encode_hops(dataset["test"], tokenizer)
    assert all(torch.equal(groups[key][0], by_hops[key[0]][0]) for key in groups)


def test_encoding_keeps_a_chosen_order_and_chosen_hops(dataset, tokenizer):
    """A shuffled or selected split is an index over its table, which a shortcut to the table would ignore."""
    shuffled = dataset["test"].shuffle(seed=1).select(range(200))
    encoded = encode_hops(shuffled, tokenizer, hops=[4])
    assert list(encoded) == [4]
    texts = [text for text, hops in zip(shuffled["text"], shuffled["hops"], strict=True) if hops == 4]
    assert tokenizer.batch_decode(encoded[4][0], skip_special_tokens=True) == texts


def test_encoding_raises_for_what_it_cannot_say(dataset):
    with pytest.raises(ValueError, match=r"no token for 'e1.'"):
        encode_hops(dataset["test"], hop_tokenizer(10, 4))
    crooked = Dataset.from_dict({"text": ["e1 r0", "e1 r0 r1 r2"], "answer": ["e1", "e2"], "hops": [2, 2]})
    with pytest.raises(ValueError, match="a row of 2 hops must be an entity and 2 relations"):
        encode_hops(crooked, hop_tokenizer(10, 4))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("column", ["text", "answer", "hops"])
@pytest.mark.parametrize("value", [None, 2.5, ["e0", "r0"], "e0 r0 r1 r0", True, {}, "missing"], ids=repr)
def test_a_row_of_ones_own_that_is_none_is_named(reader, column, value):
    """By its number, its column and its value, wherever such rows are read first."""
    if value == "missing":
        rows = [{name: each for name, each in row.items() if name != column} for row in [*FACTS, CHAIN]]
        message = f"no column {column}"
    elif column != "answer" or not isinstance(value, str):
        row = 2 if value is None or (column == "text" and isinstance(value, str)) else 0
        rows = [*FACTS, CHAIN | {column: value}] if row else [each | {column: value} for each in [*FACTS, CHAIN]]
        message = rf"row {row} \(the first is 0\), column {column}: {re.escape(repr(value))}"
    else:
        rows = [*FACTS, CHAIN | {"answer": value}]
        message = "no token for"
        if reader == "tokenizer":
            return
    with pytest.raises(ValueError, match=message):
        READERS[reader](Dataset.from_list(rows))


@pytest.mark.parametrize("word", ["alice", "e", "e01", "e-1", "x0", "e99999999", "E0"])
def test_a_word_that_is_no_entity_and_no_relation_is_named(word):
    for fact in ({"text": f"{word} r0", "answer": "e0"}, {"text": f"e0 {word}", "answer": "e0"}):
        with pytest.raises(ValueError, match=rf"'{word}' is no word of a fact: entities are e0"):
            dataset_tokenizer({"train": Dataset.from_list([*FACTS, fact | {"hops": 1}])})
    with pytest.raises(ValueError, match="train has no facts"):
        dataset_tokenizer({"train": Dataset.from_list([CHAIN])})


def test_rows_of_a_batch_have_one_length_and_end_in_the_readout_token(make_batches, tokenizer):
    batches = make_batches()
    for step in range(50):
        batch = batches[step]
        assert batch["input_ids"].shape == (32, batch["hops"] + 2)
        assert batch["shift_labels"].shape == (32, 1)
        assert (batch["input_ids"][:, -1] == tokenizer.convert_tokens_to_ids("<ans>")).all()
        assert batch["logits_to_keep"] == 1
        assert batch["num_loops"] == DepthSampler(**PAPER_DEPTH)(step)


def test_labels_are_the_answers_of_their_rows(make_batches, dataset, tokenizer):
    answers = dict(zip(dataset["train"]["text"], dataset["train"]["answer"], strict=True))
    for step in range(10):
        batch = make_batches()[step]
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert tokenizer.batch_decode(batch["shift_labels"]) == [answers[text] for text in texts]


def test_resuming_equals_never_stopping(make_batches):
    """Item s of a fresh object is item s of one that was asked for every step before, also far out."""
    walked = make_batches()
    for step in range(5_000):
        batch = walked[step]
        if step in (0, 7, 4_095, 4_096, 4_999):
            assert equal(make_batches()[step], batch)
    assert equal(walked[3], make_batches()[3])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_partition_the_global_batch(make_batches, world):
    """Also across the end of an epoch: 80 atomic rows are 2.5 batches of 32."""
    ranks = [make_batches(rank=rank, world=world) for rank in range(world)]
    for step in range(40):
        whole, shares = make_batches()[step], [rank[step] for rank in ranks]
        for key in ("input_ids", "shift_labels"):
            assert torch.equal(torch.cat([share[key] for share in shares]), whole[key])
        assert all(share[key] == whole[key] for share in shares for key in ("num_loops", "hops", "logits_to_keep"))


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "steps"), [(32, 400), (7, 5_000), (200, 400)])
def test_every_row_comes_once_per_epoch(make_batches, batch_size, steps):
    """For batches smaller than an epoch, ones that straddle its end, and ones of several epochs; for a long time."""
    batches = make_batches(batch_size=batch_size)
    seen = {k: [] for k in batches.hops}
    for step in range(steps):
        batch = batches[step]
        seen[batch["hops"]] += row_numbers(batches, batch)
    for k, rows in seen.items():
        epochs = [rows[i : i + batches.num_rows[k]] for i in range(0, len(rows), batches.num_rows[k])][:-1]
        assert epochs
        assert all(sorted(epoch) == list(range(batches.num_rows[k])) for epoch in epochs)
        assert len(epochs) < 2 or epochs[0] != epochs[1]


def test_depth_reaches_the_hops_where_asked(make_batches):
    """Drawn apart, some batches ask for more hops than loops; raised, none does, and the others keep their depth."""
    apart, reaching = make_batches(), make_batches(at_least_hops=True)
    pairs = [(apart[step], reaching[step]) for step in range(200)]
    assert any(one["num_loops"] < one["hops"] for one, _ in pairs)
    assert all(other["num_loops"] == max(one["num_loops"], one["hops"]) for one, other in pairs)


@pytest.mark.parametrize("weighting", ["rows", "uniform"])
def test_hops_are_drawn_by_their_rows_or_alike(make_batches, weighting):
    batches = make_batches(weighting=weighting)
    hops_of_steps = [batches[step]["hops"] for step in range(8_192)]
    assert hops_of_steps[:4_096] != hops_of_steps[4_096:]
    drawn = Counter(hops_of_steps)
    rows = {1: 80, 2: 240, 3: 960} if weighting == "rows" else dict.fromkeys((1, 2, 3), 1)
    for hops, weight in rows.items():
        share = weight / sum(rows.values())
        assert abs(drawn[hops] / 8_192 - share) < 5 * (share * (1 - share) / 8_192) ** 0.5


def test_seeds_differ_and_hops_can_be_chosen(make_batches):
    assert not equal(make_batches(seed=0)[0], make_batches(seed=1)[0])
    assert {make_batches(hops=[1, 2])[step]["hops"] for step in range(50)} == {1, 2}


def test_data_loader_reads_steps_in_order(make_batches):
    loader = DataLoader(make_batches(), batch_size=None, sampler=range(3, 6), num_workers=0)
    assert all(equal(batch, make_batches()[step]) for step, batch in zip(range(3, 6), loader, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 30, "world": 4}, "batch_size must be a positive multiple of the 4 ranks, got 30"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"rank": 2, "world": 2}, "rank must be in 0 .. 1, got 2"),
        ({"hops": [1, 9]}, r"no rows of \[9\] hops; it has \[1, 2, 3\]"),
        ({"weighting": "size"}, "weighting must be rows or uniform"),
    ],
)
def test_bad_batches_raise(make_batches, options, message):
    with pytest.raises(ValueError, match=message):
        make_batches(**options)
