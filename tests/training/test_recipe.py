"""A recipe that is wrong is refused before any work, in words that name the field."""

import runpy
import sys

import pytest

from looplab.runs.yaml_text import parse_yaml
from looplab.training.recipe import build_recipe
from toys import ROOT
from train import main, read_recipe

SMOKE = ROOT / "recipes" / "smoke.yaml"
HYPER = ("--model.loop_connection=hyper", "--model.num_streams=2")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--optim.learning_rate=1", r"optim\.learning_rate is not a recipe field"),
        ("--optim.lrr=1", r"did you mean optim\.lr\?"),
        ("--lr=1", r"did you mean optim\.lr\?"),
        ("--batchsize=1", r"did you mean batch_size\?"),
        ("--curiculum.start_hops=2", r"did you mean curriculum\?"),
        ("--optim.lr=fast", r"section optim: Field 'lr'"),
        ("--batch_size=2.5", r"'batch_size' expected int"),
        ("--depth=4", r"'depth' expected Depth"),
        ("--max_steps.a=4", r"max_steps is a value"),
        ("--optim.kind=sgd", r"'kind'.*'adamw', 'muon'"),
        ("--batch_size=0", r"batch_size must be >= 1, got 0"),
        ("--check_every=0", r"check_every must be >= 1"),
        ("--max_steps=null", r"no budget: set max_steps, max_seconds"),
        ("--name=../elsewhere", r"name must be a plain folder name"),
        ("--optim.label_smoothing=1", r"label_smoothing must be in \[0, 1\), got 1"),
        ("--optim.betas=[0.9]", r"optim\.betas must be two numbers"),
        ("max_steps=3", r"cannot read the argument 'max_steps=3'"),
        ("--overwrite", r"cannot read the argument '--overwrite'"),
    ],
)
def test_a_recipe_that_cannot_be_read_raises(flag, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(SMOKE, [flag])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.hiden_size=8", r"hidden_size"),
        ("--depth.kind=fixed", r"fixed takes mean"),
        ("--data.overrides.num_entitys=8", r"num_entit"),
        ("--data.pad_to=3", r"pad_to must be at least 4, the longest row"),
        ("--curriculum.start_hops=9", r"start_hops 9"),
    ],
)
def test_a_recipe_that_cannot_run_raises(hops, tmp_path, flag, message):
    with pytest.raises(ValueError, match=message):
        main(hops("run", flag))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    # Nothing was trained, so the corrected recipe may have the folder.
    main(hops("run", "--max_steps=1"))


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"name"):
        build_recipe({"model": {}, "max_steps": 1})


def test_numbers_are_read_as_in_yaml_1_2():
    assert parse_yaml("[1e-4, 3E5, .5, 10, e3, r1]", "here") == [1e-4, 3e5, 0.5, 10, "e3", "r1"]


def test_an_output_folder_that_cannot_be_written_raises(hops, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to .*another --output_dir"):
        main(hops("run", f"--output_dir={tmp_path / 'file'}"))


def test_loops_without_parameters_are_refused_before_training(hops, tmp_path):
    for flag, name in (("--gate_loops=5", "gate_loops"), ("--eval_loops=[2, 6]", "eval_loops"), (None, "depth")):
        flags = [*HYPER, "--model.num_loops=2", "--depth={kind: fixed, mean: 2}", *([flag] if flag else [])]
        flags += [] if flag else ["--depth={kind: fixed, mean: 3}"]
        with pytest.raises(ValueError, match=f"{name} asks for .* loops, and model.max_num_loops is 2"):
            main(hops("run", *flags))
    with pytest.raises(ValueError, match=r"data\.at_least_hops asks for 3 loops, and model.max_num_loops is 2"):
        main(hops("run", *HYPER, "--model.num_loops=2", "--depth={kind: fixed, mean: 2}", "--data.at_least_hops=true"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_help_names_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert {"--optim.lr", "--curriculum.stop_hops", "--max_seconds"} <= set(capsys.readouterr().out.split())
