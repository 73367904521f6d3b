"""A run that was interrupted equals one that was not, and what is finished or another's stays as it is."""

import signal
import time

import pytest
import torch

from forks import Fork
from modeling_looped import LoopedForCausalLM
from toy_runs import measured
from toys import ROOT
from train import main

SMOKE = ROOT / "recipes" / "smoke.yaml"
DROPOUT = "--model.residual_dropout=0.2"


def test_a_resumed_run_equals_an_uninterrupted_one(hops, tmp_path):
    """Weights, both optimizers, dropout, warm-up, data and depth streams: any of them off would move the loss."""
    main(hops("whole", DROPOUT))
    main(hops("parts", DROPOUT))
    for later in ("model", "checkpoints/step-000000020"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    main(hops("parts", DROPOUT))
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    assert measured(tmp_path / "parts", "gate") == measured(tmp_path / "whole", "gate")
    weights = [
        LoopedForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_killed_run_equals_an_uninterrupted_one(hops, tmp_path):
    """kill -9 at any moment, then the same command: no row is lost, doubled or different."""
    flags = ["--max_steps=300", "--checkpoint_every=40", "--check_every=50", DROPOUT]
    log = tmp_path / "printed"
    killed = Fork(ROOT / "train.py", str(SMOKE), f"--output_dir={tmp_path}", "--name=killed", *flags, log=log)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 60:
        assert killed.process.is_alive(), killed.printed()
        time.sleep(0.01)
    killed.process.kill()
    assert killed.status() == -signal.SIGKILL
    killed_at = len(measured(tmp_path / "killed"))
    assert 60 - 2 <= killed_at < 300
    main(hops("killed", *flags))
    main(hops("whole", *flags))
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    assert measured(tmp_path / "killed", "gate") == measured(tmp_path / "whole", "gate")


def test_a_corrupt_checkpoint_is_passed_over(hops, tmp_path, caplog):
    main(hops("run", "--checkpoint_every=6"))
    whole = measured(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    weights = checkpoints / "step-000000020" / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    (checkpoints / "partial").mkdir()
    (checkpoints / "partial" / "optimizer.bin").write_text("half")
    main(hops("run", "--checkpoint_every=6"))
    assert "step-000000020 is incomplete or corrupt" in caplog.text
    assert measured(tmp_path / "run") == whole
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000000018", "step-000000020"]


def test_without_an_intact_checkpoint_the_run_begins_again(hops, tmp_path, caplog):
    main(hops("run"))
    whole = measured(tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text('{"state": {"sta')
    main(hops("run"))
    assert caplog.text.count("is incomplete or corrupt") == 2
    assert measured(tmp_path / "run") == whole


def test_a_finished_run_is_left_as_it_is(hops, tmp_path):
    first = main(hops("run"))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    second = main(hops("run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert second == first


def test_another_recipe_in_an_existing_run_raises(hops, tmp_path):
    main(hops("run"))
    whole = measured(tmp_path / "run")
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 -> 0\.5.*--overwrite true"):
        main(hops("run", "--optim.lr=0.5"))
    assert measured(tmp_path / "run") == whole
    main(hops("run", "--optim.lr=0.5", "--overwrite=true"))
    assert measured(tmp_path / "run") != whole


def test_snapshots_keep_the_model_on_its_way(hops, tmp_path):
    """Each is a model folder; the last step's is the model, and keeping them changes nothing."""
    main(hops("kept", DROPOUT, "--snapshots=[5, 20]"))
    main(hops("bare", DROPOUT))
    assert measured(tmp_path / "kept") == measured(tmp_path / "bare")
    snapshots = sorted((tmp_path / "kept" / "snapshots").iterdir())
    assert [folder.name for folder in snapshots] == ["step-000000005", "step-000000020"]
    early, late, final = (
        LoopedForCausalLM.from_pretrained(folder).state_dict() for folder in (*snapshots, tmp_path / "kept" / "model")
    )
    assert all(torch.equal(late[key], final[key]) for key in final)
    assert not all(torch.equal(early[key], final[key]) for key in final)
