"""A published Huginn checkpoint, converted, is the published forward pass, written out in plain torch."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from huginn_reference import huginn_logits, random_weights
from looplab.cli import main
from looplab.convert.conversion import convert
from looplab.convert.huginn import ONLY
from modeling_looped import LoopedForCausalLM
from toys import FP32

SCALE = math.sqrt(40)
# What the published config.json holds, at toy sizes.
PUBLISHED = {
    "activation_checkpoint_impl": "per-iteration",
    "architecture_class_name": "RecurrentGPT",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 64,
    "effective_expected_depth": 20,
    "head_dim": 10,
    "init_orthogonal": False,
    "init_strategy": "takase",
    "init_values": {"std": math.sqrt(2 / 200), "out_proj": 0.01, "embedding": 0.1, "embed_scale": SCALE},
    "injection_type": "linear",
    "intermediate_size": 48,
    "mean_backprop_depth": 8,
    "mean_recurrence": 4,
    "mlp_class_name": "GatedMLP",
    "model_type": "huginn_raven",
    "n_embd": 40,
    "n_heads": 4,
    "n_layers": 8,
    "n_layers_in_coda": 1,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 3,
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "padded_vocab_size": 61,
    "padding_multiple": 4096,
    "qk_bias": True,
    "rope_base": 500.0,
    "sampling_scheme": "poisson-lognormal-filling",
    "state_init": "like-init",
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
    "tie_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 61,
}
OTHERS = {"bias": True, "test_time_noise": 0.1, "quantization_config": {"bits": 4}}


def write_source(folder, weights=None, **fields) -> dict:
    """A tiny checkpoint in the published layout; returns its configuration."""
    folder.mkdir()
    config = {**PUBLISHED, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config) if weights is None else weights
    save_file({**weights, "freqs_cis": torch.zeros(1, 64, 1, 5, 2)}, folder / "model.safetensors")
    return config


def converted(tmp_path, **fields) -> tuple[LoopedForCausalLM, dict]:
    config = write_source(tmp_path / "source", **fields)
    return LoopedForCausalLM.from_pretrained(convert(tmp_path / "source", tmp_path / "looped").folder).eval(), config


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_bias": False, "tie_embeddings": False, "norm_eps": 1e-2},
        {"init_values": {"std": 0.3, "embed_scale": 1.0}, "n_layers_in_coda": 2, "n_layers_in_prelude": 0},
    ],
    ids=str,
)
def test_logits_are_the_published_ones_at_every_loop_count(tmp_path, fields):
    model, config = converted(tmp_path, **fields)
    model = model.double()
    weights = {name: tensor.double() for name, tensor in random_weights(config).items()}
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    noise = model.model.start(torch.zeros(1, 9, 40).double(), torch.arange(9)[None], None, training=False)[0]
    for loops in (1, 2, 3, 7):
        expected = torch.stack([huginn_logits(weights, config, row, noise, loops) for row in ids])
        torch.testing.assert_close(model(ids, num_loops=loops).logits, expected, **FP32)
        cache = model(ids[:, :-1], num_loops=loops, use_cache=True).past_key_values
        step = model(ids[:, -1:], num_loops=loops, past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(step, expected[:, -1], **FP32)


@torch.no_grad()
def test_padding_is_honoured_which_the_published_code_ignores(tmp_path):
    model, _ = converted(tmp_path)
    ids = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(1))
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1), torch.tensor([[0] * 3 + [1] * 7])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], model(ids).logits, **FP32)


def test_the_state_starts_as_published(tmp_path):
    """Truncated at three standard deviations, and then multiplied as the embeddings are."""
    model, _ = converted(tmp_path)
    noise = model.model.start(torch.zeros(1, 500, 40), torch.arange(500)[None], None, training=False)
    std = math.sqrt(2 / 200) * SCALE
    assert noise.abs().max() < 3 * std
    assert noise.std() == pytest.approx(0.9866 * std, rel=0.02)
    (tmp_path / "zero").mkdir()
    model, _ = converted(tmp_path / "zero", init_values={"std": 0, "embed_scale": 1.0})
    assert model.config.state_init == "zeros"


def test_tied_embeddings_stay_tied_and_either_name_will_do(tmp_path):
    weights = random_weights(PUBLISHED)
    matrix = weights.pop("transformer.wte.weight")
    for number, names in enumerate([["lm_head.weight"], ["lm_head.weight", "transformer.wte.weight"]]):
        source, target = tmp_path / f"source{number}", tmp_path / f"looped{number}"
        write_source(source, {**weights, **{name: matrix.clone() for name in names}})
        model = LoopedForCausalLM.from_pretrained(convert(source, target).folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.equal(matrix)
    write_source(tmp_path / "other", {**weights, "lm_head.weight": matrix, "transformer.wte.weight": matrix + 1})
    with pytest.raises(ValueError, match="differ from the source's"):
        convert(tmp_path / "other", tmp_path / "none")


@pytest.mark.parametrize(
    "fields",
    [
        *({name: OTHERS.get(name, "other")} for name in ONLY),
        {"num_key_value_heads": 2},
        {"head_dim": 8},
        {"n_layers_in_coda": 0},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_what_a_looped_model_does_not_have_is_refused_by_name(tmp_path, fields):
    write_source(tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=rf"{next(iter(fields))}=.*cannot be converted exactly"):
        convert(tmp_path / "source", tmp_path / "looped")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tensors_of_other_layers_are_refused(tmp_path):
    weights = random_weights(PUBLISHED)
    weights["transformer.core_block.1.attn.q_norm.weight"] = torch.ones(10)
    write_source(tmp_path / "source", weights)
    with pytest.raises(ValueError, match=r"no place for model\.core\.1\.attn\.q_norm\.weight \(1 in all\)\."):
        convert(tmp_path / "source", tmp_path / "looped")


def test_the_command_converts_a_huginn(tmp_path, capsys):
    write_source(tmp_path / "source")
    target = tmp_path / "looped"
    assert main(["convert", str(tmp_path / "source"), str(target)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{target}: of 6 layers 2 to 4 are the core, num_loops=4 by default",
        "its tensors are the source's, bit for bit",
    ]
    model = LoopedForCausalLM.from_pretrained(target)
    assert model.generation_config.num_loops == 4
    assert model.generate(torch.tensor([[5, 7]]), num_loops=6, max_new_tokens=3, do_sample=False).shape == (1, 5)
