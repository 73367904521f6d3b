"""Training one KV row per token: from labels, and from a teacher with a row per loop."""

import pytest
import torch

from modeling_looped import LoopedForCausalLM
from toy_runs import measured, reset_accelerator, train_in_two
from train import main

GATED = "--model={kv_sharing: gated, prefill_chunk: 5, num_loops: 3}"


@pytest.fixture
def teacher(trained):
    """The folder of a trained model with a row per loop."""
    return trained("text") / "model"


def gated_from(teacher, *flags: str) -> list[str]:
    return [f"--init_from={teacher}", "--data.vocab_size=null", GATED, *flags]


def distilled_from(teacher, phase: str, *flags: str) -> list[str]:
    return gated_from(teacher, f"--distill.teacher={teacher}", f"--distill.phase={phase}", *flags)


@pytest.mark.slow
def test_a_gated_model_trains_on_labels_from_a_per_loop_one(text, teacher, tmp_path):
    """Its weights are taken over, its gates are new, and chunks cut or not give the same first loss."""
    flags = gated_from(teacher, "--optim.kind=adamw")
    main(text("whole", *flags))
    main(text("cut", *flags, "--cut_chunks=true"))
    main(text("again", *flags, "--gradient_checkpointing=true"))
    whole, cut, again = (measured(tmp_path / name) for name in ("whole", "cut", "again"))
    assert whole[0] == cut[0]
    assert whole[-1] != cut[-1]
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in whole], abs=1e-5)
    assert LoopedForCausalLM.from_pretrained(tmp_path / "whole" / "model").config.prefill_chunk == 5


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["interpolation", "alignment"])
def test_a_resumed_distillation_equals_an_uninterrupted_one(text, teacher, tmp_path, phase):
    flags = distilled_from(teacher, phase)
    main(text("whole", *flags))
    main(text("parts", *flags))
    for later in ("model", "checkpoints/step-000000020"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    main(text("parts", *flags))
    for key in ("loss", "held_out"):
        assert measured(tmp_path / "parts", key) == measured(tmp_path / "whole", key)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-6), ("bf16", 1e-3)])
def test_the_interpolation_begins_at_the_teacher(text, teacher, tmp_path, precision, rounding):
    """In the first update alpha is 0: the student is the teacher, and only later there is something to learn. Under
    bf16 both memories once had different precisions, and could not be mixed."""
    still = ("--optim.lr=0", "--optim.muon_lr=0", f"--precision={precision}")
    main(text("second", *distilled_from(teacher, "interpolation", *still)))
    losses = [loss for _, loss in measured(tmp_path / "second")]
    assert losses[0] == pytest.approx(0.0, abs=rounding)
    assert losses[-1] > losses[0]


@pytest.mark.slow
def test_gates_can_learn_at_a_rate_of_their_own(text, teacher, tmp_path):
    still = ("--optim.lr=0", "--optim.muon_lr=0")
    main(text("gates", *distilled_from(teacher, "alignment", *still, "--optim.kv_gate_lr=0.01")))
    before, after = (LoopedForCausalLM.from_pretrained(folder) for folder in (teacher, tmp_path / "gates" / "model"))
    known = before.state_dict()
    moved = {name for name, value in after.state_dict().items() if not value.equal(known.get(name, torch.empty(0)))}
    assert moved
    assert all(".kv_gate." in name for name in moved)
    assert after.model.core[0].kv_gate.of_input.weight.abs().sum() > 0


@pytest.mark.slow
def test_two_processes_distil_one_batch(text, trained, teacher, tmp_path):
    """The loss is computed inside the forward that DDP wraps, or ranks would not exchange their gradients."""
    flags = distilled_from(teacher, "alignment", "--optim.kind=adamw")
    main(text("one", *flags))
    data = [flag for flag in trained.data["text"] if "vocab_size" not in flag]
    train_in_two(tmp_path, "smoke_text.yaml", f"--output_dir={tmp_path}", "--name=two", *data, *flags)
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gradient_checkpointing=true"], "keeps the entries of both memories"),
        (["--cut_chunks=true"], "keeps the entries of both memories"),
        (["--num_grad_loops=1"], "takes neither num_grad_loops"),
        (["--model={kv_sharing: last, num_loops: 3}"], "set model.kv_sharing to gated"),
    ],
)
def test_a_distillation_that_cannot_be_is_refused(text, teacher, flags, message):
    with pytest.raises(ValueError, match=message):
        main(text("second", *distilled_from(teacher, "interpolation", *flags)))


def test_rows_with_padding_are_not_distilled(hops, molecules):
    """A teacher is asked of every token: it would be asked of the padding, too."""
    teacher = "--distill.teacher=nowhere"
    for recipe, message in (
        (hops("run", teacher, "--data.pad_to=12"), r"data\.pad_to pads them"),
        (molecules("run", teacher), "packing pads them"),
        (hops("run", teacher), "distill.teacher: there is no folder 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            main(recipe)
        reset_accelerator()
