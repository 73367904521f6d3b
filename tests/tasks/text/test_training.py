"""Training on text: a resumed run is the same, a batch is one, the model folder has the loss that was measured."""

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, GenerationConfig

from data_builders import load_task
from looplab.tasks.language.training import held_out_exits
from modeling_looped import LoopedForCausalLM
from toy_runs import measured, reset_accelerator
from toys import ROOT, make_model
from train import main, read_recipe

pytestmark = pytest.mark.slow

DROPOUT = "--model.residual_dropout=0.2"
TEXT_RECIPE = ROOT / "recipes" / "smoke_text.yaml"
AT_LOOPS = "held_out_at_loops"


def test_a_resumed_text_run_equals_an_uninterrupted_one(text, tmp_path):
    whole = main(text("whole", DROPOUT))
    main(text("parts", DROPOUT))
    for later in ("model", "checkpoints/step-000000020"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    parts = main(text("parts", DROPOUT))
    for key in ("loss", "held_out", AT_LOOPS):
        assert measured(tmp_path / "parts", key) == measured(tmp_path / "whole", key)
    assert [step for step, _ in measured(tmp_path / "whole", "held_out")] == [10, 20]
    assert main(text("whole", DROPOUT)) == whole
    assert parts["held_out"] == whole["held_out"]
    assert not {"gate", "learnable_depth", "stage", "trained_hops"} & set(whole)


def test_accumulated_blocks_are_one_batch(text, tmp_path):
    flags = ["--optim.kind=adamw"]
    main(text("whole", *flags))
    main(text("parts", *flags, "--accumulation_steps=4"))
    main(text("again", *flags, "--gradient_checkpointing=true"))
    whole = [loss for _, loss in measured(tmp_path / "whole")]
    assert [loss for _, loss in measured(tmp_path / "parts")] == pytest.approx(whole, abs=1e-5)
    assert [loss for _, loss in measured(tmp_path / "again")] == pytest.approx(whole, abs=1e-5)


def test_an_exit_gate_is_trained_in_two_stages(text, tmp_path):
    """First model and gate by the expected loss, then the gate alone: the weights of the rest do not move."""
    gate = (
        "--model={num_core_layers: 1, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_loops: 3, "
    )
    main(text("first", gate + "exit_gate: true, exit_entropy_weight: 0.05}"))
    stage = ["--data.vocab_size=null", f"--init_from={tmp_path / 'first' / 'model'}", "--optim.kind=adamw"]
    main(text("second", *stage, "--model={exit_loss: gate}"))
    first, second = (LoopedForCausalLM.from_pretrained(tmp_path / run / "model") for run in ("first", "second"))
    assert second.config.exit_loss == "gate"
    moved = {name for name, value in second.state_dict().items() if not torch.equal(value, first.state_dict()[name])}
    assert moved == {"model.exit_gate.weight", "model.exit_gate.bias"}
    for run in ("first", "second"):
        for _, exits in measured(tmp_path / run, "exits"):
            assert 1 < exits["mean_loop"] < 3
            assert 0 < exits["entropy"] <= math.log(3)
    # Another task's readout, and what the loss cannot be combined with.
    with pytest.raises(ValueError, match=r"leave optim\.label_smoothing"):
        main(text("third", gate + "exit_gate: true}", "--optim.label_smoothing=0.1"))


@pytest.mark.parametrize("exit_loss", ["expected", "gate"])
def test_micro_batches_of_an_exit_gate_are_one_batch(text, tmp_path, exit_loss):
    """What is logged is a mean over labels, however an update is split; it was once divided by them twice."""
    flags = ["--optim.kind=adamw", "--max_steps=3", f"--model.exit_loss={exit_loss}", "--model.exit_gate=true"]
    main(text("whole", *flags))
    main(text("split", *flags, "--accumulation_steps=4"))
    whole, split = ([loss for _, loss in measured(tmp_path / name)] for name in ("whole", "split"))
    assert split == pytest.approx(whole, abs=1e-5)
    assert whole[0] == pytest.approx({"expected": 5.63, "gate": 0.7}[exit_loss], abs=0.5)  # ln 280; near even odds


@torch.no_grad()
def test_measured_exits_are_those_of_a_naive_sum():
    model = make_model(exit_gate=True, num_loops=3)
    torch.nn.init.normal_(model.model.exit_gate.weight)
    ids = torch.arange(1, 49).view(4, 12)
    labels = torch.where(ids % 5 == 0, -100, ids + 1)

    measured = held_out_exits(Accelerator(), model, [{"input_ids": ids, "shift_labels": labels}], 3)
    kept, left = labels != -100, torch.ones(4, 12)
    expected = mean_loop = entropy = 0.0
    for loops in (1, 2, 3):
        logits = model(ids, num_loops=loops).logits
        state = model.model(ids, num_loops=loops).last_hidden_state  # already normalised
        chance = model.model.exit_logits(state).sigmoid() if loops < 3 else torch.ones(4, 12)
        p, left = left * chance, left * (1 - chance)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        expected += float((p * loss)[kept].mean())
        mean_loop += loops * float(p[kept].mean())
        entropy -= float((p * p.log())[kept].mean())
    assert measured == pytest.approx({"expected_loss": expected, "mean_loop": mean_loop, "entropy": entropy}, rel=1e-4)


def test_measuring_text_more_often_changes_nothing(text, tmp_path):
    main(text("often", DROPOUT, "--check_every=2"))
    main(text("never", DROPOUT, "--check_every=1000", "--eval_loops=[]"))
    assert measured(tmp_path / "often") == measured(tmp_path / "never")


def test_the_model_folder_alone_has_the_loss_the_run_measured(text, tmp_path):
    """A naive twin: the held-out documents in a row, one block after the other, the model's own loss."""
    summary = main(text("run"))
    folder = tmp_path / "run" / "model"
    model, tokenizer = LoopedForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).num_loops == 2
    data = text("run").data
    held_out = load_task("text", "files", files=data.files, **data.overrides)["validation"]
    stream = [i for text in held_out["text"] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    for num_loops, expected in ({None: summary["held_out"]} | summary[AT_LOOPS]).items():
        losses = []
        for start in range(0, 256, 32):
            ids = torch.tensor([stream[start : start + 33]])
            loops = None if num_loops is None else int(num_loops)
            losses.append(model(ids, labels=ids, num_loops=loops).loss.item())
        loss = sum(losses) / len(losses)
        assert expected["loss"] == pytest.approx(loss, abs=1e-5)
        assert expected["perplexity"] == pytest.approx(2.718281828**loss, rel=1e-4)
    assert summary["held_out_tokens"] == 256
    assert set(summary[AT_LOOPS]) == {"1", "2", "4"}


def test_text_is_learnt(text):
    """From the entropy of the vocabulary to near that of the toy's thirteen words."""
    summary = main(text("run", "--max_steps=150", "--check_every=1000", "--optim.lr=1e-2"))
    assert summary["held_out"]["loss"] < 3.0 < 5.6


def test_bf16_text_is_near_fp32(text, tmp_path):
    main(text("fp32"))
    reset_accelerator()
    main(text("bf16", "--precision=bf16"))
    first, second = measured(tmp_path / "fp32"), measured(tmp_path / "bf16")
    assert second != first
    assert second[0][1] == pytest.approx(first[0][1], abs=2e-2)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--curriculum.start_hops=2", r"curriculum\.start_hops is not for the task text: leave it out"),
        ("--curriculum.threshold=0.5", r"curriculum\.threshold is not for the task text"),
        ("--data.pad_to=50", r"data\.pad_to is not for the task text"),
        ("--data.config=paper", r"data\.config is not for the task text"),
        ("--data.sequence_length=null", r"data\.sequence_length must be set for the task text"),
        ("--data.validation_tokens=0", r"data\.validation_tokens must be >= 1, got 0"),
        ("--data.vocab_size=null", r"one of init_from, data\.tokenizer, data\.vocab_size, got none"),
        ("--data.tokenizer=folder", r"got data\.tokenizer and data\.vocab_size"),
        ("--init_from=folder", r"got init_from and data\.vocab_size"),
        ("--data.task=khop", r"data\.files is not for the task khop"),
    ],
)
def test_a_field_of_another_task_raises(flag, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(TEXT_RECIPE, [flag])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_too_short_for_a_block_is_named_before_the_first_step(text, tmp_path, split):
    shares = {"validation": (0.02, 0.3), "test": (0.3, 0.02)}[split]
    fields = f"{{document_characters: 100, validation_share: {shares[0]}, test_share: {shares[1]}}}"
    with pytest.raises(ValueError, match=rf"the split {split} has \d+ tokens, too few for a block of 600"):
        main(text("run", f"--data.overrides={fields}", "--data.sequence_length=600"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_may_come_from_a_folder(text, tmp_path):
    main(text("first", "--max_steps=1"))
    folder = tmp_path / "first" / "model"
    main(text("second", "--max_steps=1", "--data.vocab_size=null", f"--data.tokenizer={folder}"))
    assert measured(tmp_path / "second") == measured(tmp_path / "first")
    with pytest.raises(ValueError, match=r"data\.tokenizer: there is no tokenizer in the folder 'nowhere'"):
        main(text("third", "--data.vocab_size=null", "--data.tokenizer=nowhere"))
