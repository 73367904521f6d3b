"""`looped frozen`: what it measures, by hand on toys; that it chooses by tasks and never by text; that it resumes."""

import json
import math

import pytest
import torch
import yaml

from families import make_frozen
from looplab.cli import main
from looplab.pretrained import study as frozen
from looplab.pretrained.study import BASE, LoopSetting, best, gains, read_recipe, report, study
from modeling_looped import looped
from toy_questions import toy_tokenizer, words

GRID = [{"window": [[1, 2], [3, 4]], "num_loops": 2, "horizon": [1, 2]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, benchmarks):
    """A model with its tokenizer, text, and a recipe over them."""
    import numpy as np

    folder = tmp_path_factory.mktemp("study")
    make_frozen("llama", dtype=torch.float32).save_pretrained(folder / "model")
    toy_tokenizer().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n\n".join(words(rng, 400) for _ in range(60)))
    write(folder / "recipe.yaml", folder, benchmarks)
    return folder


def write(path, folder, benchmarks, **fields):
    recipe = {
        "name": "toy", "model": str(folder / "model"), "benchmarks": str(benchmarks),
        "text": {"files": [str(folder / "text.txt")], "document_characters": 500, "validation_share": 0.3,
                 "test_share": 0.3},
        "sweep": {"arc_easy": 5, "text": 2}, "confirm": {"arc_easy": 4, "text": 3}, "grid": GRID,
        "controls": [{"window": [1, 4], "num_loops": 3, "method": "naive"}], "sequence_length": 16,
        "cost": {"loops": [2], "prompt": 16, "new_tokens": 2, "rounds": 1}, "output_dir": str(folder),
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe | fields))
    return path


@pytest.fixture(scope="module")
def done(folder):
    """The whole study, once."""
    study(folder / "recipe.yaml")
    return folder / "toy"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_setting_is_measured_on_every_task_and_the_best_is_confirmed(done):
    sweep = rows_of(done / "sweep.jsonl")
    assert {(row["name"], row["task"]) for row in sweep} == {
        (str(LoopSetting(**({"window": window, "num_loops": 2, "horizon": horizon}))), task)
        for window in ([1, 2], [3, 4])
        for horizon in (1, 2)
        for task in ("arc_easy", "text")
    } | {(str(BASE), "arc_easy"), (str(BASE), "text")}
    chosen = max(gains(sweep, "arc_easy").items(), key=lambda item: item[1][1])[0]
    names = {row["name"] for row in rows_of(done / "confirm.jsonl")}
    assert names == {str(BASE), chosen, "layers 1-4, naive, K 3"}
    written = (done / "report.md").read_text()
    assert "McNemar" in written
    assert "agreement" in written
    assert {path.name for path in (done / "figures").iterdir()} == {
        "profile.png", "sweep_arc_easy.png", "sweep_text.png",
    }  # fmt: skip


