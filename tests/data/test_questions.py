"""Laws of questions from files and data sets: what is read, how it is dealt, and what is refused, with its place."""

import gzip
import json
from contextlib import suppress
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from chat_toys import make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders import (
    DepthSampler,
    OneLength,
    PackedSequences,
    SameAnswer,
    encode_questions,
    load_task,
    reader_of,
    sequence_bpe,
    sequence_tokenizer,
)
from data_builders.packing import IGNORED
from data_builders.questions import QuestionsConfig, whole_of
from data_builders.sequences import FEATURES

SHARES = {"validation_share": 0.2, "test_share": 0.2}
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "g": len(str(a)), "k": f"k{b % 2}"}
        for a in (1, 7, 10, 23, 105) for b in range(12)]  # fmt: skip


def write(path, rows=ROWS) -> str:
    """The rows in the form that the name of the file says."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif path.name.endswith((".csv", ".csv.gz")):
        text = "\n".join(",".join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]) + "\n"
    else:
        Dataset.from_list(rows).to_parquet(path)
        return str(path)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def asked(splits) -> dict[str, list[tuple]]:
    return {split: sorted(zip(*(rows[name][:] for name in FEATURES), strict=True)) for split, rows in splits.items()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet", "disk", "dataset"])
def test_every_source_gives_the_same_rows(name, tmp_path):
    known = load_task("sequence", "files", files=[write(tmp_path / "b.jsonl")], grade="g", kind="k", **SHARES)
    if name == "disk":
        Dataset.from_list(ROWS).save_to_disk(tmp_path / "disk")
        where = {"dataset": {"path": str(tmp_path / "disk")}}
    elif name == "dataset":
        where = {"dataset": {"path": "json", "data_files": str(tmp_path / "b.jsonl"), "split": "train"}}
    else:
        where = {"files": [write(tmp_path / name)]}
    assert asked(load_task("sequence", "files", grade="g", kind="k", **where, **SHARES)) == asked(known)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=40, max_size=80), st.integers(0, 5),
    st.none() | st.integers(0, 4),
)  # fmt: skip
def test_a_prompt_is_in_one_split_and_a_row_comes_once(tmp_path_factory, pairs, seed, train_grades):
    """Also if the same prompt has several answers; rows above `train_grades` are in test alone."""
    rows = [{"prompt": f"p{p}", "answer": f"a{a}", "grade": p % 6} for p, a in pairs]
    file = write(tmp_path_factory.mktemp("rows") / "a.jsonl", rows)
    fields = {"files": [file], "grade": "grade", "seed": seed, "validation_share": 0.3, "test_share": 0.3}
    fields |= {} if train_grades is None else {"train_grades": train_grades}
    dealt = QuestionsConfig(name="files", **fields)
    with suppress(ValueError):  # too few rows for a split
        splits = dealt.deal()
        check_dealt(splits, rows, train_grades)


def check_dealt(splits, rows, train_grades):
    prompts = {split: {row["prompt"] for row in part} for split, part in splits.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]
    kept = [(row["prompt"], row["answer"]) for part in splits.values() for row in part]
    assert sorted(kept) == sorted({(row["prompt"], row["answer"]) for row in rows})
    if train_grades is not None:
        assert max(row["grade"] for row in splits["train"]) <= train_grades


def test_rows_that_the_user_holds_out_are_not_trained_on(tmp_path):
    files = [write(tmp_path / "a.jsonl")]
    tested = [write(tmp_path / "t.jsonl", [{"prompt": row["prompt"], "answer": "?"} for row in ROWS[:9]])]
    splits = load_task("sequence", "files", files=files, test_files=tested, validation_share=0.2)
    assert sorted(splits["test"]["prompt"][:]) == sorted(row["prompt"] for row in ROWS[:9])
    rest = {*splits["train"]["prompt"][:], *splits["validation"]["prompt"][:]}
    assert rest == {row["prompt"] for row in ROWS[9:]}


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize(("counted", "length"), [("characters", 6), ("words", 3)])
def test_a_length_is_a_column_or_counted(column, counted, length, tmp_path):
    rows = [{"prompt": f"a bc x{n:02}", "answer": "y"} | ({"length": n} if column else {}) for n in range(60)]
    splits = load_task(
        "sequence", "files", files=[write(tmp_path / "a.jsonl", rows)], grade="length", counted=counted, **SHARES
    )
    for row in splits["train"]:
        assert row["grade"] == (int(row["prompt"][-2:]) if column else length)


BAD = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"answer": "  "}, "the answer is empty"),
    ({"answer": None}, "answer None is no text"),
    ({"prompt": ["a"]}, "prompt .* is no text"),
    ({"answer": 1.5}, "answer 1.5 is no text"),
    ({"g": 1.5}, "the grade 1.5 is no whole number"),
    ({"g": "hard"}, "the grade 'hard' is no whole number"),
    ({"g": True}, "the grade True is no whole number"),
    ({"g": -1}, "the grade -1 is no whole number"),
    ({"g": None}, "the grade None is no whole number"),
    ({"k": 2.5}, "kind 2.5 is no text"),
    ({"k": "a\nb"}, "kind 'a.nb' has several lines"),
    ({"prompt": "1+1=\ud83d"}, r"\\ud83d is half of a character"),
    ({"answer": "\udcff2"}, r"\\udcff is half of a character"),
    ("prompt", "there is no 'prompt', and the row has answer, g, k"),
    ("g", "there is no 'g'"),
    ("k", "there is no 'k'"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_a_bad_row_is_refused_with_file_line_and_remedy(change, said, tmp_path):
    """A dict changes a row, a name takes a column out of it."""
    rows = [dict(row) for row in ROWS]
    if isinstance(change, str):
        del rows[4][change]
    else:
        rows[4] |= change
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 5: {said}.*: .*(take|write|add|name|correct|fill)"):
        load_task("sequence", "files", files=[file], grade="g", kind="k", **SHARES)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n\n{"prompt": \n', "line 3: no JSON"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n[1]\n', "line 2: no object"),
        ("a.csv", "prompt,answer\na,b\na\n", "line 3: the row has 1 cells"),
        ("a.csv", 'prompt,answer\na,"b\n', "line 2: .* no CSV"),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: the column 'prompt' is there twice"),
        ("a.parquet", "PAR1 no", "cannot be read as Parquet"),
        ("a.txt", "a", "is not one of .jsonl"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_task("sequence", "files", files=[str(tmp_path / name)], **SHARES)


@given(st.one_of(st.integers(), st.text(max_size=4), st.floats(), st.booleans(), st.none()))
def test_a_grade_is_a_whole_number_from_0_on_or_its_digits(value):
    found = whole_of(value)
    right = type(value) is int or (isinstance(value, str) and value.strip().isascii() and value.strip().isdigit())
    assert found == (int(value) if right and 0 <= int(value) < 2**31 else None)


# Tokens

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12)


@settings(max_examples=40)
@given(TEXT, TEXT, st.sampled_from(["characters", "digits"]))
def test_a_cut_text_comes_back_and_a_prompt_ends_in_the_readout(prompt, answer, cut):
    tokenizer = sequence_tokenizer([prompt, answer], cut)
    ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<ans>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    if cut == "characters":
        assert len(ids) == len(prompt) + 1


def rows_of(pairs, grades=None) -> Dataset:
    grades = grades or [0] * len(pairs)
    rows = [{"prompt": p, "answer": a, "grade": g, "kind": ""} for (p, a), g in zip(pairs, grades, strict=True)]
    return Dataset.from_list(rows, features=FEATURES)


def test_a_row_is_its_prompt_its_answer_and_the_end():
    tokenizer = sequence_tokenizer(["ab", "c"], "characters")
    rows = encode_questions(rows_of([("ab", "ca")]), reader_of(tokenizer))
    ids, labels = rows.row(0)
    _, eos, ans, a, b, c = range(6)
    assert ids.tolist() == [a, b, ans, c, a]
    assert labels.tolist() == [IGNORED, IGNORED, c, a, eos]
    assert rows.row(0, learn_all=True)[1].tolist() == [b, ans, c, a, eos]
    in_place = sequence_tokenizer(["ab", "c"], "characters", readout=False)
    ids, labels = encode_questions(rows_of([("ab", "ca")]), reader_of(in_place, "in_place")).row(0)
    assert (ids.tolist(), labels.tolist()) == ([a, b], [c, a])


@pytest.mark.parametrize(
    ("pair", "settings_", "said"),
    [
        (("a<eos>b", "b"), {}, None),
        (("ab", "a<eos>"), {}, "the answer 'a<eos>' has the token '<eos>' in it"),
        (("abz", "b"), {}, "no token for 'z' in 'abz'"),
        (("ab", "bz"), {}, "no token for 'z' in 'bz'"),
        (("ab" * 9, "b"), {"longest": 16, "limit": "data.sequence_length"}, r"19 and 1 tokens, and .* 16 .data\.seq"),
        (("ab", "b" * 16), {"longest": 16}, "3 and 16 tokens, and a row may read 16"),
        (("ab", "a"), {"answers": "in_place"}, "as many tokens as its prompt, and these are 1 and 2"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_place(pair, settings_, said):
    answers = settings_.pop("answers", "after") if settings_ else "after"
    tokenizer = sequence_tokenizer(["ab<eos>"], "characters", readout=answers == "after")
    split = rows_of([("ab", "ba"), pair])
    places = split.add_column("source", ["f.jsonl"] * 2).add_column("line", [3, 8])
    if said is None:
        encode_questions(places, reader_of(tokenizer, answers), **settings_)
        return
    with pytest.raises(ValueError, match=rf"f\.jsonl, line 8: .*{said}.*take it out"):
        encode_questions(places, reader_of(tokenizer, answers), **settings_)


@pytest.mark.parametrize("answers", ["after", "in_place"])
@pytest.mark.parametrize("word", ["<pad>", "<ans>"])
def test_an_answer_has_no_token_that_is_left_out_of_what_is_said(answers, word):
    pairs = [("a b", "b a"), ("b a", f"{word} b")]
    reader = reader_of(sequence_tokenizer(["a b", word], "words", readout=answers == "after"), answers)
    with pytest.raises(ValueError, match=f"prompt 'b a': the answer '{word} b' has the token '{word}' in it"):
        encode_questions(rows_of(pairs), reader)


def test_byte_level_bpe_says_the_fewest_entries_that_it_takes():
    with pytest.raises(ValueError, match="must be at least 259, got 258"):
        sequence_bpe(["ab"], 258)
    assert len(sequence_bpe(["ab"], 259)) == 259


def test_byte_level_bpe_knows_every_character():
    tokenizer = sequence_bpe(["some text, some more"], 300)
    rows = encode_questions(rows_of([("\u00e9\u4e2d z", "\u00fc")]), reader_of(tokenizer))
    ids, labels = rows.row(0)
    assert tokenizer.decode(ids[: rows.firsts[0] + 1], skip_special_tokens=True) == "\u00e9\u4e2d z"
    assert tokenizer.decode(labels[rows.firsts[0] :], skip_special_tokens=True) == "\u00fc"


@pytest.mark.parametrize("chat", ["prompts", "messages"])
def test_a_chat_is_what_the_template_makes_of_it(chat):
    """The prompt as it is asked, then what the template lets the assistant say, then the end of the turn."""
    tokenizer = make_tokenizer()
    prompt = "Hi" if chat == "prompts" else json.dumps([{"role": "user", "content": "Hi"}])
    rows = encode_questions(rows_of([(prompt, "Yes")]), reader_of(tokenizer, chat=chat))
    ids, labels = rows.row(0)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    first = int(rows.firsts[0])
    assert ids[: first + 1].tolist() == asked
    assert labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(labels[first:], skip_special_tokens=True).strip() == "Yes"


@pytest.mark.parametrize("prompt", ["[MAX 2 9 ] =", "[1, 2]", "[", '["a"]', '[{"role": "user"}]', '"a"', "{}"])
def test_what_is_no_conversation_is_asked_as_a_users_message(prompt):
    reader = reader_of(make_tokenizer(), chat="messages")
    assert reader.asked(prompt) == [{"role": "user", "content": prompt}]


@pytest.mark.parametrize(("said", "worth"), [("7", 1.0), (" 7\n", 1.0), ("77", 0.0), ("", 0.0)])
def test_the_same_answer_is_right_whatever_white_space_is_around_it(said, worth):
    assert SameAnswer().score({"answer": " 7"}, said) == worth


# Batches

LENGTHS = [2, 2, 3, 5, 5, 5, 8, 9, 9, 4, 4, 2]


@pytest.fixture(scope="module")
def rows():
    pairs = [("abc"[i % 3] * length, "ab"[: 1 + i % 2]) for i, length in enumerate(LENGTHS)]
    return encode_questions(rows_of(pairs, LENGTHS), reader_of(sequence_tokenizer(["abc"], "characters")))


def batches(rows, kind: str, seed: int = 0, **settings):
    depth = DepthSampler("uniform", minimum=1, maximum=4, seed=seed)
    if kind == "packed":
        return PackedSequences(rows, 12, 4, seed, depth, **settings)
    return OneLength(rows, 4, seed, depth, **settings)


def segments(batch) -> list[tuple]:
    """(tokens, labels) of every row in a batch, with the padding left out, sorted."""
    found = []
    for at in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][at], batch["shift_labels"][at]
        positions = batch["position_ids"][at] if "position_ids" in batch else torch.arange(len(ids))
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in pairwise(starts):
            part = labels[start:stop]
            if (part != IGNORED).any():  # otherwise it is padding
                end = int((part != IGNORED).nonzero().max()) + 1
                found.append((tuple(ids[start : start + end].tolist()), tuple(part[:end].tolist())))
    return sorted(found)


@settings(max_examples=30)
@given(st.sampled_from(["packed", "one_length"]), st.integers(0, 3), st.integers(0, 40), st.booleans())
def test_ranks_together_see_what_one_would(rows, kind, seed, step, learn_all):
    whole = batches(rows, kind, seed, learn_all=learn_all)[step]
    parts = [batches(rows, kind, seed, learn_all=learn_all, rank=rank, world=2)[step] for rank in range(2)]
    assert sorted(chain.from_iterable(map(segments, parts))) == segments(whole)
    for name in ("num_loops", "num_labels", "grade"):
        assert {part[name] for part in parts} == {whole[name]}
    labels = sum(int((part["shift_labels"] != IGNORED).sum()) for part in parts)
    assert labels == whole["num_labels"]


@pytest.mark.parametrize("kind", ["packed", "one_length"])
def test_every_row_comes_once_per_epoch_and_is_whole(rows, kind):
    made, known = batches(rows, kind), [rows.row(number) for number in range(len(rows))]
    known = sorted((tuple(ids.tolist()), tuple(labels.tolist())) for ids, labels in known)
    if kind == "packed":
        assert sorted(chain.from_iterable(segments(made[step]) for step in range(3))) == known
    for step in range(6):
        assert set(segments(made[step])) <= set(known)


@pytest.mark.parametrize("kind", ["packed", "one_length"])
def test_only_rows_of_the_stage_are_drawn_and_loops_follow_the_grade(rows, kind):
    made = batches(rows, kind, grades=[2, 3], at_least_grade=True)
    for step in range(12):
        batch = made[step]
        assert batch["grade"] in (2, 3)
        assert batch["num_loops"] >= batch["grade"]
        assert batch["num_loops"] == max(made.depth(step), batch["grade"])
    assert np.isin(rows.grades[made.numbers], [2, 3]).all()
