"""A run may begin from a saved model: weights, configuration and tokenizer come along."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from data_builders import train_byte_bpe
from looplab.runs.folder import open_run
from modeling_looped import LoopedForCausalLM
from toy_runs import measured
from train import main

AT_LOOPS = "held_out_at_loops"
FRESH = "--model={}"  # what comes with the weights


def test_a_run_begins_where_another_ended(text, trained, tmp_path):
    """Weights, configuration and tokenizer come along; the first row measures what was taken over."""
    first = open_run(trained("text")).summary()
    folders = [trained("text") / "model", tmp_path / "second" / "model"]
    flags = [f"--init_from={folders[0]}", FRESH, "--data.vocab_size=null"]
    main(text("second", *flags))
    begun = [(key, measured(tmp_path / "second", key)[0]) for key in ("held_out", AT_LOOPS)]
    assert begun == [(key, (0, first[key])) for key in ("held_out", AT_LOOPS)]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]
    # A run that is begun again before its first checkpoint has that row once.
    whole = measured(tmp_path / "second", "held_out")
    for checkpoint in (tmp_path / "second" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    main(text("second", *flags))
    assert measured(tmp_path / "second", "held_out") == whole


def test_fields_that_keep_the_weights_may_change(text, trained, tmp_path):
    first = open_run(trained("text")).summary()
    flags = [f"--init_from={trained('text') / 'model'}", "--data.vocab_size=null"]
    second = main(text("second", *flags, "--model={num_loops: 4, residual_dropout: 0.1}"))
    assert measured(tmp_path / "second", "held_out")[0][1] == first[AT_LOOPS]["4"]
    assert second["gate_loops"] == 4
    model = LoopedForCausalLM.from_pretrained(tmp_path / "second" / "model")
    assert (model.config.num_loops, model.config.residual_dropout) == (4, 0.1)
    with pytest.raises(ValueError, match=r"model\.hidden_size comes with the weights .*takes only .*num_loops"):
        text("third", *flags, "--model={num_loops: 4, hidden_size: 32}")


def test_a_window_may_be_put_over_the_weights(text, trained, tmp_path):
    """At a learning rate of zero: what comes out is the saved model, loaded with a window."""
    flags = [f"--init_from={trained('text') / 'model'}", "--data.vocab_size=null", "--optim.lr=0", "--optim.muon_lr=0"]
    main(text("second", *flags, "--model={sliding_window: 3}", "--max_steps=1"))
    model = LoopedForCausalLM.from_pretrained(tmp_path / "second" / "model")
    loaded = LoopedForCausalLM.from_pretrained(trained("text") / "model", sliding_window=3)
    ids = torch.arange(24).view(2, 12)
    assert model(ids).logits.equal(loaded(ids).logits)
    assert not model(ids).logits.equal(LoopedForCausalLM.from_pretrained(trained("text") / "model")(ids).logits)


def test_half_precision_weights_are_trained_in_full(text, trained, tmp_path):
    folder = trained.copy(tmp_path, "text") / "model"
    LoopedForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    main(text("second", f"--init_from={folder}", FRESH, "--data.vocab_size=null"))
    assert LoopedForCausalLM.from_pretrained(tmp_path / "second" / "model").dtype == torch.float32


def test_hops_too_may_begin_from_a_saved_model(hops, trained, tmp_path):
    first = open_run(trained("hops")).summary()
    flags = [f"--init_from={trained('hops') / 'model'}", FRESH]
    main(hops("second", *flags))
    step, gate = measured(tmp_path / "second", "gate")[0]
    assert (step, gate) == (0, {k: first["gate"][k] for k in gate})
    with pytest.raises(ValueError, match=r"data\.readout is last, but the tokenizer in .* has the other one"):
        main(hops("third", *flags, "--data.readout=last"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "tokenizer_config.json").unlink(),
            r"init_from: there is no tokenizer in the folder",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"num_coda_layers": 0', '"num_coda_layers": 1')
            ),
            r"init_from: the weights in .* do not fit its config\.json \(model\.coda\.0",
        ),
        (
            lambda folder: train_byte_bpe(["a b c"] * 9 + ["other words entirely"] * 9, 300).save_pretrained(folder),
            r"has 2\d\d tokens, and a model for 262",
        ),
    ],
)
def test_a_folder_that_is_no_whole_model_raises(text, trained, tmp_path, damage, message):
    folder = trained.copy(tmp_path, "text", "--max_steps=1", "--data.vocab_size=262") / "model"
    damage(folder)
    with pytest.raises(ValueError, match=message):
        main(text("second", f"--init_from={folder}", FRESH, "--data.vocab_size=null"))