@pytest.mark.slow
def test_text_scores_are_those_of_the_definition(done, folder):
    """Loss, agreement and KL of a setting on a block, computed from two sets of logits."""
    recipe = read_recipe(folder / "recipe.yaml")
    model, tokenizer = frozen.load(recipe, trust_remote_code=False)
    ids = frozen.TextRows(recipe, "sweep", model, tokenizer).rows
    row = next(r for r in rows_of(done / "sweep.jsonl") if r["task"] == "text" and r["name"] != str(BASE))
    base = model(ids["input_ids"][:1]).logits[0].detach().softmax(-1)
    with looped(model, row["setting"]["window"], 2):
        here = model(ids["input_ids"][:1]).logits[0].detach().softmax(-1)
    expected = {
        "nll": -here[torch.arange(16), ids["shift_labels"][0]].log().mean(),
        "agreement": (here.argmax(-1) == base.argmax(-1)).float().mean(),
        "kl": (base * (base.log() - here.log())).sum(-1).mean(),
    }
    for name, value in expected.items():
        assert row["rows"][0][name] == pytest.approx(float(value), rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_the_profile_has_every_layer_and_window(done, folder):
    """Updates by hand from hidden states; a window's shift is the blend's own deviation from the natural output."""
    rows = rows_of(done / "profile.jsonl")
    assert [row["layer"] for row in rows if "layer" in row] == list(range(6))
    assert [row["window"] for row in rows if "window" in row] == [[1, 4], [2, 5]]
    recipe = read_recipe(folder / "recipe.yaml")
    model, tokenizer = frozen.load(recipe, trust_remote_code=False)
    ids = frozen.TextRows(recipe, "sweep", model, tokenizer).rows["input_ids"]
    updates = []
    for row in ids:
        states = model(row[None], output_hidden_states=True).hidden_states
        updates.append(((states[3] - states[2]).norm(dim=-1) / states[2].norm(dim=-1)).mean().item())
    assert rows[2]["update"] == pytest.approx(sum(updates) / len(updates), rel=1e-4)
    assert all(0 < row["shift"] < 1 and row["kl"] > 0 for row in rows if "window" in row)


@pytest.mark.slow
def test_nothing_on_file_is_measured_again(done, folder, monkeypatch):
    before = {path.name: path.read_text() for path in done.glob("*.jsonl")}
    monkeypatch.setattr(frozen.TextRows, "score", lambda self, block: 1 / 0)
    study(folder / "recipe.yaml")
    assert {path.name: path.read_text() for path in done.glob("*.jsonl")} == before
    cut = before["sweep.jsonl"].splitlines()[:-1]
    (done / "sweep.jsonl").write_text("\n".join(cut) + "\n")
    with pytest.raises(ZeroDivisionError):  # the missing row, and only that, is due
        study(folder / "recipe.yaml", ["sweep"])
    (done / "sweep.jsonl").write_text(before["sweep.jsonl"])


@pytest.mark.slow
def test_a_study_of_another_recipe_is_not_mixed_in(done, folder, benchmarks, capsys):
    other = write(folder / "other.yaml", folder, benchmarks, sweep={"arc_easy": 3, "text": 2})
    assert main(["frozen", str(other)]) == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_a_setting_written_down_before_is_measured_without_a_sweep(folder, benchmarks, tmp_path, capsys):
    path = write(tmp_path / "one.yaml", folder, benchmarks, name="one", grid=[], sweep={}, confirm={"arc_easy": 4})
    assert main(["frozen", str(path), "--stages", "sweep"]) == 2
    assert "has no grid, which sweep goes with" in capsys.readouterr().err
    assert main(["frozen", str(path)]) == 0
    assert {row["name"] for row in rows_of(folder / "one" / "confirm.jsonl")} == {str(BASE), "layers 1-4, naive, K 3"}
    assert "## confirm, arc_easy" in (folder / "one" / "report.md").read_text()


def test_the_choice_is_by_the_tasks_and_not_by_text():
    """Text would choose `a`; the right choice of a question says `b`."""

    def rows(name, setting, nll, logprob):
        choices = {"logprobs": [logprob, -1.0], "answer": 0}
        return [
            {"name": name, "setting": setting, "task": "text", "rows": [{"nll": nll}]},
            {"name": name, "setting": setting, "task": "quiz", "rows": [choices]},
        ]

    settings = {name: {"window": [1, 2], "num_loops": k} for name, k in (("a", 2), ("b", 3))}
    sweep = rows(str(BASE), {}, 3.0, -2.0) + rows("a", settings["a"], 1.0, -2.5) + rows("b", settings["b"], 9.0, -1.0)

    class Recipe:
        sweep = {"quiz": 1, "text": 1}  # noqa: RUF012

    assert best(Recipe, sweep).num_loops == 3
    assert gains(sweep, "text")["a"][1] == pytest.approx(2.0)
    expected = math.log(0.5) - (-2 - math.log(math.exp(-2) + math.exp(-1)))
    assert gains(sweep, "quiz")["b"][1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sweep": {"text": 2}}, "no task but text"),
        ({"grid": []}, "without a grid"),
        ({"grid": [], "sweep": {}, "controls": []}, "without a grid"),
        ({"grid": [{"windows": [1, 2]}]}, "is not a setting"),
        ({"grid": [{"num_loops": 0.5}]}, "is not a setting"),
        ({"grid": [{"num_loops": 0}]}, "is not a setting"),
        ({"grid": [{"method": "newton"}]}, "is not a setting"),
        ({"controls": [{"loops": 2}]}, "is not a setting"),
        ({"models": "x"}, "is not a recipe"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path, fields, match):
    with pytest.raises(ValueError, match=match):
        read_recipe(write(tmp_path / "r.yaml", tmp_path, tmp_path, **fields))


def test_a_report_of_nothing_is_a_title(tmp_path):
    recipe = read_recipe(write(tmp_path / "r.yaml", tmp_path, tmp_path))
    assert report(recipe) == "# toy\n"


def test_the_recipes_of_this_repository_can_be_read():
    recipe = read_recipe("recipes/frozen/smollm2.yaml")
    assert len(recipe.settings()) == 37
    assert read_recipe("recipes/frozen/smollm2_all.yaml").stages == ("confirm",)
