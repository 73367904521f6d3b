"""A looped model as a stock model of transformers, and what has no stock model."""

from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exports import GELU, GGUF_LOOPING, GGUF_UNROLLED, LAYERNORM, MLX_LOOPING, MLX_UNROLLED, rough_model, tokenizer_of
from looplab.export.exporting import export
from looplab.export.stock import CARRIED, NEEDED, WITHOUT_EFFECT, unroll
from modeling_looped import LoopedConfig
from toys import FP32, make_ids, make_model

SHAPES = GGUF_LOOPING | GGUF_UNROLLED | MLX_LOOPING | MLX_UNROLLED | {"tanh": GELU}
# Another value of every field than the toy's, some with what it needs; of a field without effect, one that would show.
OTHER = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "num_prelude_layers": 1,
    "num_core_layers": 1,
    "num_coda_layers": 2,
    "num_loops": 5,
    "max_num_loops": 3,
    "norm_type": "layernorm",
    "norm_eps": 1e-2,
    "norm_placement": "sandwich",
    "norm_between_loops": True,
    "norm_before_coda": True,
    "embedding_multiplier": 4.0,
    "hidden_act": "relu",
    "gated_mlp": False,
    "attention_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "attention_dropout": 0.5,
    "residual_dropout": 0.5,
    "embedding_dropout": 0.5,
    "tie_word_embeddings": False,
    "position_embedding": "none",
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "residual_init": "zero",
    "initializer_range": 0.3,
    "embedding_init_std": 1.0,
    "loop_connection": "inject_add",
    "loop_embedding": "sinusoidal",
    "num_streams": 2,
    "hyper_mixing": "static",
    "hyper_gates": "shared",
    "hyper_init": "plain",
    "state_init": "zeros",
    "state_init_std": 0.5,
    "kv_sharing": "first",
    "attention_pattern": "prefix",
    "sliding_window": 4,
    "kv_gate": "scalar",
    "kv_gate_rank": 2,
    "prefill_chunk": 3,
    "exit_gate": True,
    "exit_loss": "gate",
    "exit_entropy_weight": 0.2,
    "damped_beta": 0.4,
    "damped_horizon": 0.7,
    "disco_channel": "likeliest",
    "disco_weight": 0.3,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": 5,
}
NEEDS = {
    "prefill_chunk": {"kv_sharing": "last"},
    "state_init": {"loop_connection": "inject_add"},
    "norm_before_coda": {"num_coda_layers": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_unrolled_layers_are_the_model_bit_for_bit(shape):
    model, ids = rough_model(**SHAPES[shape]), make_ids(2, 11)
    for num_loops in (1,) if model.config.norm_between_loops else (1, 3):
        stock = unroll(model, num_loops)
        assert stock(ids).logits.equal(model(ids, num_loops=num_loops).logits)
        ours = {parameter.data_ptr() for parameter in model.parameters()}
        theirs = {name: tensor for name, tensor in stock.state_dict().items() if tensor.data_ptr() not in ours}
        assert all(name.endswith("bias") and not tensor.any() for name, tensor in theirs.items())


def own_fields() -> set[str]:
    return {field.name for field in fields(LoopedConfig)} & set(LoopedConfig.__annotations__)


def test_every_field_has_a_place():
    assert own_fields() == CARRIED | WITHOUT_EFFECT | set(NEEDED) == set(OTHER)


@torch.no_grad()
@pytest.mark.parametrize("target", ["gguf", "mlx", "transformers"])
@pytest.mark.parametrize("name", OTHER)
@pytest.mark.filterwarnings("ignore")
def test_a_field_is_carried_or_refused_by_its_name(name, target):
    model, ids = rough_model(**NEEDS.get(name, {}), **{name: OTHER[name]}), make_ids(2, 11)
    num_loops = 1 if name == "norm_between_loops" else 3
    try:
        stock = unroll(model, num_loops, target)
    except ValueError as error:
        assert any(str(error).startswith(f"{field}=") for field in (name, *NEEDS.get(name, ())))  # noqa: PT017
        assert name not in WITHOUT_EFFECT or name in NEEDS
    else:
        assert name not in NEEDED
        torch.testing.assert_close(stock(ids).logits, model(ids, num_loops=num_loops).logits, rtol=0, atol=0)


REFUSED = {
    "gated_mlp": ({"gated_mlp": False}, "transformers"),
    "hidden_act": ({**GELU, "hidden_act": "gelu"}, "gguf"),  # llama.cpp computes the other gelu
    "hidden_act of mlx": (GELU, "mlx"),
    "rope_parameters": (
        {**GELU, "hidden_act": "gelu", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "mlx",
    ),
    "rope_parameters by length": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "gguf"),
    "position_embedding": ({"position_embedding": "learned"}, "gguf"),
    "position_embedding of mlx": ({**LAYERNORM, "position_embedding": "none"}, "mlx"),
    "attention_bias": ({**LAYERNORM, "attention_bias": True}, "transformers"),
    "qk_norm": ({**LAYERNORM, "qk_norm": True}, "transformers"),
    "head_dim": ({**LAYERNORM, "head_dim": 16}, "transformers"),
    "norm_between_loops": ({"norm_between_loops": True, "num_coda_layers": 1}, "mlx"),
    "norm_between_loops and a bias": ({"norm_between_loops": True, "attention_bias": True}, "gguf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_engine_has_is_refused_before_anything_is_written(case, tmp_path):
    fields, target = REFUSED[case]
    with pytest.raises(ValueError, match=rf"^{case.split()[0]}=.* cannot be exported: .*; train with"):
        export(make_model(**fields), tokenizer_of("hops"), tmp_path / "new", target)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_folder_of_a_stock_model_loads_without_this_project(tmp_path):
    tokenizer = tokenizer_of("text")
    model = rough_model(vocab_size=len(tokenizer), num_coda_layers=1, eos_token_id=tokenizer.eos_token_id)
    done = export(model, tokenizer, tmp_path / "llama", "transformers", num_loops=4)
    assert (done.architecture, done.layers, done.num_loops, done.loops_there) == ("llama", 9, 4, False)
    stock = AutoModelForCausalLM.from_pretrained(done.path)
    question = AutoTokenizer.from_pretrained(done.path)("a loop", return_tensors="pt")
    torch.testing.assert_close(stock(**question).logits, model(**question, num_loops=4).logits, **FP32)
    assert stock.generation_config.eos_token_id == model.generation_config.eos_token_id
    with pytest.raises(ValueError, match="exists"):
        export(model, tokenizer, done.path, "transformers")
