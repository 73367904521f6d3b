"""Tiny dense models of the architectures that can be converted, and a batch that shows what differs."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral_window": (MistralConfig, MistralForCausalLM, {"sliding_window": 3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3_window": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    ),
}


def make_source(family: str = "llama", **fields):
    """A tiny causal LM in evaluation mode, every tensor random: a bias or norm that is lost must show."""
    config_class, model_class, own = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **own, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def make_batch(tokens: int = 9) -> dict:
    """Three rows: plain, spread over positions beyond the configured ones, left-padded."""
    input_ids = torch.randint(3, SIZES["vocab_size"], (3, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[2, :4] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    position_ids[1] *= 11
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}


def logits_of(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits[batch["attention_mask"].bool()]
