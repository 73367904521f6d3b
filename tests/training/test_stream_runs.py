"""Runs on a stream of text: resumed, in two processes, measured without the stream, and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_builders import train_byte_bpe
from looplab.cli import main as looped
from toy_runs import ended, failure, measured, reset_accelerator, rows_of, train_in
from toys import ROOT, make_texts, write_shards
from train import main, read_recipe

TEXTS = make_texts()
FLAGS = ("--data.vocab_size=null", "--data.files=null", "--data.overrides={}", "--model.residual_dropout=0.2")


@pytest.fixture
def flags(tmp_path):
    """flags("name", "--field=value", ...): the smoke recipe of text on a stream of five shards."""
    dataset = write_shards(tmp_path / "shards", "json", TEXTS)
    train_byte_bpe([text for shard in TEXTS for text in shard], 300).save_pretrained(tmp_path / "tokenizer")
    stream = (f"--data.dataset={json.dumps(dataset)}", f"--data.tokenizer={tmp_path / 'tokenizer'}")
    sizes = ("--data.shuffle_blocks=8", "--data.held_out_documents=20", "--data.sequence_length=16")
    return lambda name, *more: [f"--output_dir={tmp_path}", f"--name={name}", *FLAGS, *stream, *sizes, *more]


def run(flags: list[str]) -> dict:
    summary = main(read_recipe(ROOT / "recipes" / "smoke_text.yaml", flags))
    reset_accelerator()
    return summary


def back_to(run: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of that step."""
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_on_a_stream_equals_an_uninterrupted_one(flags, tmp_path, workers):
    more = ("--max_steps=60", "--check_every=20", "--checkpoint_every=20", f"--data.workers={workers}")
    summary = run(flags("whole", *more))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    back_to(tmp_path / "parts", 40)
    assert run(flags("parts", *more))["stream_epochs"] == summary["stream_epochs"]
    for key in ("loss", "held_out", "grad_norm"):
        assert measured(tmp_path / "parts", key) == measured(tmp_path / "whole", key)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_one_process_goes_on_with_the_parts_of_two(flags, tmp_path):
    """As if there were two still, and as one process with two parts from the beginning."""
    more = ["--max_steps=20", "--checkpoint_every=10", "--optim.kind=adamw", "--model.residual_dropout=0"]
    more += ["--log_every=1", "--data.workers=1"]
    ended(train_in(2, tmp_path, "smoke_text.yaml", *flags("two", *more)))
    shutil.copytree(tmp_path / "two", tmp_path / "parts")
    back_to(tmp_path / "parts", 10)
    run(flags("parts", *more))
    run(flags("one", "--data.parts=2", *more))
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("two", "parts", "one")]
    assert losses[0][:10] == losses[1][:10]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_a_run_needs_its_stream_no_more_when_it_is_trained(flags, tmp_path, capfd):
    """What is held out lies in the run; `--dataset` is refused. A stream that has changed is another."""
    run(flags("run", "--max_steps=10", "--checkpoint_every=5"))
    held_out = {path.name for path in (tmp_path / "run" / "data").iterdir()}
    assert held_out == {"validation.parquet", "test.parquet"}
    (tmp_path / "shards").rename(tmp_path / "gone")
    assert looped(["eval", str(tmp_path / "run"), "--loops", "1", "2"]) == 0
    assert [row["loops"] for row in rows_of(tmp_path / "run" / "text.jsonl")] == [1, 2]
    assert looped(["ask", str(tmp_path / "run"), "--new-tokens", "2"]) == 0
    said = failure(capfd, "publish", tmp_path / "run", "--repo-id", "u/x", "--dataset", "--dry-run")
    assert "--dataset publishes rows, and this run was trained on a stream" in said
    more = flags("run", "--max_steps=12")
    with pytest.raises(ValueError, match="cannot be read"):
        run(more)
    write_shards(tmp_path / "shards", "json", [["other", *TEXTS[0]], *TEXTS[1:]])
    with pytest.raises(ValueError, match=r"the data of .* have changed since it began \(changed split: train\)"):
        run(more)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--data.vocab_size=300",
            r"data\.vocab_size learns a tokenizer from the whole text, which a stream never has",
        ),
        ("--data.files=[a.txt]", r"data\.files and data\.dataset both name the text"),
        (
            "--data.overrides={document_characters: 9}",
            r"data\.overrides\.document_characters is not for a stream, whose",
        ),
        ("--data.overrides={column: 3}", r"data\.overrides\.column must be a name, got 3"),
        ("--data.overrides={column: page}", r"column must be one of text, row, got 'page'"),
        ("--data.assistant_only_loss=true", r"data\.assistant_only_loss is for conversations"),
        ("--data.sequence_length=5000", r"the split validation has \d+ tokens, too few for a block of 5000"),
    ],
)
def test_a_recipe_that_a_stream_cannot_have_is_refused(flags, tmp_path, flag, message):
    with pytest.raises(ValueError, match=message):
        run(flags("run", flag))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_fields_of_a_stream_are_refused_without_one(text):
    with pytest.raises(ValueError, match=r"data\.workers is for a stream, a data\.dataset with streaming: true"):
        text("run", "--data.workers=1")


