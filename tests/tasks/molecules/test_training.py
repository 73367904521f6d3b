"""Laws of training on molecules: a resumed run is the same, no part of a batch weighs more, the model is the one
measured."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from data_builders import MoleculesConfig, PackedMolecules, load_molecules
from modeling_looped import LoopedForCausalLM
from modeling_looped.losses_looped import exit_distribution
from toy_runs import measured, reset_accelerator
from toys import ROOT
from train import main, read_recipe

pytestmark = pytest.mark.slow

DROPOUT = "--model.residual_dropout=0.2"


def test_a_resumed_run_equals_an_uninterrupted_one(molecules, tmp_path):
    """Over the end of an epoch of nine steps, with spellings that change there."""
    flags = (DROPOUT, "--data.spellings=2")
    whole = main(molecules("whole", *flags))
    main(molecules("parts", *flags))
    for later in ("model", "checkpoints/step-000000030"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    parts = main(molecules("parts", *flags))
    for key in ("loss", "held_out", "held_out_at_loops", "tokens"):
        assert measured(tmp_path / "parts", key) == measured(tmp_path / "whole", key)
    assert parts["held_out"] == whole["held_out"]
    assert (whole["train_molecules"], whole["held_out_molecules"]) == (141, 17)
    weights = [
        LoopedForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_every_token_of_a_batch_weighs_alike(molecules, tmp_path):
    """Micro-batches hold rows that are filled unevenly; their losses are of sums, not means of means."""
    main(molecules("whole", "--optim.kind=adamw"))
    reset_accelerator()
    main(molecules("parts", "--optim.kind=adamw", "--accumulation_steps=4"))
    whole = [loss for _, loss in measured(tmp_path / "whole")]
    assert [loss for _, loss in measured(tmp_path / "parts")] == pytest.approx(whole, abs=1e-5)


def test_the_model_folder_alone_has_the_loss_the_run_measured(molecules, tmp_path):
    """A naive twin: held-out molecules one by one, each with the model's own loss; and it writes without being told
    how."""
    summary = main(molecules("run"))
    folder = tmp_path / "run" / "model"
    model, tokenizer = LoopedForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    splits = load_molecules("files", molecules("run").data.files, **molecules("run").data.overrides)
    held_out = splits["validation"]["text"][: summary["held_out_molecules"]]
    for num_loops, expected in ({"3": summary["held_out"]} | summary["held_out_at_loops"]).items():
        total = count = 0
        for text in held_out:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            total += model(ids, labels=ids, num_loops=int(num_loops)).loss.item() * (ids.numel() - 1)
            count += ids.numel() - 1
        assert expected["loss"] == pytest.approx(total / count, abs=1e-5)
        assert count <= 300
    assert not set(held_out) & set(splits["train"]["text"])
    written = GenerationConfig.from_pretrained(folder)
    assert (written.num_loops, written.temperature, written.top_k, written.max_new_tokens) == (3, 0.8, 40, 120)
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (1, 2, 0)
    torch.manual_seed(0)
    assert model.generate(num_return_sequences=2, max_new_tokens=5).shape[0] == 2


def test_exits_of_packed_molecules_are_those_of_each_alone(molecules, tmp_path):
    """The expected loss in metrics.jsonl was 1.6 where no loop's was above 0.8: exits were read without the positions
    that hold the molecules of a row apart."""
    flags = ("--model.exit_gate=true", "--max_steps=30")
    main(molecules("run", *flags))
    folder = tmp_path / "run" / "model"
    model, tokenizer = LoopedForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    splits = load_molecules("files", molecules("run").data.files, **molecules("run").data.overrides)
    totals, count = torch.zeros(2), 0
    for text in splits["validation"]["text"]:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            gate_logits, losses = model.exits(ids[:, :-1], ids[:, 1:], 3)
        p = exit_distribution(gate_logits)
        totals += torch.stack([(p * losses).sum(), (p * torch.tensor([1, 2, 3])).sum()])
        count += ids.numel() - 1
    _, exits = measured(tmp_path / "run", "exits")[-1]
    assert [exits["expected_loss"], exits["mean_loop"]] == pytest.approx((totals / count).tolist(), rel=1e-4)


def test_molecules_are_learnt(molecules):
    """From the entropy of the vocabulary, ln 21, to near that of the toys, whose three parts are drawn alike."""
    summary = main(molecules("run", "--max_steps=60", "--check_every=1000", "--optim.lr=1e-2"))
    assert summary["held_out"]["loss"] < 0.8 < 3.0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.vocab_size=300", r"data\.vocab_size is not for the task molecules"),
        ("--data.pad_to=30", r"data\.pad_to is not for the task molecules"),
        ("--curriculum.start_hops=1", r"curriculum\.start_hops is not for the task molecules"),
        ("--data.sequence_length=null", r"data\.sequence_length must be set for the task molecules"),
        ("--data.spellings=0", r"data\.spellings must be >= 1, got 0"),
    ],
)
def test_a_field_of_another_task_raises(molecules, flag, message):
    with pytest.raises(ValueError, match=message):
        molecules("run", flag)


@pytest.mark.parametrize("task", ["khop", "text"])
def test_spellings_are_of_molecules(task):
    smoke = ROOT / "recipes" / {"khop": "smoke.yaml", "text": "smoke_text.yaml"}[task]
    with pytest.raises(ValueError, match=rf"data\.spellings is not for the task {task}"):
        read_recipe(smoke, ["--data.spellings=2"])


def test_rows_too_short_for_a_molecule_are_refused_before_training(molecules, tmp_path):
    with pytest.raises(ValueError, match=r"sequence_length must be at least"):
        main(molecules("run", "--data.sequence_length=8"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# What only held-out molecules have is told before the first step


def held_out(tmp_path: Path, split: str, end: str) -> tuple[list[str], str, int]:
    """Flags that put one molecule, with the `end`, into a held-out split; and the name of its file and its line."""
    toys = ROOT / "docs" / "molecules" / "toys.smi"
    if split == "validation":
        config = MoleculesConfig(validation_share=0.1, test_share=0.1)
        molecule = next(text for n in range(1, 99) if config.split_of(text := "C" * n + end) == split)
        (tmp_path / "toys.smi").write_bytes(toys.read_bytes() + f"\n{molecule} odd\n".encode())
        lines = toys.read_text(encoding="utf-8").count("\n") + 2
        return [f"--data.files=[{tmp_path}/toys.smi]"], "toys.smi", lines
    (tmp_path / "odd.csv").write_text(f"SMILES\nCCCl\n\nCC{end}\n", encoding="utf-8")
    share = 0.0 if split == "test" else 0.1
    fields = f"{{{split}_files: [{tmp_path}/odd.csv], validation_share: 0.1, test_share: {share}}}"
    return [f"--data.overrides={fields}"], "odd.csv", 4


@pytest.mark.parametrize("split", ["validation", "test", "test_scaffolds"])
@pytest.mark.parametrize(("end", "token"), [("[Se]C", "[Se]"), ("I", "I"), ("C%10CCC%10", "%10"), ("C$C", "$")])
def test_a_token_that_only_held_out_molecules_have_is_named(molecules, tmp_path, split, end, token):
    flags, source, line = held_out(tmp_path, split, end)
    with pytest.raises(ValueError, match="no token for") as raised:
        main(molecules("run", *flags))
    said = str(raised.value)
    assert f"no token for {token!r} in" in said
    assert end in said
    assert re.search(rf"\(split {split}, source \S*{source}, line {line}\)", said)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("split", ["validation", "test", "test_scaffolds"])
def test_a_held_out_molecule_that_is_too_long_is_named(molecules, tmp_path, split):
    flags, *_ = held_out(tmp_path, split, "C" * 100)
    with pytest.raises(ValueError, match=r"sequence_length must be at least 10\d, the tokens of 'CC"):
        main(molecules("run", *flags))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_token_that_the_model_to_begin_from_lacks_is_named(molecules, tmp_path):
    """When training goes on from it, and when it is to be measured on other molecules."""
    main(molecules("first", "--max_steps=1"))
    others = [f"{'C' * i}[Se]{'C' * j}" for i in range(1, 9) for j in range(9)]
    (tmp_path / "odd.smi").write_text("\n".join(others), encoding="utf-8")
    message = r"no token for '\[Se\]' in .* \(split {}, source odd\.smi, line \d+\)"
    flags = (f"--data.files=[{tmp_path}/odd.smi]", f"--init_from={tmp_path}/first/model", "--model={}")
    with pytest.raises(ValueError, match=message.format("train")):
        main(molecules("second", *flags))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first" / "model")
    splits = load_molecules("files", [f"{tmp_path}/odd.smi"], validation_share=0.2, test_share=0.2)
    with pytest.raises(ValueError, match=message.format("test")):
        PackedMolecules(splits["test"], tokenizer, 76)


def test_a_vocabulary_too_small_for_the_tokens_is_refused(molecules, tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size must be at least \d+, the tokens .*, got 9"):
        main(molecules("run", "--model.vocab_size=9"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
