"""A tiny random causal LM of every family that training-free looping is tested on."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 60
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # Larger than a real model's, so that a wrong key or mask moves the logits by far more than rounding does.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    **EXPERTS,
}
PLAIN = {name: value for name, value in COMMON.items() if name not in ("head_dim", "num_key_value_heads")}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON),
    "gemma2": Gemma2Config(**COMMON, sliding_window=4),
    "gemma3": Gemma3TextConfig(**COMMON, sliding_window=4, sliding_window_pattern=2),
    "mistral": MistralConfig(**COMMON, sliding_window=5),
    "phi3": Phi3Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=6, n_head=4, n_positions=64, initializer_range=0.15,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    ),
    "olmo2": Olmo2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, num_experts=4, **EXPERTS),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v2": DeepseekV2Config(**COMMON | LATENT),
    "deepseek_v3": DeepseekV3Config(**COMMON | LATENT),
}  # fmt: skip
EXPERT_FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3")


def make_frozen(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The family's toy, seeded, in evaluation mode; float64, so that equal laws are equal to 1e-9."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])  # Trainer, for one, writes into it
    if family in EXPERT_FAMILIES:
        config._experts_implementation = "eager"  # the grouped product takes no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(dtype).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 3 or "gate.weight" in name:  # experts and routers of some families start at zero
            torch.nn.init.normal_(weight, std=0.15)
    return model


def make_tokens(rows: int = 2, tokens: int = 9, seed: int = 1) -> torch.Tensor:
    """(rows, tokens) ids without the padding id."""
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
