"""The models that come with this package: whole, small, of a named commit, and found by name from any folder."""

import json
import subprocess
import sys

import pytest
import torch

from looplab.cli import main
from looplab.publish.publishing import check_measured
from looplab.runs.sources import opened_run, shipped_models
from looplab.shipped import shipped
from modeling_looped import LoopedForCausalLM
from toys import FP32

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
def test_the_code_beside_the_weights_is_that_of_the_package(name, tmp_path):
    """What `save_pretrained` writes today: a copy that is left behind lacks what was mended since."""
    folder = shipped("models") / name
    LoopedForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    written, there = ({path.name: path.read_bytes() for path in place.glob("*.py")} for place in (tmp_path, folder))
    assert there == written, f"copy modeling_looped/*.py to models/{name}, those that are there or that they import"


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert len(tokenizer) == model.config.vocab_size
    with torch.no_grad():
        logits = [model(torch.arange(2, 10).unsqueeze(0), num_loops=num_loops).logits for num_loops in (1, 9)]
    torch.save(logits, f"{sys.argv[1]}/{folder.rpartition('/')[2]}.pt")
assert "modeling_looped" not in sys.modules
"""


def test_their_own_code_and_that_of_the_package_are_one_model(tmp_path):
    """In a process of its own: whoever has imported the package gets its classes."""
    folders = {name: str(shipped("models") / name) for name in shipped_models()}
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, *folders.values()], check=True, cwd=tmp_path)
    for name, folder in folders.items():
        model = LoopedForCausalLM.from_pretrained(folder).eval()
        for num_loops, logits in zip((1, 9), torch.load(tmp_path / f"{name}.pt"), strict=True):
            with torch.no_grad():
                own = model(torch.arange(2, 10).unsqueeze(0), num_loops=num_loops).logits
            torch.testing.assert_close(own, logits, **FP32)


def test_a_run_is_written_to_a_folder_as_it_would_be_published(tmp_path, monkeypatch, capsys):
    """From a shipped model, which is a run that was written so."""
    monkeypatch.chdir(tmp_path)
    assert main(["publish", "molecules-51k", "--folder", "mine/some"]) == 0
    assert "bytes in" in capsys.readouterr().out
    mine, there = tmp_path / "mine" / "some", shipped("models") / "molecules-51k"
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (mine, there)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.name != "README.md":
            assert (mine / name).read_bytes() == (there / name).read_bytes(), name
    assert '"mine/some"' in (mine / "README.md").read_text("utf-8")
    assert main(["publish", "molecules-51k", "--folder", "mine/some"]) == 2
    assert "mine/some exists" in capsys.readouterr().err
    assert main(["publish", "molecules-51k", "--folder", "other", "--space", "--dry-run"]) == 2
    assert "leave --space and --dry-run out" in capsys.readouterr().err
