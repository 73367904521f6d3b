"""A checkpoint in Nanbeige's layout, converted, is its forward pass at every loop count; `looped export` is undone."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from exports import MLX_LOOPING, rough_model, texts_of, tokenizer_of
from looplab.cli import main
from looplab.convert.conversion import convert
from looplab.convert.nanbeige import ONLY
from looplab.export.exporting import export
from modeling_looped import LoopedForCausalLM
from ouro_reference import attention, mlp, random_weights, rms
from toys import FP32, make_ids

# What the published config.json holds, at toy sizes.
PUBLISHED = {
    "architectures": ["NanbeigeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_nanbeige.NanbeigeForCausalLM"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 12,  # heads are wider than hidden_size / num_attention_heads
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "kv_channels": 12,
    "loop_loss_weights": [],
    "max_position_embeddings": 64,
    "model_type": "nanbeige",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_loops": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 7000.0,
    "skip_loop_final_norm": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 61,
}
# One value of each field of ONLY that a looped model cannot have.
OTHERS = {
    "emb_neighbor_num": 3, "insert_ngram_layer_idx": [0], "loop_loss_weights": [0.5], "loop_middle_layers": 1,
    "mhc_double_stream_position_for_loop": "mid", "quantization": {"bits": 4}, "quantization_config": {"bits": 4},
}  # fmt: skip


def weights_of(config: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, random; those that only an Ouro has are left out."""
    others = ("_layernorm_2", "early_exit_gate", *(["lm_head"] if config["tie_word_embeddings"] else []))
    return {
        name: tensor for name, tensor in random_weights(config).items() if not any(part in name for part in others)
    }


def write_source(folder, weights=None, **fields) -> dict:
    """A tiny checkpoint in the published layout; returns its configuration."""
    folder.mkdir()
    config = {**PUBLISHED, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights_of(config) if weights is None else weights, folder / "model.safetensors")
    return config


def nanbeige_logits(w: dict, config: dict, ids: torch.Tensor, num_loops: int) -> torch.Tensor:
    """Of one row without padding, (T,): logits (T, V), written out from the description with matrices alone."""
    eps, h = config["rms_norm_eps"], w["model.embed_tokens.weight"][ids]
    for loop in range(num_loops):
        for index in range(config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            h = h + attention(rms(h, w[f"{layer}.input_layernorm.weight"], eps), w, layer, config)
            h = h + mlp(rms(h, w[f"{layer}.post_attention_layernorm.weight"], eps), w, layer)
        if loop == num_loops - 1 or not config["skip_loop_final_norm"]:
            h = rms(h, w["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return h @ w[head].T


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"skip_loop_final_norm": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        {"tie_word_embeddings": True, "skip_loop_final_norm": True, "num_loops": 1},
    ],
)
def test_logits_are_the_published_ones_at_every_loop_count(tmp_path, fields):
    config = write_source(tmp_path / "source", **fields)
    model = LoopedForCausalLM.from_pretrained(convert(tmp_path / "source", tmp_path / "looped").folder).eval().double()
    weights = {name: tensor.double() for name, tensor in weights_of(config).items()}
    assert model.config.num_loops == model.generation_config.num_loops == config["num_loops"]
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    for loops in (1, 2, 3, 5):
        expected = torch.stack([nanbeige_logits(weights, config, row, loops) for row in ids])
        torch.testing.assert_close(model(ids, num_loops=loops).logits, expected, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("shape", sorted(MLX_LOOPING))
def test_an_exported_model_comes_back(tmp_path, shape):
    model, tokenizer, ids = rough_model(**MLX_LOOPING[shape]), tokenizer_of("hops"), make_ids(2, 11)
    export(model, tokenizer, tmp_path / "exported", "mlx", num_loops=5)
    done = convert(tmp_path / "exported", tmp_path / "back")
    back = LoopedForCausalLM.from_pretrained(done.folder).eval()
    assert (done.num_loops, done.core) == (5, (0, model.config.num_core_layers - 1))
    kept = {name: tensor for name, tensor in model.state_dict().items() if "exit_gate" not in name}
    assert kept.keys() == back.state_dict().keys()
    assert all(tensor.equal(back.state_dict()[name]) for name, tensor in kept.items())
    for loops in (1, 3, 6):
        torch.testing.assert_close(
            back(ids, num_loops=loops).logits, model(ids, num_loops=loops).logits, rtol=1e-6, atol=1e-6
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "norm_between_loops", "tie_word_embeddings"):
        assert getattr(back.config, name) == getattr(model.config, name)
    again = AutoTokenizer.from_pretrained(done.folder)
    assert [again(text).input_ids for text in texts_of("hops")] == [
        tokenizer(text).input_ids for text in texts_of("hops")
    ]


@pytest.mark.parametrize(
    "fields",
    [
        *({name: OTHERS.get(name, True)} for name in ONLY),
        {"num_experts": 8},  # a field that nobody has published yet
        {"rope_scaling": {"type": "mrope"}},
        {"kv_channels": 8},
    ],
    ids=str,
)
def test_what_a_looped_model_does_not_have_is_refused_by_name(tmp_path, fields):
    write_source(tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        convert(tmp_path / "source", tmp_path / "looped")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("fields", [{name: values[-1]} for name, (values, _) in ONLY.items()], ids=str)
def test_a_flag_that_is_off_is_passed_over(tmp_path, fields):
    write_source(tmp_path / "source", **fields)
    assert convert(tmp_path / "source", tmp_path / "looped").num_layers == 3


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    weights = weights_of(PUBLISHED)
    weights["model.layers.1.self_attn.q_norm.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    write_source(tmp_path / "source", weights)
    with pytest.raises(
        ValueError, match=r"no place for model\.core\.1\.self_attn\.q_norm.*not have model\.core\.1\.mlp"
    ):
        convert(tmp_path / "source", tmp_path / "looped")


def test_the_command_converts_a_nanbeige(tmp_path, capsys):
    write_source(tmp_path / "source")
    target = tmp_path / "looped"
    assert main(["convert", str(tmp_path / "source"), str(target), "--loops", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{target}: of 3 layers 0 to 2 are the core, num_loops=4 by default",
        "its tensors are the source's, bit for bit",
    ]
    assert LoopedForCausalLM.from_pretrained(target).generation_config.num_loops == 4
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "x"), "--loop-connection", "damped"]) == 2
    assert "a Nanbeige has no core to choose" in capsys.readouterr().err
