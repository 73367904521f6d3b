"""Nanbeige4.2 (arXiv 2607.22083): Llama's layers, all of them looped. `looped export --to mlx` writes the same layout.

model.layers.I.*             -> model.core.I.*
model.norm                   -> model.core_norm    closes every loop: readout and next input
                             -> model.norm         where skip_loop_final_norm: after the last loop only
num_loops                    -> num_loops
skip_loop_final_norm         -> not norm_between_loops
"""

from transformers import GenerationConfig

from modeling_looped import LoopedConfig

from .published import PACKED, Layout, Tensors, check_fields, stored_settings

SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
NEEDED = (*SAME_FIELDS, "num_hidden_layers", "num_loops", "rms_norm_eps")
# Fields with a default in the published configuration class.
OPTIONAL = (
    "skip_loop_final_norm", "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "kv_channels",
    "initializer_range", "attention_bias", "attention_dropout", "mlp_bias", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
NGRAMS = "a looped model has no embeddings of n-grams, take a checkpoint without"
STREAMS = "a looped model has streams between loops only, not around every sublayer, take a checkpoint without"
SPLIT = "in this layout all layers loop, and each loop has keys and values of its own, take a checkpoint that does so"
# The only values that a looped model can have, and why.
ONLY = {
    "qk_layernorm": (
        (False, None),
        "it is not known which norm of queries and keys is meant, take a checkpoint without",
    ),
    "emb_neighbor_num": ((None,), NGRAMS),
    "insert_ngram_layer_idx": (([], None), NGRAMS),
    "ngram_insert_all_layers": ((False, None), NGRAMS),
    "loop_loss_weights": (
        ([], None),
        "a looped model has no loss with a fixed weight for every loop, write [] and the true num_loops",
    ),
    "enable_double_loop_split": ((False, None), SPLIT),
    "loop_middle_layers": ((None,), SPLIT),
    "loop_share_kv": ((False, None), SPLIT),
    "enable_hyper_connection": ((False, None), STREAMS),
    "enable_mhc": ((False, None), STREAMS),
    "enable_h_res_identity": ((False, None), STREAMS),
    "mhc_identity_nohresparam": ((False, None), STREAMS),
    "mhc_diff_for_loop": ((False, None), STREAMS),
    "mhc_double_stream_position_for_loop": ((None,), STREAMS),
    "enable_depth_attention": ((False, None), "no layer looks at earlier layers, take a checkpoint without"),
    "quantization": PACKED,
    "quantization_config": PACKED,
}
# They say how something is that a field of ONLY has turned off.
WITHOUT_EFFECT = (
    "emb_split_num", "emb_tp_num", "ngram_vocab_size_ratio", "ngram_mod_force_prime", "ngram_embedding_hidden_size",
    "ngram_fused_mode", "ngram_compressed_tokenizer", "ngram_layer_downproject_size", "skip_ngram_for_input",
    "num_residual_streams", "mhc_sinkhorn_iterations", "mhc_init_gating_factor", "depth_attention_stride",
    "depth_attention_recent_window", "depth_attention_static_anchor_once",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def rope_parameters(fields: dict) -> dict:
    """Our `rope_parameters`, from the older two fields or the newer one. Raises ValueError for an unknown kind."""
    said = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    numbers = {name: value for name, value in said.items() if name not in ("type", "rope_type")}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_scaling={said!r} cannot be converted exactly: a looped model has no such rotary embeddings, "
            f"take a model with one of {', '.join(ROPE_TYPES)}."
        )
    return {"rope_type": kind, "rope_theta": fields.get("rope_theta", 10000.0), **numbers}


def nanbeige_config(fields: dict) -> LoopedConfig:
    """The configuration of the looped model, from the fields of a config.json in this layout.

    Raises:
        ValueError: a field is missing or cannot be mapped exactly.
    """
    check_fields("Nanbeige", fields, NEEDED, ONLY, (*OPTIONAL, *WITHOUT_EFFECT))
    heads = {fields[name] for name in ("head_dim", "kv_channels") if fields.get(name) is not None}
    if len(heads) > 1:
        raise ValueError(
            f"kv_channels={fields['kv_channels']!r} contradicts head_dim={fields['head_dim']!r}: correct config.json."
        )
    return LoopedConfig(
        **{name: fields[name] for name in SAME_FIELDS},
        **{name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        head_dim=heads.pop() if heads else None,
        num_core_layers=fields["num_hidden_layers"],
        num_loops=fields["num_loops"],
        norm_eps=fields["rms_norm_eps"],
        norm_between_loops=not fields.get("skip_loop_final_norm", False),
        rope_parameters=rope_parameters(fields),
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        attention_dropout=fields.get("attention_dropout") or 0.0,
        initializer_range=fields.get("initializer_range", 0.02),
    )


def nanbeige_tensors(published: Tensors, fields: dict) -> Tensors:
    """The tensors of the looped model by name; the head is the embeddings where the two are tied."""
    norm = "model.norm." if fields.get("skip_loop_final_norm", False) else "model.core_norm."
    tensors = {
        name.replace("model.layers.", "model.core.").replace("model.norm.", norm): tensor
        for name, tensor in published.items()
    }
    if fields["tie_word_embeddings"] and "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


def nanbeige_settings(source: str, fields: dict, num_loops: int | None) -> GenerationConfig:
    """The source's generation settings with the loop count."""
    return stored_settings(source, fields["num_loops"] if num_loops is None else num_loops)


NANBEIGE = Layout("Nanbeige", nanbeige_config, nanbeige_tensors, nanbeige_settings)
