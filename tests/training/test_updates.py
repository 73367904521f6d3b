"""What an update is: the same however its batch is split, its layers computed or its model measured."""

import importlib.metadata
import json
import math
import re

import pytest
import torch
import yaml
from torch._inductor.exc import InvalidCxxCompiler

from looplab.training.optimizers import lr_factor
from looplab.training.recipe import Optim
from toy_runs import measured, reset_accelerator
from train import main

HYPER = ("--model.loop_connection=hyper", "--model.num_streams=2")
DROPOUT = "--model.residual_dropout=0.2"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("flags", [[], ["--data.pad_to=12"]])
def test_accumulated_micro_batches_are_one_batch(hops, tmp_path, flags):
    main(hops("whole", "--optim.kind=adamw", *flags))
    main(hops("parts", "--optim.kind=adamw", "--accumulation_steps=2", *flags))
    assert [loss for _, loss in measured(tmp_path / "parts")] == pytest.approx(
        [loss for _, loss in measured(tmp_path / "whole")], abs=1e-5
    )


def test_a_batch_that_does_not_divide_raises(hops):
    with pytest.raises(ValueError, match=r"batch_size 16 does not divide into 1 processes x 3"):
        main(hops("run", "--accumulation_steps=3"))


def test_evaluating_more_often_changes_nothing(hops, tmp_path):
    """Training mode is on again after each evaluation, else dropout would be off for ever (Kohli et al.'s code)."""
    main(hops("often", DROPOUT, "--check_every=2"))
    main(hops("never", DROPOUT, "--check_every=1000"))
    assert measured(tmp_path / "often") == measured(tmp_path / "never")


def test_the_summary_tells_what_was_trained(hops, tmp_path):
    summary = main(hops("run", "--trackers=[tensorboard]", "--eval_loops=[2, 6]"))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["trained_hops"] == [1, 2]
    assert summary["trained_loops"]["minimum"] == 2
    assert summary["trained_loops"]["maximum"] == 4
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(summary["gate"]) == {str(k) for k in range(2, 9)}
    assert all(set(value) == {"2", "6"} for _, value in measured(tmp_path / "run", "gate_at_loops"))
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["optim"]["lr"] == 1e-3
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_bf16_takes_steps_near_fp32(hops, tmp_path):
    main(hops("fp32"))
    reset_accelerator()
    main(hops("bf16", "--precision=bf16"))
    first, second = measured(tmp_path / "fp32"), measured(tmp_path / "bf16")
    assert second != first
    assert second[0][1] == pytest.approx(first[0][1], abs=2e-2)


def test_checkpointed_layers_give_the_same_losses(hops, tmp_path):
    """They are computed again in the backward pass, and to the same numbers."""
    calls = {"kept": 0, "computed_again": 0}
    for name, flag in (("kept", "false"), ("computed_again", "true")):

        def count(module, args, name=name):
            calls[name] += 1

        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        main(hops(name, "--optim.kind=adamw", f"--gradient_checkpointing={flag}"))
        hook.remove()
    assert calls["computed_again"] > calls["kept"]
    assert [loss for _, loss in measured(tmp_path / "computed_again")] == pytest.approx(
        [loss for _, loss in measured(tmp_path / "kept")], abs=1e-5
    )


def test_num_grad_loops_cuts_the_gradient(hops, tmp_path):
    main(hops("all"))
    main(hops("last", "--num_grad_loops=1"))
    all_loops, last_loop = measured(tmp_path / "all"), measured(tmp_path / "last")
    assert last_loop[0] == all_loops[0]
    assert last_loop[-1] != all_loops[-1]


def test_label_smoothing_is_that_of_the_first_loss(hops, tmp_path):
    """(1 - s) CE(gold) + s x mean CE over the vocabulary, on the first batch of the same weights."""
    main(hops("plain"))
    main(hops("smooth", "--optim.label_smoothing=0.4"))
    main(hops("flat", "--optim.label_smoothing=0.999999"))
    plain, smooth, flat = (measured(tmp_path / name)[0][1] for name in ("plain", "smooth", "flat"))
    assert flat != pytest.approx(plain, abs=1e-3)
    assert smooth == pytest.approx(0.6 * plain + 0.4 * flat, abs=1e-4)


# Both come from inside torch 2.13's compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_give_the_same_losses(hops, tmp_path):
    """Layers and, here, the gates that read and write the streams between loops."""
    flags = [
        "--optim.kind=adamw",
        "--max_steps=2",
        "--data.overrides.max_hops=3",
        *HYPER,
        "--model.hyper_gates=shared",
    ]
    main(hops("eager", *flags))
    main(hops("compiled", *flags, "--compile=true"))
    assert [loss for _, loss in measured(tmp_path / "compiled")] == pytest.approx(
        [loss for _, loss in measured(tmp_path / "eager")], abs=1e-4
    )


def test_a_run_ends_with_its_time(hops):
    summary = main(hops("run", "--max_steps=null", "--max_seconds=0.3"))
    assert 0.3 <= summary["seconds"] < 30
    assert summary["steps"] >= 1


def test_schedules():
    """Warm-up counts from the stage's start; every shape but constant ends at zero."""
    for schedule in ("constant", "linear", "cosine", "wsd"):
        optim = Optim(schedule=schedule, warmup_steps=10)
        assert lr_factor(optim, 4, 0.0) == 0.5
        assert lr_factor(optim, 100, 0.0) == 1.0
        assert lr_factor(optim, 100, 1.0) == pytest.approx(float(schedule == "constant"), abs=1e-12)
    assert lr_factor(optim, 100, 0.8) == pytest.approx(1.0)
    assert lr_factor(optim, 100, 0.9) == pytest.approx(0.5)
    cosine = Optim(schedule="cosine", final_share=0.1)
    assert [lr_factor(cosine, 100, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_loss_that_is_not_finite_stops_the_run(hops, tmp_path, every):
    """No row and no checkpoint holds it, whether the loss of an update is read with it or with the next one."""
    flags = ["--optim.kind=adamw", "--optim.lr=1e30", f"--checkpoint_every={every}", "--log_every=5"]
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+") as error:
        main(hops("run", *flags))
    gone = int(re.search(r"at step (\d+)", str(error.value))[1])
    assert all(math.isfinite(loss) for _, loss in measured(tmp_path / "run"))
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert json.loads((checkpoint / "state.json").read_text())["state"]["step"] < gone


def test_a_row_has_the_loss_of_its_own_update(hops, tmp_path):
    """Whichever updates have rows."""
    main(hops("all", "--log_every=1"))
    every = dict(measured(tmp_path / "all"))
    for pace in (3, 7):
        main(hops(f"some-{pace}", f"--log_every={pace}", "--check_every=9", "--checkpoint_every=8"))
        some = dict(measured(tmp_path / f"some-{pace}"))
        assert some == {step: every[step] for step in [*range(pace, 20, pace), 20]}


def test_compiling_without_a_compiler_ends_in_a_sentence(hops, monkeypatch, tmp_path):
    """Before any work."""
    from torch._inductor import cpp_builder

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler.*install g\+\+"):
        main(hops("run", "--compile=true"))
    assert not (tmp_path / "run").exists()
