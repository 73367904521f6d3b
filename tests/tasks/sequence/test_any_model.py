"""`looped eval --data`: a model that no recipe trained, measured on questions that a user names."""

import json
import shutil

import pytest

from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.tasks.sequence.rows import load_questions
from toy_runs import failure, rows_of

LOOPS = ("--loops", "1", "2")


@pytest.fixture(scope="module")
def bare(trained, tmp_path_factory):
    """The model of a run, alone."""
    return shutil.copytree(trained("sequence") / "model", tmp_path_factory.mktemp("bare") / "words")


@pytest.fixture
def questions(trained, tmp_path):
    """The test rows of that run, and its rows in training are not among them."""
    path = tmp_path / "questions.jsonl"
    rows = load_questions(open_run(trained("sequence")))["test"].select_columns(["prompt", "answer", "grade"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_alone_is_measured_as_in_its_run(trained, bare, questions, tmp_path, capfd):
    run = trained.copy(tmp_path, "sequence")
    assert main(["eval", str(run), *LOOPS]) == 0
    data = f"{{task: sequence, files: [{questions}], grade: grade}}"
    assert main(["eval", str(bare), *LOOPS, "--data", data, "--to", str(tmp_path / "kept")]) == 0
    expected = [row | {"trained": False} for row in rows_of(run / "grades.jsonl") if row["split"] == "test"]
    found = rows_of(tmp_path / "kept" / "grades.jsonl")
    assert sorted(found, key=str) == sorted(expected, key=str)
    said = capfd.readouterr().out
    assert "Questions, right answers in %" in said
    assert f"written to {tmp_path / 'kept' / 'grades.jsonl'}" in said


def test_every_row_is_asked_and_nothing_is_kept_unasked(bare, tmp_path, capfd):
    """Two rows, which could not be dealt to three splits."""
    rows = [{"question": "abc", "answer": "cba"}, {"question": "ab", "answer": "ba"}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(bare.iterdir())
    data = f"{{task: sequence, files: [{tmp_path}/two.jsonl], prompt: question, grade: length}}"
    assert main(["eval", str(bare), *LOOPS, "--data", data]) == 0
    said = capfd.readouterr().out
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("    ")] == [["2", "1"], ["3", "1"]]
    assert "not kept" in said
    assert sorted(bare.iterdir()) == before


def test_a_generator_asks_its_test_rows(bare, capfd):
    """They have letters that this model does not know."""
    data = "{task: sequence, generator: reasoning_gym/letter_counting, overrides: {train_per_grade: 1}}"
    said = failure(capfd, "eval", bare, *LOOPS, "--data", data)
    assert "split test" in said
    assert "no token for" in said


@pytest.mark.parametrize(("data", "said"), [
    ("{task: sequence, file: [a.jsonl]}", "--data has no field 'file'"),
    ("{files: [a.jsonl]}", "is a model without run/recipe.yaml"),
    ("{task: sequence}", "questions come from one of"),
    ("{task: sequence, files: [none.jsonl]}", "nothing matches 'none.jsonl'"),
    ("{task: sequence, files: [head.csv]}", "there is no question in ['head.csv']"),
    ("{task: sequence, files: [a.jsonl], tokenizer: words}", "leave one of them out"),
    ("{task: text, files: [a.txt]}", "it is for sequence"),
    ("{task: nothing}", "there is no task 'nothing'"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(bare, tmp_path, monkeypatch, capfd, data, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab", "answer": "ba"}\n')
    (tmp_path / "head.csv").write_text("prompt,answer\n")
    assert said in failure(capfd, "eval", bare, "--data", data)


def test_a_row_that_is_too_long_is_refused_by_its_line(bare, tmp_path, capfd):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "ab" * 5000, "answer": "c"}) + "\n")
    said = failure(capfd, "eval", bare, "--data", f"{{task: sequence, files: [{tmp_path}/long.jsonl]}}")
    assert "long.jsonl, line 1" in said
    assert "max_position_embeddings" in said


def test_a_run_has_its_own_data(trained, capfd):
    said = failure(capfd, "eval", trained("sequence"), "--data", "{task: sequence, files: [a.jsonl]}")
    assert "leave --data out" in said
