"""Laws of conversations: what is a label is what assistants wrote, and a row that cannot be read is named."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch
from chat_toys import CHATML, FORGETS, MARKED, make_chats, make_tokenizer, write_chats

from data_builders import ChatBlocks, DepthSampler, TextBatches, encode_chats, load_task
from data_builders.chats import Template, read_chats

SHARES = {"validation_share": 0.2, "test_share": 0.2}


@pytest.fixture
def chats(tmp_path):
    """load(**fields): the splits of sixty conversations."""
    files = [write_chats(tmp_path / "chats.jsonl", make_chats())]
    return lambda **fields: load_task("text", "chats", **({"files": files} | SHARES | fields))


def written(chat: dict) -> list[str]:
    return [message["content"] + "<eos>" for message in chat["messages"] if message["role"] == "assistant"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_labels_are_what_assistants_wrote_and_the_ends_of_their_turns(template):
    """Whether the template marks them or they follow from the prompts before; the tokens are those of the template."""
    tokenizer = make_tokenizer(template)
    assert Template(tokenizer).marks == (template is MARKED)
    for chat in make_chats():
        ids, labels = Template(tokenizer).encode(chat["messages"], assistant_only=True)
        assert ids == tokenizer.apply_chat_template(chat["messages"], return_dict=True)["input_ids"]
        runs, inside = [], False
        for token, label in zip(ids, labels, strict=True):
            if label:
                runs = runs if inside else [*runs, []]
                runs[-1].append(token)
            inside = label
        assert [tokenizer.decode(run) for run in runs] == written(chat)
        assert Template(tokenizer).encode(chat["messages"], assistant_only=False) == (ids, [True] * len(ids))


def test_splits_hold_every_conversation_once_and_follow_the_file(chats, tmp_path):
    """Also packed, in another folder, twice in a file, or as rows of a data set; a changed file is read again."""
    splits = chats()
    found = [json.loads(row["text"]) for split in splits.values() for row in split]
    expected = [chat["messages"] for chat in make_chats()]
    alike = lambda rows: sorted(json.dumps(row, sort_keys=True) for row in rows)  # noqa: E731
    assert alike(found) == alike(expected)
    for rows in splits.values():
        for row in rows:
            assert json.loads(row["text"]) == expected[row["line"] - 1]
            assert row["source"] == "chats.jsonl"
    packed = tmp_path / "b" / "chats.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((tmp_path / "chats.jsonl").read_bytes() * 2))
    dataset = {"path": "json", "data_files": str(tmp_path / "chats.jsonl"), "split": "train"}
    for same in (chats(files=[str(packed)]), chats(files=[], dataset=dataset)):
        assert {name: rows["text"][:] for name, rows in same.items()} == {
            name: rows["text"][:] for name, rows in splits.items()
        }
    write_chats(tmp_path / "chats.jsonl", make_chats(seed=1))
    assert chats()["train"]["text"][:] != splits["train"]["text"][:]


@pytest.mark.parametrize("assistant_only", [True, False])
def test_blocks_are_the_conversations_one_after_the_other(chats, assistant_only):
    """Against a naive twin; a block without a label is left out, and a batch counts the labels of all ranks."""
    tokenizer, train, length = make_tokenizer(), chats()["train"], 12
    blocks = ChatBlocks(train, tokenizer, length, assistant_only)
    ids, labels = [], []
    for row in train:
        tokens, marks = Template(tokenizer).encode(json.loads(row["text"]), assistant_only)
        ids, labels = ids + tokens, labels + marks
    rows = []
    for at in range(0, len(ids) - length, length):
        kept = [ids[i + 1] if labels[i + 1] else -100 for i in range(at, at + length)]
        if any(label != -100 for label in kept):
            rows.append((ids[at : at + length], kept))
    assert blocks.num_tokens == len(ids)
    assert len(blocks) == len(rows)
    assert (len(rows) < (len(ids) - 1) // length) == assistant_only
    found = blocks.rows(torch.arange(len(blocks)))
    assert found["input_ids"].tolist() == [row for row, _ in rows]
    assert found["shift_labels"].tolist() == [kept for _, kept in rows]
    owners = [n for n, row in enumerate(train) for _ in Template(tokenizer).encode(json.loads(row["text"]), False)[0]]
    places = [at for at in range(0, len(ids) - length, length) if any(labels[at + 1 : at + length + 1])]
    for number, at in enumerate(places):
        assert blocks.documents(torch.tensor([number])).tolist() == sorted(set(owners[at : at + length + 1]))
    depth = DepthSampler(kind="fixed", mean=2, seed=0)
    whole = TextBatches(blocks, tokenizer, length, 4, 0, depth)
    halves = [TextBatches(blocks, tokenizer, length, 4, 0, depth, rank=rank, world=2) for rank in (0, 1)]
    for step in (0, 7):
        batch, parts = whole[step], [half[step] for half in halves]
        assert batch["num_labels"] == int((batch["shift_labels"] != -100).sum())
        assert {part["num_labels"] for part in parts} == {batch["num_labels"]}
        assert torch.cat([part["shift_labels"] for part in parts]).equal(batch["shift_labels"])


BAD = {
    "{": "line 2: no JSON",
    "[1, 2]": 'line 2: no object with "messages"',
    '{"messages": [{"role": "assistant", "content": "\\uD83D"}]}': r"line 2: \\ud83d is half of a character",
    '{"text": "a"}': 'line 2: no object with "messages"',
    '{"messages": []}': r"line 2: messages must be a list of messages, got \[\]",
    '{"messages": "hello"}': "line 2: messages must be a list",
    '{"messages": ["hello"]}': "line 2: message 1 must have a role and a content, got 'hello'",
    '{"messages": [{"role": "asistant", "content": "a"}]}': "line 2: message 1 must have a role of .*'asistant'",
    '{"messages": [{"role": "assistant", "content": null}]}': "line 2: message 1 must have a text as .*None",
    '{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}': "line 2: message 1 must have a text",
    '{"messages": [{"role": "user", "content": "a"}]}': "line 2: no message is of an assistant",
}


@pytest.mark.parametrize("line", BAD)
def test_a_row_that_is_no_conversation_is_named_by_file_and_line(line, chats, tmp_path):
    good = json.dumps(make_chats(1)[0])
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n\n{good}\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, {BAD[line]}.*(correct|write)"):
        chats(files=[str(tmp_path / "bad.jsonl")])


def test_a_row_of_a_data_set_is_named_by_its_number(chats, tmp_path):
    rows = [chat["messages"] for chat in make_chats(3)] + [[{"role": "user", "content": "alone"}]]
    datasets.Dataset.from_dict({"turns": rows}).to_parquet(tmp_path / "rows.parquet")
    dataset = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet"), "split": "train"}
    with pytest.raises(ValueError, match=r"row 3 \(the first is 0\), column turns .*no message is of an assistant"):
        chats(files=[], dataset=dataset, column="turns")


STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}" + CHATML
GLUED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\nlo'").replace(
    "message['role'] + '\n' + message['content']",
    "message['role'] + '\n' + ('lo' if message['role'] == 'assistant' else '') + message['content']",
)
REFUSED = {
    STRICT: ({"role": "system", "content": "be brief"}, "refuses it .begin with a user"),
    FORGETS: ({"role": "assistant", "content": "hm </think> yes"}, "no {% generation %}, and writes message 2"),
    GLUED: ({"role": "assistant", "content": "op reads"}, "the token 'oo' is the assistant's in part"),
}


@pytest.mark.parametrize("template", REFUSED, ids=["strict", "forgets", "glued"])
def test_what_the_template_does_not_tell_is_refused_by_file_and_line(template, tmp_path):
    first, message = REFUSED[template]
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    begun = [{"role": "user", "content": "a"}] if first["role"] == "assistant" else []
    row = {"messages": [*begun, first, {"role": "user", "content": "so"}, {"role": "assistant", "content": "c"}]}
    files = [write_chats(tmp_path / "rows.jsonl", [good, row])]
    lines = [{"text": document, "source": "rows.jsonl", "line": line} for line, document in read_chats(Path(files[0]))]
    split = datasets.Dataset.from_list(lines)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: the chat template .*{message}.*: correct the row"):
        encode_chats(split, make_tokenizer(template), assistant_only=True)
    begins = [{"role": "assistant", "content": "hello"}, *good["messages"]]
    with pytest.raises(ValueError, match="message 1 has no prompt before it"):
        Template(make_tokenizer()).encode(begins, assistant_only=True)
    assert any(Template(make_tokenizer(MARKED)).encode(begins, assistant_only=True)[1])
    if template is not STRICT:
        assert len(encode_chats(split, make_tokenizer(template), assistant_only=False)) == 2
