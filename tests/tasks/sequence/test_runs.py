"""Runs on questions: trained once for this session, and asked by every verb; what is refused before training."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from looplab.cli import main
from looplab.publish import demo
from looplab.runs.folder import open_run
from looplab.runs.intervals import wilson_interval
from looplab.tasks.registry import TASKS
from looplab.tasks.sequence.data import SequenceData
from looplab.tasks.sequence.figures import loops_figure, reach_figure
from looplab.tasks.sequence.records import GRADES, HALTING
from looplab.tasks.sequence.results import facts_of, lines_of, markdown_table, reach_of
from looplab.tasks.sequence.rows import load_questions
from looplab.training.recipe import build_recipe
from toy_runs import failure, measured, rows_of
from toys import ROOT

LEARNT = ["--max_steps=400", "--batch_size=64", "--check_every=200", "--checkpoint_every=400", "--optim.lr=4e-3"]
DATA = str(ROOT / "docs" / "guides" / "reversals.jsonl")


@pytest.fixture(scope="module")
def learnt(trained, tmp_path_factory):
    """A run of twenty updates, evaluated: for tests that read it."""
    run = trained.copy(tmp_path_factory.mktemp("learnt"), "sequence")
    assert main(["eval", str(run), "--loops", "1", "2", "4"]) == 0
    return run


@pytest.fixture
def run(learnt, tmp_path):
    return Path(shutil.copytree(learnt, tmp_path / learnt.name))


@pytest.mark.slow
def test_a_run_learns_to_write_backwards(sequence, tmp_path):
    """Words that it has not seen, of the lengths that it was trained on."""
    summary = train.main(sequence("run", *LEARNT))
    losses = [row["loss"] for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert summary["held_out"]["tokens"] > 0.6
    assert summary["trained_grades"] == [2, 3, 4, 5, 6]


def test_harder_rows_are_in_the_test_alone(learnt):
    splits = load_questions(open_run(learnt))
    grades = {split: set(splits[split]["grade"][:]) for split in splits}
    assert max(grades["train"]) == max(grades["validation"]) == 6
    assert {7, 8} <= grades["test"]


def test_measurements_are_of_every_row_with_intervals_and_marks(learnt):
    run = open_run(learnt)
    rows, splits = run.read(GRADES), load_questions(run)
    assert {row["loops"] for row in rows} == {1, 2, 4}
    for split in ("validation", "test"):
        for line, at in lines_of(rows, split).items():
            n = splits[split]["grade"][:].count(line[0])
            for row in at.values():
                assert row["n"] == n
                assert row["exact_interval"] == list(wilson_interval(row["exact"], n))
                assert row["exact_interval"][0] <= row["exact"] <= row["exact_interval"][1]
                assert row["exact"] <= row["tokens"]
                assert row["trained"] == (line[0] <= 6)


def test_reach_ends_at_the_first_grade_below_the_threshold():
    def line(*shares):
        return {(grade, ""): {2: {"exact": share}} for grade, share in enumerate(shares, start=3)}

    assert reach_of(line(0.95, 0.9, 0.5, 1.0), 2, "exact", 0.9) == 4
    assert reach_of(line(0.95, 0.9), 2, "exact", 0.9) == 4
    assert reach_of(line(0.5, 1.0), 2, "exact", 0.9) is None
    assert reach_of(line(1.0) | {(3, "odd"): {2: {"exact": 0.1}}}, 2, "exact", 0.9) is None


# Inside torch, where it differentiates forwards for `looped dynamics`.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_every_verb_answers(run, tmp_path, capfd):
    """One after the other on one run, each beside what the others have left."""
    known = json.loads(Path(DATA).read_text().splitlines()[0])
    for verb in (
        ["eval", "--loops", "1", "2"],
        ["lens", "--limit", "3", "--loops", "2"],
        ["memory", "--limit", "4"],
        ["dynamics", "--limit", "4"],
        ["quantize", "--calibration-rows", "8"],
        ["ask"],
        ["ask", known["question"], "--loops", "2"],
        ["plot"],
        ["table"],
        ["export", "--to", "transformers"],
        ["publish", "--folder", str(tmp_path / "published")],
        ["publish", "--repo-id", "user/x", "--dataset", "--dataset-license", "mit", "--space", "--dry-run"],
    ):
        command = [verb[0], str(run), *verb[1:]]
        assert main(command) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    assert f"answer    {known['answer']} (" in said
    card = (tmp_path / "published" / "README.md").read_text()
    assert "Right answers in % over grades and loops" in card
    assert "{{" not in card
    names = {record.name for record in TASKS["sequence"].records} - {HALTING.name}
    assert names <= {path.name for path in (tmp_path / "published" / "run").iterdir()}


def test_halting_is_chosen_on_validation_rows(run, capfd):
    """Or it says that there is nothing to save."""
    rows = rows_of(run / "grades.jsonl")
    assert main(["halting", str(run), "--limit", "6"]) in (0, 2)
    if max(row["exact"] for row in rows if row["split"] == "validation") < 0.3:
        assert "nothing to save" in capfd.readouterr().err
        return
    found = rows_of(run / "halting.jsonl")
    assert {row["measure"] for row in found} >= {"sweep", "chosen", "oracle", "fixed", "time"}
    for row in found:
        if row["measure"] == "chosen":
            assert 1 <= row["loops"] <= row["num_loops"]
    assert main(["plot", str(run)]) == 0
    assert (run / "figures" / "halting.png").is_file()


def test_a_rule_is_timed_against_the_loops_that_all_grades_need(sequence, tmp_path, capfd):
    """On questions whose answer is their last letter, which few updates learn."""
    words = ["".join(letters) for n in (2, 3, 4) for letters in itertools.product("abc", repeat=n)]
    rows = [{"question": word, "answer": word[-1], "length": len(word)} for word in words]
    (tmp_path / "last.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"--data.files=[{tmp_path / 'last.jsonl'}]", "--data.train_grades=4", "--optim.lr=1e-2"]
    train.main(sequence("last", *data, "--max_steps=60", "--check_every=60", "--checkpoint_every=60"))
    assert main(["halting", str(tmp_path / "last"), "--max-loops", "4"]) == 0
    found = rows_of(tmp_path / "last" / "halting.jsonl")
    own, common = (
        {row["grade"]: row["loops"] for row in found if row["measure"] == measure and row["solvable"]}
        for measure in ("oracle", "fixed")
    )
    [count] = set(common.values())
    assert count >= max(own.values())
    timed = [row for row in found if row["measure"] == "time"]
    sizes = sorted({row["rows"] for row in timed} | {1})
    rules = {row["rule"] for row in found if row["measure"] == "chosen"}
    assert sorted((row["rule"], row["batch"]) for row in timed) == sorted(itertools.product(rules, sizes))
    assert {row["against"] for row in timed} == {count}
    assert f"in batches of {sizes[-1]}" in capfd.readouterr().out


def test_what_is_published_answers_as_its_card_says(run, tmp_path):
    """The code on the card, run as it is printed, prints what the card says that it prints."""
    assert main(["publish", str(run), "--folder", str(tmp_path / "published")]) == 0
    card = (tmp_path / "published" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    printed = card.split("```text\n")[1].split("```")[0].strip()
    lines = []
    exec(code, {"print": lambda *words: lines.append(" ".join(map(str, words)).strip())})
    assert "\n".join(lines) == printed


def test_the_page_asks_as_the_task_does(run, tmp_path):
    space = demo.write_space([open_run(run)], tmp_path / "space")
    app = demo.load_app(space)
    app.load = demo.load_here
    questions = app.Questions(**json.loads((space / "demo.json").read_text())["sequence"])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "model"),
        AutoTokenizer.from_pretrained(run / "model"),
    )
    prompt = questions.examples[0]["prompt"]
    reply = app.reply(model.eval(), tokenizer, questions, prompt, 2)
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), num_loops=2)
    length = tokenizer(prompt, return_tensors="pt")["input_ids"].shape[1]
    assert reply.text == tokenizer.decode(output[0, length:], skip_special_tokens=True)
    assert 0 <= reply.sure <= 1
    shown = app.replies_html(prompt, questions.examples[0]["answer"], {2: reply}, 1)
    assert prompt in shown
    for wrong in ("", "z", "a" * 2000):
        with pytest.raises(ValueError, match=r"Write a question|no token"):
            app.reply(model, tokenizer, questions, wrong, 2)
    assert app.loops_to_show(6) == [1, 2, 4, 6]
    for asked in ("[MAX 2 9 ]", "[1]"):  # no conversation, although it begins like one
        assert app.messages_of(replace(questions, chat="messages"), asked) == [{"role": "user", "content": asked}]
    spaced = app.replies_html("a", "b  c", {1: replace(reply, text="b c")}, 1)
    assert "&#10003;" in spaced  # a tokenizer of words writes one space


def test_groups_of_seeds_are_read_together(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / f"{run.name}_seed1"))
    recipe = yaml.safe_load((other / "recipe.yaml").read_text()) | {"seed": 1}
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs = [open_run(run), open_run(other)]
    assert "| 2 |" in markdown_table(runs)
    axes = reach_figure([("both", runs)]).axes[0]
    assert len(axes.lines[0].get_xdata()) == len(lines_of(runs[0].read(GRADES), "test"))
    assert facts_of(runs[0])["trained"] == facts_of(runs[1])["trained"]
    assert len(loops_figure(runs[0]).axes) == 1


@pytest.mark.parametrize("flags", [[], ["--data.batching=one_length", "--curriculum.start_grade=3"]], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(sequence, tmp_path, flags):
    flags = ["--model.residual_dropout=0.2", "--curriculum.threshold=0.0", *flags]
    train.main(sequence("whole", *flags))
    train.main(sequence("parts", *flags))
    for later in ("model", "checkpoints/step-000000020"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    train.main(sequence("parts", *flags))
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    assert measured(tmp_path / "parts", "gate") == measured(tmp_path / "whole", "gate")


def test_stages_add_grades_when_lower_ones_pass(sequence, tmp_path):
    train.main(sequence("staged", "--curriculum={start_grade: 3, threshold: 0.0}", "--check_every=4"))
    rows = rows_of(tmp_path / "staged" / "metrics.jsonl")
    stages = [row["stage"] for row in rows if "loss" in row]
    assert stages[0] == 3
    assert all(row["grade"] <= row["stage"] for row in rows if "loss" in row)
    assert stages == sorted(stages)


@pytest.mark.parametrize(("threshold", "steps"), [(0.99, 4), (0.0, 2)])
def test_a_run_of_grade_0_goes_on_with_a_larger_budget_until_it_has_passed(sequence, tmp_path, threshold, steps):
    """Also where no answer is right: 0 is a grade, and not what was learnt of none."""
    rows = [{"prompt": "a" * number, "answer": "b"} for number in range(1, 40)]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--data={{task: sequence, files: [{tmp_path}/same.jsonl], overrides: {{validation_share: 0.3}}}}"]
    flags += [f"--curriculum={{after_last: stop, threshold: {threshold}}}", "--check_every=2", "--optim.lr=0.05"]
    train.main(sequence("zero", *flags, "--max_steps=2"))
    gate = train.main(sequence("zero", *flags, "--max_steps=4"))["gate"]
    assert gate["0"] > 0 or threshold > 0
    assert json.loads((tmp_path / "zero" / "summary.json").read_text())["steps"] == steps


@pytest.mark.parametrize("tokenizer", ["characters", "words", "digits", "bpe"])
@pytest.mark.parametrize("loss", ["answer", "all"])
def test_every_tokenizer_and_loss_trains(sequence, tmp_path, tokenizer, loss):
    size = ["--data.vocab_size=280"] if tokenizer == "bpe" else []
    if tokenizer in ("words", "digits"):  # questions of several words
        rows = [json.loads(line) for line in Path(DATA).read_text().splitlines()]
        spaced = [{name: " ".join(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
        (tmp_path / "spaced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spaced))
        size = [f"--data.files=[{tmp_path}/spaced.jsonl]"]
    flags = [f"--data.tokenizer={tokenizer}", f"--data.loss={loss}", "--max_steps=2", *size]
    summary = train.main(sequence("run", *flags))
    assert summary["steps"] == 2


REFUSED = [
    (["--data.generator=parity"], "questions come from one of"),
    (["--data.files=null"], "questions come from one of"),
    (["--data.config=paper"], "data.config is for a generator"),
    (["--data.vocab_size=300"], "give both, or neither"),
    (["--data.tokenizer=bpe"], "give both, or neither"),
    (["--data.chat=true"], "need a tokenizer with a chat template"),
    (["--data.answers=in_place", "--data.loss=all"], "learns the prompt"),
    (["--data.sequence_length=6"], r"reversals\.jsonl, line \d+: prompt and answer have .* a row may read 6"),
    (["--model.max_position_embeddings=6"], r"line \d+: .* a row may read 6 \(.*max_position_embeddings\)"),
    (["--data.answer=reply"], r"line 1: there is no 'reply', .*name another one in data\.answer"),
    (["--data.grade=question"], r"line 1: the grade '\w+' is no whole number"),
    (["--data.train_grades=1"], "the split train has no rows"),
    (["--data.overrides={prompt: question}"], r"data\.overrides\.prompt is data\.prompt"),
    (["--curriculum.start_grade=99"], "must not be above|must be in order"),
    (["--data.files=[nothing.jsonl]"], "nothing matches"),
    (["--data.tokenizer=nowhere"], "there is no tokenizer in the folder"),
    (["--data.at_least_grade=true", "--model.max_num_loops=4"], r"data\.at_least_grade asks for 6 loops, and .* is 4"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=lambda case: case if isinstance(case, str) else case[0])
def test_what_cannot_be_trained_is_refused_before_any_work(sequence, tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        train.main(sequence("run", *flags))
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_the_data_of_a_run_are_kept_and_compared(run, tmp_path, capfd):
    splits = load_questions(open_run(run))
    kept = load_dataset("parquet", data_files={"train": str(run / "data" / "train.parquet")})["train"]
    assert kept["prompt"][:] == splits["train"]["prompt"][:]
    other = tmp_path / "other.jsonl"
    other.write_text(Path(DATA).read_text().replace('"answer": "a', '"answer": "b'))
    assert "have changed" in failure(capfd, "eval", run, "--data.files", other)


def test_a_question_with_an_unknown_character_is_refused(run, capfd):
    assert "no token for 'Z'" in failure(capfd, "ask", run, "abZ")
    assert "is empty" in failure(capfd, "ask", run, " ")


def test_the_fields_of_the_builder_follow_from_the_recipe():
    data = SequenceData(files=["a.jsonl"], prompt="q", grade="length", tokenizer="words", train_grades=4)
    preset, fields = data.preset()
    assert (preset, fields["prompt"], fields["counted"], fields["train_grades"]) == ("files", "q", "words", 4)
    preset, fields = SequenceData(files=["a.jsonl"], messages=True, tokenizer="folder").preset()
    assert preset == "chats"
    assert "prompt" not in fields


def test_conversations_are_learnt_and_asked_through_the_template(tmp_path, capfd):
    from chat_toys import make_chats, make_tokenizer, write_chats

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    file = write_chats(tmp_path / "chats.jsonl", make_chats(40))
    data = {"task": "sequence", "files": [file], "messages": True, "tokenizer": str(tmp_path / "tokenizer")}
    data |= {"overrides": {"validation_share": 0.2, "test_share": 0.2}}
    recipe = yaml.safe_load((ROOT / "recipes" / "smoke_sequence.yaml").read_text()) | {"data": data, "max_steps": 2}
    train.main(build_recipe(recipe | {"output_dir": str(tmp_path), "name": "chat"}))
    run = tmp_path / "chat"
    assert main(["eval", str(run), "--loops", "1", "2"]) == 0
    assert main(["ask", str(run), "the loop", "--loops", "1"]) == 0
    assert "user: the loop" in capfd.readouterr().out
    assert main(["publish", str(run), "--folder", str(tmp_path / "published")]) == 0
    assert "apply_chat_template" in (tmp_path / "published" / "README.md").read_text()


@torch.no_grad()
def test_answers_in_place_are_learnt_read_and_asked(tmp_path, capfd):
    """Prefix sums of bits modulo 2: a causal model says each at its bit."""
    rows = []
    for number in range(200):
        bits = [int(bit) for bit in f"{number:08b}"]
        sums = [sum(bits[: i + 1]) % 2 for i in range(8)]
        rows.append({"prompt": "".join(map(str, bits)), "answer": "".join(map(str, sums)), "grade": 8})
    (tmp_path / "bits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"task": "sequence", "files": [str(tmp_path / "bits.jsonl")], "grade": "grade", "answers": "in_place"}
    data |= {"overrides": {"validation_share": 0.2, "test_share": 0.2}}
    recipe = yaml.safe_load((ROOT / "recipes" / "smoke_sequence.yaml").read_text()) | {"data": data, "max_steps": 10}
    with torch.enable_grad():
        train.main(build_recipe(recipe | {"output_dir": str(tmp_path), "name": "bits"}))
    run = tmp_path / "bits"
    for verb in (["eval", "--loops", "2"], ["ask", "01100101", "--loops", "2"], ["plot"], ["lens", "--limit", "2"]):
        assert main([verb[0], str(run), *verb[1:]]) == 0
    said = capfd.readouterr().out
    assert "answer    01000110" in said
    assert main(["publish", str(run), "--folder", str(tmp_path / "published")]) == 0
    assert "argmax(-1)" in (tmp_path / "published" / "README.md").read_text()
