"""A run that was interrupted equals one that was not, and what is finished or another's stays as it is."""

import shutil
import signal
import time

import pytest
import torch

from forks import Fork
from looplab.training.checkpoints import TrainingState, completed, digests_of
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
    (weights,) = (checkpoints / "step-000000020" / "tensors").glob("*.distcp")
    weights.write_bytes(weights.read_bytes()[:-100])
    (checkpoints / "partial" / "tensors").mkdir(parents=True)
    (checkpoints / "partial" / "tensors" / "__0_0.distcp").write_text("half")
    main(hops("run", "--checkpoint_every=6"))
    assert "step-000000020 is incomplete or corrupt" in caplog.text
    assert measured(tmp_path / "run") == whole
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000000018", "step-000000020"]


def test_without_an_intact_checkpoint_nothing_is_begun_again(hops, tmp_path):
    main(hops("run"))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "checkpoints" / "step-000000020" / "process-00000.pt").unlink()
    (tmp_path / "run" / "checkpoints" / "step-000000010" / "state.json").write_text('{"state": {"sta')
    with pytest.raises(ValueError, match=r"step-000000020 .*process-00000\.pt is missing.*bring back"):
        main(hops("run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_checkpoint_of_an_older_version_is_gone_on_from(hops, tmp_path, monkeypatch):
    """They were accelerate's: one file of weights, and one of each optimizer."""

    def write(training, folder):
        training.accelerator.save_state(folder, safe_serialization=False)
        return completed(digests_of(folder))

    main(hops("whole", DROPOUT))
    with monkeypatch.context() as older:
        older.setattr(TrainingState, "write", write)
        main(hops("parts", DROPOUT, "--max_steps=10"))
    assert (tmp_path / "parts" / "checkpoints" / "step-000000010" / "pytorch_model.bin").is_file()
    main(hops("parts", DROPOUT))
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")


def test_a_checkpoint_of_another_model_is_refused(hops, tmp_path):
    main(hops("run", "--max_steps=10"))
    main(hops("other", "--max_steps=10", "--model.hidden_size=48"))
    theirs, ours = (tmp_path / name / "checkpoints" / "step-000000010" for name in ("other", "run"))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"does not fit this model \(its model\.embed_tokens\.weight is \(\d+, 48\)"):
        main(hops("run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == rows


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
