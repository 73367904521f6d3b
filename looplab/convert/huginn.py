"""Huginn (arXiv 2502.05171, `huginn_raven`): prelude, core and coda, and a random state that reads its input again.

    transformer.wte                  -> model.embed_tokens, times init_values["embed_scale"]; also the head
    transformer.prelude.I            -> model.prelude.I
    transformer.adapter              -> model.connection.adapter     x = adapter([state, e])
    transformer.core_block.I         -> model.core.I
    transformer.coda.I               -> model.coda.I
    transformer.ln_f                 -> model.norm                   before the coda, and after it
    attn.Wqkv, attn.qk_bias          -> q_proj, k_proj, v_proj       v_proj and o_proj get biases of zero
    mlp.fc                           -> gate_proj, up_proj
    norm_1, norm_2, norm_3, norm_4   -> input_layernorm, input_layernorm_2, post_attention_layernorm, ..._2
    mean_recurrence                  -> num_loops

Huginn rotates neighbouring channels of a head, and Llama's layers channels that are half a head apart: the rows of
queries and keys change places. The published code ignores padding; the looped model does not.
"""

import math

import torch
from transformers import GenerationConfig

from modeling_looped import LoopedConfig

from .published import PACKED, Layout, Tensors, check_fields, stored_settings

NEEDED = (
    "n_embd", "n_heads", "intermediate_size", "vocab_size", "block_size", "norm_eps", "rope_base", "qk_bias",
    "tie_embeddings", "n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda", "mean_recurrence",
)  # fmt: skip
ANOTHER = "a converted Huginn has the layers of huginn-0125, take a checkpoint that has them"
# The only values that a looped model can have, and why.
ONLY = {
    "bias": ((False,), "the adapter of a looped model has no bias, take a checkpoint without"),
    "injection_type": (("linear",), "a converted Huginn reads its input through a linear adapter, take one that does"),
    "state_init": (
        ("like-init",),
        "the published code starts from truncated normal noise whatever this says, write 'like-init'",
    ),
    "architecture_class_name": (("RecurrentGPT",), ANOTHER),
    "block_class_name": (("SandwichBlock",), ANOTHER),
    "norm_class_name": (("RMSNorm_llama", "RMSNorm"), ANOTHER),
    "mlp_class_name": (("GatedMLP",), ANOTHER),
    "nonlin_name": (("SiLU",), ANOTHER),
    "test_time_noise": ((0, 0.0, None), "a looped model adds no noise to its state, set it to 0"),
    "quantization_config": PACKED,
}
# They say how it was trained, or follow from other fields.
WITHOUT_EFFECT = (
    "init_strategy", "init_orthogonal", "sampling_scheme", "mean_backprop_depth", "activation_checkpoint_impl",
    "padding_multiple", "n_layers", "effective_expected_depth", "test_time_noise_type",
)  # fmt: skip
OPTIONAL = (
    "init_values", "padded_vocab_size", "num_key_value_heads", "num_attention_heads", "head_dim", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
SECTIONS = {"prelude": "prelude", "core_block": "core", "coda": "coda"}
NORMS = {
    "norm_1": "input_layernorm",
    "norm_2": "input_layernorm_2",
    "norm_3": "post_attention_layernorm",
    "norm_4": "post_attention_layernorm_2",
}
OUTSIDE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.adapter.weight": "model.connection.adapter.weight",
    "transformer.ln_f.weight": "model.norm.weight",
}
ROTATION = "freqs_cis"  # a buffer that rope_base and block_size give


def initial_values(fields: dict) -> dict:
    """Standard deviation of the initial state before it is multiplied, and the multiplier of embeddings and state."""
    size = fields["n_embd"]
    return {"std": math.sqrt(2 / (5 * size)), "embed_scale": math.sqrt(size)} | (fields.get("init_values") or {})


