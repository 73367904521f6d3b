"""What a recipe says is trained is trained, and nothing else; the folder it leaves is a whole model."""

import re
from dataclasses import replace

import pytest
import torch

from looplab.cli import main as looped
from looplab.training.optimizers import build_optimizers
from looplab.training.processes import ModelFiles
from looplab.training.recipe import Optim, Train
from looplab.training.trained import TRAINED
from modeling_looped import LoopedForCausalLM
from toy_runs import measured, rows_of, train_in_two
from toys import FP32, make_ids, make_melt, make_model
from train import main

SECTIONS = {"num_prelude_layers": 1, "num_coda_layers": 1}
MODELS = {
    "plain": lambda: make_model(**SECTIONS),
    "damped": lambda: make_model(**SECTIONS, loop_connection="damped", kv_sharing="natural"),
    "hyper": lambda: make_model(loop_connection="hyper", loop_embedding="learned", norm_between_loops=True),
    "melt": lambda: make_melt(exit_gate=True, attention_bias=True, tie_word_embeddings=False),
}
WAYS = {
    "core": Train(what="core"),
    "lora": Train(what="lora", r=2, lora_alpha=8),
    "some": Train(what="lora", r=2, target_modules=["q_proj", "down_proj"]),
    "all": Train(what="lora", r=2, layers="all"),
}
LOOPS_OWN = ("connection.", "loop_embedding.", "core_norm.", "exit_gate.", ".kv_gate.")


def prepared(model, way: Train):
    trained = TRAINED[way.what](way)
    trained.prepare(model)
    return trained


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_trained_changes_and_the_saved_model_is_the_one_in_training(kind, way, tmp_path):
    """With either optimizer; also while layers are run again, where frozen embeddings leave no gradient to start from.
    The model goes on with the weights that it had before it was saved."""
    for optimizer in ("adamw", "muon"):
        model, before = MODELS[kind](), MODELS[kind]().state_dict()
        trained = prepared(model.train(), WAYS[way])
        optimizers = build_optimizers(model, Optim(kind=optimizer, lr=1e-2))
        held = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
        assert len(held) == len({id(p) for p in held})
        if optimizer == "muon":
            model.activation_checkpointing_enable({"use_reentrant": True})
        for _ in range(2):  # in the first update of an adapter one of its matrices is zero
            model(make_ids(), labels=make_ids(), use_cache=False).loss.backward()
            assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
            for one in optimizers:
                one.step()
                one.zero_grad()
        model.eval()
        expected, kept = model(make_ids()).logits, {name: p.clone() for name, p in model.state_dict().items()}
        ModelFiles(model, trained.weights(model), "5GB").save_pretrained(tmp_path / optimizer)
        assert all(tensor.equal(kept[name]) for name, tensor in model.state_dict().items())
        loaded = LoopedForCausalLM.from_pretrained(tmp_path / optimizer)
        torch.testing.assert_close(loaded(make_ids()).logits, expected, **FP32)
        after = loaded.state_dict()
        assert after.keys() == before.keys()
        changed = {name for name in before if not after[name].equal(before[name])}
        own = {name for name in before if any(part in name for part in LOOPS_OWN)}
        matrices = "|".join(WAYS[way].target_modules or ["proj"])
        sections = "prelude|core|coda" if way == "all" else "core"
        layers = {name for name in before if re.match(rf"model\.({sections})\.\d+\..*({matrices})\.weight", name)}
        if way == "core":
            layers = {name for name in before if name.startswith("model.core.")}
        assert changed - own == layers - own
        assert (changed & own != set()) == (kind != "plain")  # of a gate some gradients may be zero


def test_fresh_adapters_change_nothing():
    model = make_model(loop_connection="damped")
    expected = model(make_ids()).logits
    prepared(model, WAYS["all"])
    torch.testing.assert_close(model(make_ids()).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["core", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one_and_can_be_measured(way, text, trained, tmp_path):
    first = trained("text") / "model"
    flags = [
        f"--init_from={first}", "--model={}", "--data.vocab_size=null", f"--train.what={way}", "--max_steps=4",
        "--checkpoint_every=2", "--check_every=2", "--snapshots=[2]", "--eval_loops=[1,2]",
    ]  # fmt: skip
    flags += ["--train.r=2", "--train.lora_dropout=0.2"] if way == "lora" else []
    summary = main(text("whole", *flags))
    main(text("parts", *flags))
    for later in ("model", "checkpoints/step-000000004"):
        (tmp_path / "parts" / later).rename(tmp_path / later.replace("/", "-"))
    main(text("parts", *flags))
    for key in ("loss", "held_out"):
        assert measured(tmp_path / "parts", key) == measured(tmp_path / "whole", key)
    weights = [
        LoopedForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole/model", "parts/model", "whole/snapshots/step-000000002", str(first))
    ]
    assert weights[0].keys() == weights[3].keys()
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    differ = {name for name, tensor in weights[0].items() if not tensor.equal(weights[3][name])}
    assert differ
    assert all(name.startswith("model.core.") for name in differ)
    assert any(not weights[2][name].equal(weights[0][name]) for name in differ)
    assert 0 < summary["trained_parameters"] < summary["parameters"]
    assert summary["parameters"] == sum(p.numel() for p in LoopedForCausalLM.from_pretrained(first).parameters())
    assert looped(["eval", str(tmp_path / "whole"), "--loops", "1", "2"]) == 0
    losses = {row["loops"]: row["loss"] for row in rows_of(tmp_path / "whole" / "text.jsonl")}
    assert set(losses) == {1, 2}


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(text, trained, tmp_path):
    flags = [
        f"--init_from={trained('text') / 'model'}", "--model={}", "--data.vocab_size=null", "--train.what=lora",
        "--train.r=2", "--max_steps=2",
    ]  # fmt: skip
    main(text("one", *flags))
    flags += [f"--output_dir={tmp_path}", "--name=two", *trained.data["text"], "--data.vocab_size=null"]
    train_in_two(tmp_path, "smoke_text.yaml", *flags)
    losses = [[loss for _, loss in measured(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


WRONG = {
    "--train.what=core": "train.what=core leaves weights as they are: name trained ones in init_from",
    "--train.what=all": "train.what",
    "--train.r=4": "train.r is for train.what=lora",
    "--train.rank=4": "train.rank is not a recipe field",
    "--train.r=0": "train.r must be",
}


@pytest.mark.parametrize("flag", WRONG)
def test_what_cannot_be_trained_is_refused_by_name(flag, text):
    with pytest.raises(ValueError, match=re.escape(WRONG[flag])):
        text("wrong", flag)


def test_matrices_that_no_layer_has_are_named():
    way = replace(WAYS["lora"], target_modules=["q_proj", "query"])
    with pytest.raises(ValueError, match=r"names 'query', and the matrices of a layer are down_proj, gate_proj"):
        prepared(make_model(), way)


def test_adapters_without_their_library_name_it(text, trained, monkeypatch):
    monkeypatch.setattr("looplab.training.recipe.find_spec", lambda name: None)
    flags = [f"--init_from={trained('text') / 'model'}", "--model={}", "--data.vocab_size=null", "--train.what=lora"]
    with pytest.raises(ValueError, match=r"needs the package peft: pip install 'looped-transformers\[lora\]'"):
        text("wrong", *flags)