def test_a_part_without_documents_is_told_before_the_first_update(flags, tmp_path):
    for file in (tmp_path / "shards").iterdir():
        file.write_text(json.dumps({"text": " ", "row": 1}) + "\n")
    (tmp_path / "shards" / "0.jsonl").write_text(
        "".join(json.dumps({"text": text, "row": 1}) + "\n" for text in TEXTS[0][:40])
    )
    with pytest.raises(ValueError, match=r"part 0 of split train .* have no documents but those that are held out"):
        run(flags("run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Token shards

SHARDS = ("--data.vocab_size=null", "--data.files=null", "--data.overrides={}", "--data.sequence_length=16")


@pytest.fixture
def tokens(flags, tmp_path, capfd):
    """A folder that `looped tokenize` has written."""
    line = [
        "tokenize",
        str(tmp_path / "shards" / "*.jsonl"),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--processes=1",
    ]
    assert looped([*line, "--to", str(tmp_path / "tokens"), "--held-out-documents", "9"]) == 0
    said = capfd.readouterr().out.strip()
    assert said.endswith("tokens of 500 documents; train on them by data: {tokens: " + f"{tmp_path / 'tokens'}}}")
    return tmp_path / "tokens"


def test_a_run_on_token_shards_is_trained_resumed_and_measured(tokens, tmp_path, capfd):
    base = [f"--output_dir={tmp_path}", *SHARDS, f"--data.tokens={tokens}", "--max_steps=20", "--checkpoint_every=10"]
    summary = run([*base, "--name=whole"])
    shards = json.loads((tokens / "tokens.json").read_text())["shards"].values()
    assert summary["train_tokens"] == sum(shard["tokens"] for shard in shards if shard["split"] == "train")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    back_to(tmp_path / "parts", 10)
    (tmp_path / "tokens").rename(tmp_path / "moved")  # the same shards elsewhere are the same data
    base[-3] = f"--data.tokens={tmp_path / 'moved'}"
    run([*base, "--name=parts"])
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    assert looped(["eval", str(tmp_path / "parts"), "--loops", "1", "2"]) == 0
    assert looped(["ask", str(tmp_path / "parts"), "--new-tokens", "2"]) == 0
    note = json.loads((tmp_path / "moved" / "tokens.json").read_text())
    note["shards"]["train-00000.arrow"]["sha256"] = "0"
    (tmp_path / "moved" / "tokens.json").write_text(json.dumps(note))
    assert "changed split: train" in failure(capfd, "eval", tmp_path / "parts")


def test_token_shards_bring_their_tokenizer(tokens, tmp_path, trained):
    base = [f"--output_dir={tmp_path}", *SHARDS, f"--data.tokens={tokens}", "--name=run", "--max_steps=2"]
    for flag, message in (
        ("--data.vocab_size=300", r"comes from one of .*, got data\.vocab_size and data\.tokens"),
        ("--data.files=[a.txt]", r"data\.files and data\.tokens both name the text"),
        ("--data.overrides={column: x}", r"data\.overrides\.column is not for data\.tokens"),
        ("--data.workers=2", r"data\.workers is for a stream"),
    ):
        with pytest.raises(ValueError, match=message):
            read_recipe(ROOT / "recipes" / "smoke_text.yaml", [*base, flag])
    model = trained("text", "--max_steps=2") / "model"
    with pytest.raises(ValueError, match=r"tokens in .* are of another tokenizer than the model: write them again"):
        run([*base, f"--init_from={model}", "--model={}"])