def huginn_config(fields: dict) -> LoopedConfig:
    """The configuration of the looped model, from the fields of a published Huginn config.json.

    Raises:
        ValueError: a field is missing or cannot be mapped exactly.
    """
    check_fields("Huginn", fields, NEEDED, ONLY, (*OPTIONAL, *WITHOUT_EFFECT))
    heads, size = fields["n_heads"], fields["n_embd"]
    derived = {"num_key_value_heads": heads, "num_attention_heads": heads, "head_dim": size // heads}
    for name, value in derived.items():
        if fields.get(name) not in (None, value):
            raise ValueError(
                f"{name}={fields[name]!r} cannot be converted exactly: every head of a Huginn has keys of its own and "
                f"n_embd / n_heads channels, so that {name} is {value}; take a checkpoint of huginn-0125's layers."
            )
    if not fields["n_layers_in_coda"]:
        raise ValueError("n_layers_in_coda=0 cannot be converted exactly: the final norm would come twice in a row.")
    initial = initial_values(fields)
    return LoopedConfig(
        vocab_size=fields.get("padded_vocab_size") or fields["vocab_size"],
        hidden_size=size,
        intermediate_size=fields["intermediate_size"],
        num_attention_heads=heads,
        max_position_embeddings=fields["block_size"],
        num_prelude_layers=fields["n_layers_in_prelude"],
        num_core_layers=fields["n_layers_in_recurrent_block"],
        num_coda_layers=fields["n_layers_in_coda"],
        num_loops=fields["mean_recurrence"],
        norm_eps=fields["norm_eps"],
        norm_placement="sandwich_sum",
        norm_before_coda=True,
        embedding_multiplier=initial["embed_scale"],
        attention_bias=fields["qk_bias"],
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["rope_base"])},
        loop_connection="inject_concat",
        state_init="truncated_normal" if initial["std"] else "zeros",
        state_init_std=initial["std"] * initial["embed_scale"],
        tie_word_embeddings=fields["tie_embeddings"],
        **{name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def by_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * d, ...) of which neighbours are rotated -> the same rows, rotated with those half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def layer_tensors(end: str, tensor: torch.Tensor, heads: int) -> Tensors:
    """The published tensor of a layer whose name ends so -> tensors of our layer by the ends of their names."""
    module, _, kind = end.rpartition(".")
    if module in NORMS:
        return {f"{NORMS[module]}.{kind}": tensor}
    if end == "attn.Wqkv.weight":
        query, key, value = tensor.chunk(3)
        projections = {"q": by_halves(query, heads), "k": by_halves(key, heads), "v": value}
        return {f"self_attn.{name}_proj.weight": rows for name, rows in projections.items()}
    if end == "attn.qk_bias":
        query, key = (by_halves(bias.flatten(), heads) for bias in tensor)
        zeros = torch.zeros_like(query)
        biases = {"q": query, "k": key, "v": zeros, "o": zeros.clone()}
        return {f"self_attn.{name}_proj.bias": rows for name, rows in biases.items()}
    if end == "mlp.fc.weight":
        gate, up = tensor.chunk(2)
        return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}
    own = {"attn.proj.weight": "self_attn.o_proj.weight", "mlp.proj.weight": "mlp.down_proj.weight"}
    return {own.get(end, end): tensor}


def huginn_tensors(published: Tensors, fields: dict) -> Tensors:
    """The tensors of the looped model by name; of tied embeddings one name is enough."""
    tensors = {}
    for name, tensor in published.items():
        first, _, rest = name.partition(".")
        section, _, place = rest.partition(".")
        index, _, end = place.partition(".")
        if first == "transformer" and section in SECTIONS:
            ours = layer_tensors(end, tensor, fields["n_heads"])
            tensors |= {f"model.{SECTIONS[section]}.{index}.{part}": rows for part, rows in ours.items()}
        elif name != ROTATION:
            tensors[OUTSIDE.get(name, name)] = tensor
    if fields["tie_embeddings"]:
        pair = ("model.embed_tokens.weight", "lm_head.weight")
        matrix = next((tensors[name] for name in pair if name in tensors), None)
        tensors |= {name: matrix for name in pair if matrix is not None and name not in tensors}
    return tensors


def huginn_settings(source: str, fields: dict, num_loops: int | None) -> GenerationConfig:
    """The source's generation settings with the loop count."""
    return stored_settings(source, fields["mean_recurrence"] if num_loops is None else num_loops)


HUGINN = Layout("Huginn", huginn_config, huginn_tensors, huginn_settings)
