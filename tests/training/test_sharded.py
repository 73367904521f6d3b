"""Sharded processes (FSDP2) train, save and go on as one process does, over gloo on CPUs."""

import json
import re
import subprocess

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from looplab.training.stopping import REQUEUE
from modeling_looped import LoopedForCausalLM
from toy_runs import ended, measured, sharded, train_in
from toys import ROOT
from train import main

# Largest difference of a loss. Muon orthogonalizes in bfloat16: a sum in another order may move a number to the
# bfloat16 beside it.
OPTIMIZERS = {"adamw": 1e-6, "muon": 2e-3}


def divided_into(run, step: int) -> set[int]:
    """Numbers of pieces that weights and moments of a checkpoint are in, but for those of less than four rows."""
    known = FileSystemReader(run / "checkpoints" / f"step-{step:09d}" / "tensors").read_metadata().state_dict_metadata
    return {len(tensor.chunks) for tensor in known.values() if len(tensor.size) == 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_then_four_then_one_process_are_one(kind, hops, tmp_path):
    """Each goes on with what another number of processes has saved; the head is tied to embeddings."""
    flags = [f"--optim.kind={kind}", "--check_every=4", "--checkpoint_every=4", "--max_shard_size=9KB"]
    flags += ["--data.overrides.gate_per_hop=3"]  # the last of four processes has nothing to evaluate
    many = [f"--output_dir={tmp_path}", "--name=many", *flags]
    ended(train_in(2, tmp_path, "smoke.yaml", *many, "--max_steps=4", **sharded()))
    ended(train_in(4, tmp_path, "smoke.yaml", *many, "--max_steps=8", **sharded()))
    assert [divided_into(tmp_path / "many", step) for step in (4, 8)] == [{2}, {4}]
    main(hops("one", *flags, "--max_steps=8"))
    by_four, by_one = (
        LoopedForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("many", "one")
    )
    assert by_four.keys() == by_one.keys()
    for name, tensor in by_four.items():
        torch.testing.assert_close(tensor, by_one[name], atol=10 * OPTIMIZERS[kind], rtol=0)
    files = [sorted(path.name for path in (tmp_path / name / "model").iterdir()) for name in ("many", "one")]
    assert files[0] == files[1]
    assert sum(name.endswith(".safetensors") for name in files[0]) > 3

    for name in ("many", "one"):
        main(hops(name, *flags, "--max_steps=12"))
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("many", "one")]
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], abs=OPTIMIZERS[kind])
    assert measured(tmp_path / "many", "gate") == measured(tmp_path / "one", "gate")


@pytest.mark.slow
def test_a_resumed_sharded_run_equals_an_uninterrupted_one(trained, tmp_path):
    """With dropout, and one held-out block, so that one of two processes has nothing to evaluate."""
    flags = [
        f"--output_dir={tmp_path}", "--model.residual_dropout=0.2", "--data.validation_tokens=32", "--check_every=3",
        "--checkpoint_every=4", *trained.data["text"],
    ]  # fmt: skip
    frees = sharded(FSDP_RESHARD_AFTER_FORWARD="true")
    ended(train_in(2, tmp_path, "smoke_text.yaml", *flags, "--name=whole", "--max_steps=8", **frees))
    for steps in (4, 8):
        ended(train_in(2, tmp_path, "smoke_text.yaml", *flags, "--name=parts", f"--max_steps={steps}", **frees))
    rows = [measured(tmp_path / name) for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    weights = [
        LoopedForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["hardware"]["processes"] == 2


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_an_engine_with_stages_is_refused_with_the_reason(variable, hops, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="every loop comes back to the first"):
        main(hops("run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["TP_SIZE", "CP_SIZE", "SP_SIZE"])
def test_what_divides_layers_or_texts_is_refused(size, hops, tmp_path, monkeypatch):
    """accelerate would go on without a word where the model is not prepared for it."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}", "2")
    with pytest.raises(ValueError, match=f"asks for {size.lower()} 2.*dp_shard_size alone"):
        main(hops("run"))
    assert not (tmp_path / "run").exists()


def test_restarts_that_would_wait_for_ever_are_refused(hops, tmp_path, monkeypatch):
    """torchrun tells its processes how often it restarts them, and that one store serves all tries."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        main(hops("run"))
    assert not (tmp_path / "run").exists()


def test_the_batch_script_tells_what_the_config_tells():
    """Its processes are started without a launcher, so it repeats what accelerate reads of fsdp2.yaml."""
    script = (ROOT / "recipes" / "slurm" / "train.sh").read_text()
    told = dict(re.findall(r"^export (\w+)=(\w+)$", script, re.MULTILINE))
    assert told.items() <= sharded().items()
    assert {"ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_TRANSFORMER_CLS_TO_WRAP"} <= told.keys()
    assert f'"$status" -eq {REQUEUE}' in script
    assert subprocess.run(["bash", "-n", ROOT / "recipes" / "slurm" / "train.sh"]).returncode == 0


def test_the_first_version_of_fsdp_is_refused(hops, tmp_path, monkeypatch):
    for name, value in sharded(FSDP_VERSION="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="set fsdp_version to 2"):
        main(hops("run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_replicas_of_two_shards_are_one_process(kind, hops, tmp_path):
    """Hybrid sharding, by accelerate's ParallelismConfig; two sharded processes go on."""
    flags = [f"--optim.kind={kind}", "--check_every=4", "--checkpoint_every=4"]
    many = [f"--output_dir={tmp_path}", "--name=many", *flags]
    sizes = "--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"
    environment = sharded("--use_fsdp", "--fsdp_version=2", "--use_parallelism_config", "--num_processes=4", *sizes)
    ended(train_in(4, tmp_path, "smoke.yaml", *many, "--max_steps=4", **environment))
    assert divided_into(tmp_path / "many", 4) == {2}
    ended(train_in(2, tmp_path, "smoke.yaml", *many, "--max_steps=8", **sharded()))
    main(hops("one", *flags, "--max_steps=8"))
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("many", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=OPTIMIZERS[kind])
    assert measured(tmp_path / "many", "gate") == measured(tmp_path / "one", "gate")
