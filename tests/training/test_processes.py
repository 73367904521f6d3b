"""Two processes train and read as one does."""

import json
import os
import subprocess
import sys

import pytest

from toy_runs import measured, train_in_two
from toys import ROOT
from train import main

HYPER = ("--model.loop_connection=hyper", "--model.num_streams=2")
AT_LOOPS = "held_out_at_loops"


@pytest.mark.slow
def test_two_processes_are_one_batch(hops, tmp_path):
    """DDP over gloo, accumulating; `accelerate launch --cpu --num_processes 2` would start one process only."""
    flags = ["--optim.kind=adamw", "--accumulation_steps=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += [str(ROOT / "recipes" / "smoke.yaml"), f"--output_dir={tmp_path}", "--name=two", *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    main(hops("one", *flags))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["hardware"]["processes"] == 2
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-5)
    assert measured(tmp_path / "two", "gate") == measured(tmp_path / "one", "gate")
    assert len(list((tmp_path / "two" / "checkpoints" / "step-000000020").glob("process-*.pt"))) == 2


@pytest.mark.slow
def test_two_processes_read_one_text(text, trained, tmp_path):
    """DDP over gloo; the main process tokenises, and both measure the held-out loss of one. Of the loops, each with
    gates of its own, a batch runs some: DDP would wait for ever for the gradients of the others."""
    flags = [
        *HYPER,
        "--model.max_num_loops=4",
        "--optim.kind=adamw",
        "--accumulation_steps=2",
        "--data.validation_tokens=224",
    ]
    main(text("one", *flags))
    flags += [f"--output_dir={tmp_path}", "--name=two", *trained.data["text"]]
    train_in_two(tmp_path, "smoke_text.yaml", *flags, HF_DATASETS_CACHE=str(tmp_path / "other_cache"))
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["hardware"]["processes"] == 2
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["held_out_tokens"] == 7 * 32
    for path in ([], ["1"], ["4"]):
        key = AT_LOOPS if path else "held_out"
        one, two = (
            [(step, (value[path[0]] if path else value)["loss"]) for step, value in measured(tmp_path / name, key)]
            for name in ("one", "two")
        )
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-5)
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
