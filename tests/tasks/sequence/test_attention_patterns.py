"""Questions to models that look ahead: the prompt sees itself, or answers are read in place."""

import re
from dataclasses import asdict

import pytest
import torch

import train
from looplab.cli import main
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.study.loopbench_file import Measure
from looplab.study.measuring import measure_run
from looplab.tasks.sequence.data import SequenceData
from looplab.tasks.sequence.measures import said_at
from looplab.tasks.sequence.rows import encoded
from looplab.training.recipe import build_recipe
from toy_runs import rows_of
from toys import FP32

FEW = {"train_per_grade": 30, "validation_per_grade": 3, "test_per_grade": 3, "train_grade": 3, "far_grades": [4]}
MODEL = {"num_core_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_loops": 2}
RECIPE = {"batch_size": 8, "max_steps": 3, "check_every": 3, "depth": {"kind": "uniform", "minimum": 1, "maximum": 3}}


def recipe(folder, pattern, generator, **data):
    named = {"task": "sequence", "generator": generator, "overrides": FEW} | data
    model = MODEL | {"attention_pattern": pattern}
    return build_recipe(RECIPE | {"name": "run", "output_dir": str(folder), "model": model, "data": named})


@pytest.mark.parametrize("batching", ["packed", "one_length"])
def test_what_a_prompt_that_sees_itself_says_is_what_generate_writes(tmp_path, batching):
    """Trained, measured from one pass, and written token by token."""
    train.main(recipe(tmp_path, "prefix", "addition", batching=batching))
    run = Run(tmp_path / "run")
    model, tokenizer = load_run_model(run)
    data = SequenceData.of(run)
    splits = data.load()
    rows = encoded(data, splits, tokenizer, ["test"])["test"]
    for loops in (1, 2):
        said = said_at(model, rows, range(len(rows)), [loops, 3])[loops]
        for number in range(len(rows)):
            tokens, labels = rows.row(number)
            first = int(rows.firsts[number])
            prompt = torch.from_numpy(tokens[: first + 1])[None]
            types = torch.from_numpy(rows.types(number))[None]
            logits = model(torch.from_numpy(tokens)[None], token_type_ids=types, num_loops=loops).logits[0, first:]
            assert int((logits.argmax(-1) == torch.from_numpy(labels[first:])).sum()) == said.right[number]
            written = model.generate(prompt, num_loops=loops, max_new_tokens=1, do_sample=False)
            assert written[0, -1] == logits[0].argmax()
            alone = model(prompt, num_loops=loops).logits[0, -1]  # a text without types is a prompt
            torch.testing.assert_close(alone, logits[0], **FP32)


def test_answers_in_place_are_learnt_by_a_model_that_sees_the_whole(tmp_path):
    train.main(recipe(tmp_path, "bidirectional", "sudoku"))
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "generator", "policies"),
    [("prefix", "addition", {"per_loop", "first", "natural"}), ("bidirectional", "sudoku", {"per_loop"})],
)
def test_what_looks_ahead_is_measured_as_any_other(tmp_path, pattern, generator, policies, capsys):
    """A model without a cache keeps no bytes; only policies that the pattern can have are tried."""
    train.main(recipe(tmp_path, pattern, generator))
    run = str(tmp_path / "run")
    for verb in (["eval", "--loops", "1", "3"], ["table"], ["plot"], ["memory"]):
        assert main([verb[0], run, *verb[1:]]) == 0, capsys.readouterr().err
    rows = rows_of(tmp_path / "run" / "memory.jsonl")
    assert {row["kv_sharing"] for row in rows} == policies
    assert all((row["kv_bytes"] == 0) == (pattern == "bidirectional") for row in rows)
    found = measure_run(Run(tmp_path / "run"), asdict(Measure([1, 3], [5], limit=2)))
    assert found["kv_bytes"] == next(row["kv_bytes"] for row in rows if row["trained"])


@pytest.mark.parametrize(
    ("pattern", "generator", "data", "message"),
    [
        ("bidirectional", "addition", {}, "sees the answer that it has to write: set data.answers in_place"),
        ("prefix", "sudoku", {}, "data.answers in_place has labels there: use bidirectional"),
        ("prefix", "addition", {"loss": "all"}, "data.loss all has labels there: use data.loss answer"),
    ],
)
def test_a_pattern_that_the_answers_do_not_fit_is_refused(tmp_path, pattern, generator, data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train.main(recipe(tmp_path, pattern, generator, **data))
