"""Laws of a saved halting rule: `generate(halting=True)` runs it, and the run folder stays whole."""

import json
import os
import shutil

import pytest
import torch

from looplab.cli import main
from looplab.instruments.halting_settings import save_rule, setting_of
from looplab.runs.digests import sha256_of
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.tasks.hops.records import GRID
from looplab.tasks.language.exits import SLACK, best_rule
from looplab.tasks.molecules.sizes import Sizes
from looplab.tasks.registry import TASKS
from looplab.tasks.text.records import HALTING

RULES = [
    {"rule": "kl", "kl_threshold": 0.5},
    {"rule": "kl_entropy", "kl_threshold": 1.0, "max_entropy": 3.0},
    {"rule": "latent", "threshold": 0.3},
]


@pytest.fixture
def run(trained, tmp_path):
    return Run(trained.copy(tmp_path, "hops"))


def contents(run: Run) -> dict:
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.relative_to(run.folder).as_posix(): path.read_bytes() for path in files}


def test_a_saved_rule_is_what_true_runs_and_saving_it_again_changes_nothing(run):
    before, weights = contents(run), run.weights
    ids = torch.tensor([[2, 3, 4], [5, 6, 2]])
    for rule in RULES:
        assert "the fewest loops that costs nothing" in save_rule(run, rule | {"num_loops": 6}, "costs nothing")
        after = contents(run)
        assert {name for name in after if after[name] != before.get(name)} == {
            "model/generation_config.json", "run.json"
        }  # fmt: skip
        save_rule(run, rule | {"num_loops": 6}, "costs nothing")
        assert contents(run) == after
        written = run.folder / "model" / "generation_config.json"
        assert sha256_of(written) in run.note()["files"]["model/generation_config.json"]
        assert json.loads(written.read_text()) == json.loads(before["model/generation_config.json"]) | {
            "calibrated_halting": rule
        }
        assert Run(run.folder).weights == weights
        model, _ = load_run_model(Run(run.folder))
        asked = {"num_loops": 6, "max_new_tokens": 3, "return_dict_in_generate": True}
        by_name, by_dict = (model.generate(ids, halting=halting, **asked) for halting in (True, rule))
        assert torch.equal(by_name.sequences, by_dict.sequences)
        assert torch.equal(by_name.loops_used, by_dict.loops_used)
        assert model.generate(ids, **asked).loops_used.unique().tolist() == [6]


@pytest.mark.parametrize("marked", [True, False])
def test_a_rule_is_not_lost_on_load_where_the_file_was_derived_from_the_configuration(run, marked):
    path = run.folder / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_from_model_config": marked}))
    save_rule(run, RULES[0] | {"num_loops": 4}, "costs nothing")
    model, _ = load_run_model(run)
    assert model.generation_config.calibrated_halting == RULES[0]


