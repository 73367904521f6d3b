"""A row tells of the work since the row before; a loss that is not finite or far above the others stops the run, which
says where, on which rows of data, and loses nothing."""

import json
import math
import re
import time

import pytest

from data_builders import HopBatches
from looplab.instruments.devices import DEVICES, known_device
from looplab.instruments.flops import training_flops
from looplab.mistakes import sentence
from looplab.training.watch import FEWEST, NAMED, WINDOW, Watch, spikes
from modeling_looped import LoopedConfig
from toy_runs import measured, rows_of
from toys import ROOT
from train import main

PEAK = 1e9


def test_a_row_tells_of_the_work_since_the_row_before(hops, tmp_path, monkeypatch):
    """Rates by hand; slow batches are waited for; the share of a peak is that of the FLOPs of the batches."""
    monkeypatch.setattr("looplab.training.watch.peak_of", lambda device, precision: PEAK)
    batches, get = [], HopBatches.__getitem__

    def slow(self, step):
        time.sleep(0.01)
        batches.append(get(self, step))
        return batches[-1]

    monkeypatch.setattr(HopBatches, "__getitem__", slow)
    main(hops("run", "--log_every=5", "--check_every=10"))
    config = LoopedConfig.from_pretrained(tmp_path / "run" / "model")
    before = {"step": 0, "tokens": 0, "seconds": 0.0}
    rows = [row for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for row in rows:
        elapsed, since = row["seconds"] - before["seconds"], batches[before["step"] : row["step"]]
        flops = sum(training_flops(config, *b["input_ids"].shape, b["num_loops"], logits_kept=1) for b in since)
        assert row["tokens_per_second"] == pytest.approx((row["tokens"] - before["tokens"]) / elapsed)
        assert row["updates_per_second"] == pytest.approx(5 / elapsed)
        assert row["of_peak"] == pytest.approx(flops / elapsed / PEAK)
        assert 5 * 0.01 <= row["data_seconds"] < elapsed
        assert 10e6 < row["memory_bytes"] < 1e12
        assert row["grad_norm"] > 0
        before = row


def test_an_unknown_device_has_no_share_of_a_peak(hops, tmp_path):
    main(hops("run", "--log_every=20"))
    assert measured(tmp_path / "run", "of_peak") == []


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_device_is_known_by_what_torch_reports(reported, name):
    assert known_device(reported) is DEVICES[name]


def test_another_device_is_not_known():
    assert known_device("NVIDIA GeForce GTX 1080") is None


@pytest.fixture
def spiking(monkeypatch):
    """Updates 15 and later have a loss that is 30 nats higher."""
    check = Watch.check
    monkeypatch.setattr(Watch, "check", lambda self, step, loss: check(self, step, loss + 30 * (step == 15)))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["hops", "text", "molecules", "sequence"])
def test_a_spike_stops_the_run_and_names_update_rows_and_checkpoint(request, tmp_path, spiking, task):
    recipe = request.getfixturevalue(task)
    flags = ["--checkpoint_every=6", "--log_every=1", "--max_steps=20"]
    with pytest.raises(FloatingPointError) as error:
        main(recipe("run", *flags))
    said, run = sentence(error.value), tmp_path / "run"
    assert re.match(r"loss is \d+\.\d+ at step 15, \d\d\.\d nats above the mean of the 14 before, on the rows", said)
    assert f"the last good checkpoint is {run}/checkpoints/step-000000012:" in said
    *rows, last = rows_of(run / "metrics.jsonl")
    assert last["step"] == 15
    assert last["stopped"] in said
    assert last["rows"]
    assert f"the rows {', '.join(map(str, last['rows'][:NAMED]))}" in said
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 15))


@pytest.mark.slow
def test_nothing_is_lost_with_a_spike(hops, tmp_path, monkeypatch, spiking):
    """The same command stops at the same update, also right after a checkpoint; with a larger `spike` it goes on, and
    ends as a run that never stopped."""
    flags = ["--checkpoint_every=14", "--log_every=1"]
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"at step 15, .*step-000000014:.*a larger spike"):
            main(hops("run", *flags))
    main(hops("run", *flags, "--spike=null"))
    monkeypatch.undo()
    main(hops("whole", *flags))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert measured(tmp_path / "run", "stopped") == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("models/*/run/metrics.jsonl")), ids=lambda path: path.parts[-3])
def test_no_run_of_this_project_would_have_been_stopped(path):
    """By the default, on the losses that are on file."""
    losses = [json.loads(line).get("loss") for line in path.read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) > WINDOW
    for at in range(FEWEST, len(losses)):
        before = losses[max(0, at - WINDOW) : at]
        assert not spikes(losses[at], sum(before) / len(before), 10.0)


@pytest.mark.parametrize(
    ("loss", "usual", "spike", "expected"),
    [
        (12.9, 3.0, 10.0, False),
        (13.0, 3.0, 10.0, True),
        (500.0, 459.0, 10.0, False),  # the first losses of recipes/paper
        (918.0, 459.0, 10.0, True),
        (1e9, 3.0, None, False),
        (1e9, math.inf, 10.0, False),  # nothing is usual yet
        (3.0, 0.01, 2.0, True),
    ],
)
def test_a_spike_is_so_many_nats_above_the_usual_loss_and_twice_as_large(loss, usual, spike, expected):
    assert spikes(loss, usual, spike) == expected
