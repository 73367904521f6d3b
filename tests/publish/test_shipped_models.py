"""The models that come with this package: whole, small, of a named commit, and found by name from any folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from looplab.cli import main
from looplab.publish.publishing import check_measured
from looplab.runs.sources import opened_run, shipped_models
from looplab.shipped import shipped
from modeling_looped import LoopedForCausalLM

every_model = pytest.mark.parametrize("name", shipped_models())


def test_these_models_are_shipped():
    assert shipped_models() == ["khop-51k", "molecules-51k"]


@every_model
def test_a_shipped_model_has_its_card_recipe_and_records_and_is_small(name):
    folder = shipped("models") / name
    summary = json.loads((folder / "run" / "summary.json").read_text("utf-8"))
    assert len(summary["commit"]) >= 7
    assert "dirty" not in summary["commit"]
    assert f"models/{name}" in (folder / "README.md").read_text("utf-8")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
    with opened_run(name) as run:
        assert run.recipe()["seed"] == summary["seed"]
        check_measured(run)  # every record is of these weights


@every_model
def test_its_own_code_and_that_of_the_package_are_one_model(name):
    folder = shipped("models") / name
    own = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    package = LoopedForCausalLM.from_pretrained(folder).eval()
    assert type(own) is not LoopedForCausalLM
    ids = torch.arange(2, 10).unsqueeze(0)
    for num_loops in (1, 9):
        assert own(ids, num_loops=num_loops).logits.equal(package(ids, num_loops=num_loops).logits)
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).vocab_size == package.config.vocab_size


def test_a_run_is_written_to_a_folder_as_it_would_be_published(tmp_path, monkeypatch, capsys):
    """From a shipped model, which is a run that was written so."""
    monkeypatch.chdir(tmp_path)
    assert main(["publish", "khop-51k", "--folder", "mine/chains"]) == 0
    assert "bytes in" in capsys.readouterr().out
    there = shipped("models") / "khop-51k"
    for name in ("model.safetensors", "config.json", "run/recipe.yaml", "run/grid.jsonl"):
        assert (tmp_path / "mine" / "chains" / name).read_bytes() == (there / name).read_bytes()
    assert '"mine/chains"' in (tmp_path / "mine" / "chains" / "README.md").read_text("utf-8")
    assert AutoModelForCausalLM.from_pretrained("mine/chains", trust_remote_code=True).config.num_core_layers == 1
    assert main(["publish", "khop-51k", "--folder", "mine/chains"]) == 2
    assert "mine/chains exists" in capsys.readouterr().err
    assert main(["publish", "khop-51k", "--folder", "other", "--space"]) == 2
    assert "leave --space out" in capsys.readouterr().err