@pytest.mark.parametrize("damage", ["missing", "damaged", "link"])
def test_a_folder_that_cannot_keep_a_rule_stays_as_it_is(run, damage, tmp_path):
    path = run.folder / "model" / "generation_config.json"
    if damage == "link":
        shutil.move(run.folder / "model", tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", run.folder / "model")
    elif damage == "damaged":
        path.write_text("{")
    else:
        path.unlink()
    before = contents(run)
    with pytest.raises(ValueError, match="is a link" if damage == "link" else "generation_config.json"):
        save_rule(run, RULES[0] | {"num_loops": 4}, "costs nothing")
    assert contents(run) == before


def test_a_run_that_keeps_no_digests_gets_none(run):
    (run.folder / "run.json").unlink()
    save_rule(run, RULES[0] | {"num_loops": 4}, "costs nothing")
    assert not (run.folder / "run.json").exists()


@pytest.mark.parametrize(
    ("costs", "chosen"),
    [
        ([(0.5 * SLACK, 2.0), (0.9 * SLACK, 1.5), (2 * SLACK, 1.0)], 1),
        ([(2 * SLACK, 1.0), (1.5 * SLACK, 2.0), (-SLACK, 3.9)], 2),
        ([(2 * SLACK, 1.0), (1.5 * SLACK, 2.0), (3 * SLACK, 3.9)], None),
        ([], None),
    ],
)
def test_the_fewest_loops_at_no_loss_are_saved_and_nothing_that_loses(run, costs, chosen):
    """Text and molecules; hops are in tests/tasks/hops/test_commands.py."""
    rows = [
        {"measure": "exit", **rule, "num_loops": 4, "loss": 2.0 + more, "full_loss": 2.1, "loops": loops}
        for rule, (more, loops) in zip(RULES, costs, strict=False)
    ]
    rows.append({"measure": "exit", "rule": "fixed", "num_loops": 2, "loss": 2.0, "full_loss": 2.1, "loops": 2.0})
    rows.append({"measure": "kind", "rule": "kl", "loss": 0.0, "loops": 0.0})
    before = contents(run)
    if chosen is None:
        with pytest.raises(ValueError, match="no halting rule is saved"):
            save_rule(run, *best_rule(rows))
        assert contents(run) == before
    else:
        assert f"costs at most {SLACK} nats" in save_rule(run, *best_rule(rows))
        saved = json.loads((run.folder / "model" / "generation_config.json").read_text())
        assert saved["calibrated_halting"] == RULES[chosen]


# Through the commands

LONG = {"text": ["--data.sequence_length=64"], "molecules": [], "hops": []}
SMALL = Sizes(batch=8, max_tokens=8, reference=0, decoded=(1, 2), timed=(1,), thresholds=1)
EVAL = {"text": ["--limit", "4"], "molecules": ["--limit", "8"], "hops": ["--max-loops", "2"]}


@pytest.fixture
def quick(monkeypatch):
    """A few tokens of each text, and a few molecules: the commands are the real ones."""
    monkeypatch.setattr("looplab.tasks.text.exits.PROMPT", 2)
    monkeypatch.setattr("looplab.tasks.text.exits.DECODED", 2)
    monkeypatch.setattr(TASKS["molecules"], "sizes", SMALL)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("task", ["text", "molecules"])
def test_the_command_saves_the_best_rule_and_eval_reports_it(task, trained, tmp_path, capsys):
    run = Run(trained.copy(tmp_path, task, *LONG[task]))
    assert main(["halting", str(run.folder), "--limit", "16", "--max-loops", "2", "--save"]) == 0
    rule = json.loads((run.folder / "model" / "generation_config.json").read_text())["calibrated_halting"]
    (best, _) = best_rule(run.read(HALTING))
    assert {name: best[name] for name in rule} == rule
    assert f"saved in {run.folder / 'model' / 'generation_config.json'}: {{'rule':" in capsys.readouterr().out
    assert main(["eval", str(run.folder), "--loops", "1", "2", *EVAL[task]]) == 0
    most = {"text": 2, "molecules": 3}[task]  # molecules are measured at the model's own loops in any case
    assert f"saved rule {setting_of(best).halting}, at most {most} loops: " in capsys.readouterr().out
    found = json.loads((run.folder / "evaluation.json").read_text())["halting"]
    assert {name: found[name] for name in rule} == rule
    assert 1 <= found["loops"] <= most


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("task", ["hops", "text", "molecules"])
def test_what_eval_reports_is_what_true_does(task, trained, tmp_path, capsys):
    """A threshold that halts after one loop gives what one loop gives, one that is never met what all loops give."""
    folder = trained.copy(tmp_path, task, *LONG[task])
    found = {}
    for threshold in (1e9, 0.0):
        save_rule(Run(folder), {"rule": "kl", "kl_threshold": threshold, "num_loops": 3}, "is tried")
        assert main(["eval", str(folder), "--loops", "1", "3", *EVAL[task]]) == 0
        found[threshold] = json.loads((folder / "evaluation.json").read_text())["halting"]
    printed = capsys.readouterr().out
    rows = {threshold: row.get("lines", [row]) for threshold, row in found.items()}
    assert {line["loops"] for line in rows[0.0]} == {3}
    assert all(1 <= line["loops"] < 3 for line in rows[1e9])
    if task == "hops":
        grid = {(r["split_kind"], r["hops"], r["loops"]): r["accuracy"] for r in Run(folder).read(GRID)}
        for threshold, lines in rows.items():
            assert all(f"{100 * line['accuracy']:.1f} in {line['loops']:.1f}" in printed for line in lines)
            for line in lines:
                if line["loops"] in (1, 3):
                    assert line["accuracy"] == pytest.approx(grid[line["split_kind"], line["hops"], line["loops"]])
            assert len({(line["split_kind"], line["hops"]) for line in lines}) == len(lines) == 7, threshold
    if task == "text":
        assert rows[0.0][0]["loss"] == pytest.approx(rows[0.0][0]["full_loss"])


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_task_that_measures_halting_names_its_best_rule(task):
    assert task.has("halting") == task.has("best_rule")
