"""The looped model as a stock model of transformers: its layers in the order in which a call runs them.

    looped     prelude | core @ loop 0 | core @ loop 1 | ... | coda
    stock      layers 0, 1, 2, ...: the same tensors, those of the core once for every loop

The logits are equal. Four families of stock models have layers like ours; which one a configuration is, its norm and
its MLP say. What none of them has is refused by the name of its field, before anything is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers.initialization import no_init_weights

from modeling_looped import LoopedConfig, LoopedForCausalLM

Target = Literal["gguf", "mlx", "transformers"]

# Fields that say nothing about the logits of a model in evaluation mode, or nothing unless a field of NEEDED does.
WITHOUT_EFFECT = frozenset(
    {
        "attention_dropout", "residual_dropout", "embedding_dropout", "residual_init", "initializer_range",
        "embedding_init_std", "use_cache", "num_streams", "hyper_mixing", "hyper_gates", "hyper_init",
        "state_init_std", "kv_gate", "kv_gate_rank", "prefill_chunk", "exit_gate", "exit_loss", "exit_entropy_weight",
        "damped_beta", "damped_horizon", "disco_channel", "disco_weight",
    }
)  # fmt: skip
# Fields that every stock model has, or that `unroll` and the writers read.
CARRIED = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "num_prelude_layers", "num_core_layers", "num_coda_layers", "num_loops",
        "max_num_loops", "norm_type", "norm_eps", "norm_between_loops", "hidden_act", "gated_mlp", "attention_bias",
        "mlp_bias", "qk_norm", "tie_word_embeddings", "position_embedding", "rope_parameters", "pad_token_id",
        "bos_token_id", "eos_token_id",
    }
)  # fmt: skip
# The only value that a stock model can have, and why.
NEEDED = {
    "loop_connection": ("plain", "no engine has a loop that reads its input again or has streams"),
    "loop_embedding": ("none", "no engine tells a layer which loop it is in"),
    "state_init": ("embeddings", "in every engine the first layer reads the embeddings"),
    "kv_sharing": ("per_loop", "in every engine each layer call has keys and values of its own"),
    "attention_pattern": ("causal", "in every engine a token sees earlier ones alone"),
    "sliding_window": (None, "no engine has a window in every layer of such a model"),
    "norm_placement": ("pre", "no engine has these layers with norms after the sublayers as well"),
    "norm_before_coda": (False, "no engine has a norm between its layers"),
    "embedding_multiplier": (1.0, "no engine multiplies the embeddings of such a model"),
}
# Wavelengths of no positions: with them no token is rotated, whatever its position, to the last bit of float32.
NO_ROTATION = {"rope_type": "linear", "factor": 1e30, "rope_theta": 10000.0}
SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")


def rotates_plainly(rope: Mapping) -> bool:
    return rope["rope_type"] == "default"


def rotates_evenly(rope: Mapping) -> bool:
    return rope["rope_type"] in ("default", "linear")


def rotates_at_any_length(rope: Mapping) -> bool:
    """Frequencies do not depend on the length of the text, so that they can be written down."""
    return rope["rope_type"] not in ("dynamic", "longrope")


def rotates_as_mlx(rope: Mapping) -> bool:
    """MLX reads some numbers of yarn under other names and rules."""
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    return rope["rope_type"] in ("default", "linear", "llama3") or (rope["rope_type"] == "yarn" and set(rope) <= known)


@dataclass(frozen=True)
class Family:
    """Stock models whose layers ours can be.

    Args:
        model, config: classes of transformers.
        fields: what the configuration has beside the fields that all have, from ours.
        activations: what its MLP computes, by target.
        lacks: fields of ours that must be False, and why.
        rotates: which `rope_parameters` are carried, by target; in transformers all are.
        names: of modules in a layer that are called otherwise than ours.
        splits_hidden_size: heads have `hidden_size / num_attention_heads` channels, without a field of their own.
        ties_embeddings: engines may take the embeddings for the head; otherwise a file has both.
    """

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    fields: Callable[[LoopedConfig], dict]
    activations: Mapping[Target, tuple[str, ...]]
    rotates: Mapping[Target, Callable[[Mapping], bool]]
    lacks: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    splits_hidden_size: bool = True
    ties_embeddings: bool = True

    @property
    def name(self) -> str:
        return self.config.model_type


def every(value) -> dict:
    return dict.fromkeys(("gguf", "mlx", "transformers"), value)


LLAMA = Family(
    LlamaForCausalLM,
    LlamaConfig,
    lambda config: {
        "rms_norm_eps": config.norm_eps, "head_dim": config.head_dim, "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    },
    activations=every(SILU),
    rotates={"gguf": rotates_at_any_length, "mlx": rotates_as_mlx, "transformers": lambda rope: True},
    lacks=("qk_norm",),
    splits_hidden_size=False,
)  # fmt: skip
QWEN3 = Family(
    Qwen3ForCausalLM,
    Qwen3Config,
    lambda config: {"rms_norm_eps": config.norm_eps, "head_dim": config.head_dim},
    activations=every(SILU),
    rotates={"gguf": rotates_evenly, "mlx": rotates_as_mlx, "transformers": lambda rope: True},
    lacks=("attention_bias", "mlp_bias"),
    splits_hidden_size=False,
)
STABLELM = Family(
    StableLmForCausalLM,
    StableLmConfig,
    lambda config: {"layer_norm_eps": config.norm_eps, "partial_rotary_factor": 1.0},
    activations=every(SILU),
    rotates={"gguf": rotates_evenly, "mlx": rotates_plainly, "transformers": lambda rope: True},
    lacks=("attention_bias", "mlp_bias", "qk_norm"),
    ties_embeddings=False,
)
STARCODER2 = Family(
    Starcoder2ForCausalLM,
    Starcoder2Config,
    lambda config: {"norm_epsilon": config.norm_eps, "use_bias": True},
    activations={"gguf": TANH_GELU, "mlx": ("gelu",), "transformers": ("gelu", *TANH_GELU)},
    rotates={"gguf": rotates_evenly, "mlx": rotates_plainly, "transformers": lambda rope: True},
    lacks=("qk_norm",),
    names={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
)


def refuse(name: str, value, reason: str, remedy: str) -> ValueError:
    """The error for a field that no stock model has."""
    return ValueError(f"{name}={value!r} cannot be exported: {reason}; {remedy}.")


def rope_of(config: LoopedConfig) -> dict:
    """The `rope_parameters` of the stock model."""
    return dict(NO_ROTATION) if config.position_embedding == "none" else dict(config.rope_parameters)


def family_of(config: LoopedConfig, target: Target) -> Family:
    """The stock models that a configuration is one of.

    Raises:
        ValueError: no engine of `target` has what a field asks for.
    """
    for name, (value, reason) in NEEDED.items():
        if getattr(config, name) != value:
            raise refuse(name, getattr(config, name), reason, f"train with {name}={value!r}")
    if config.norm_type == "rmsnorm" and not config.gated_mlp:
        raise refuse("gated_mlp", False, "no engine has it with norm_type='rmsnorm'", "train with gated_mlp=True")
    if config.norm_type == "rmsnorm":
        family = QWEN3 if config.qk_norm else LLAMA
    else:
        family = STABLELM if config.gated_mlp else STARCODER2
    for name in family.lacks:
        if getattr(config, name):
            raise refuse(name, True, f"a {family.name} has none", f"train with {name}=False")
    known = family.activations[target]
    if config.hidden_act not in known:
        reason = f"a {family.name} of {target} computes {known[0]!r}"
        raise refuse("hidden_act", config.hidden_act, reason, f"train with hidden_act={known[0]!r}")
    if config.position_embedding == "learned":
        reason = f"a {family.name} has no table of positions"
        raise refuse("position_embedding", "learned", reason, "train with position_embedding='rope'")
    if config.position_embedding == "none" and config.head_dim % 2:
        reason = "engines rotate pairs of channels, if only by nothing"
        raise refuse("head_dim", config.head_dim, reason, "train with an even one")
    if family.splits_hidden_size and config.head_dim * config.num_attention_heads != config.hidden_size:
        reason = f"a {family.name} has heads of hidden_size / num_attention_heads channels"
        raise refuse("head_dim", config.head_dim, reason, "train without head_dim")
    rope = rope_of(config)
    if not family.rotates[target](rope):
        if config.position_embedding == "none":
            reason = f"a {family.name} of {target} always rotates by positions"
            raise refuse("position_embedding", "none", reason, "train with position_embedding='rope'")
        reason = f"a {family.name} of {target} does not rotate so"
        raise refuse("rope_parameters", rope, reason, "train with rope_type='default'")
    return family


@torch.no_grad()
def unroll(model: LoopedForCausalLM, num_loops: int, target: Target = "transformers") -> PreTrainedModel:
    """A stock model that computes what `model` does at `num_loops` loops. It shares all tensors with `model`.

    Raises:
        ValueError: as `family_of`; or the loops do not fit a stock model: they are more than `max_num_loops`, or there
            is a norm between them.
    """
    config = model.config
    family = family_of(config, target)
    check_count(config, num_loops)
    if config.norm_between_loops and (num_loops > 1 or not config.final_norm_closes_loops):
        reason = f"a {family.name} has no norm between its layers"
        remedy = "train with norm_between_loops=False, or without prelude, coda and biases, for engines that loop"
        raise refuse("norm_between_loops", True, reason, remedy)
    body = model.model
    layers = [*body.prelude, *[*body.core] * num_loops, *body.coda]
    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    stock_config = family.config(
        **{name: getattr(config, name) for name in shared},
        **family.fields(config),
        rope_parameters=rope_of(config),
        num_hidden_layers=len(layers),
        tie_word_embeddings=config.tie_word_embeddings and family.ties_embeddings,
        attention_dropout=0.0,
    )
    with torch.device("meta"), no_init_weights():  # every tensor is about to be one of the model's
        stock = family.model(stock_config)
    for target_layer, layer in zip(stock.model.layers, layers, strict=True):
        fill(target_layer, layer, family)
    stock.model.embed_tokens.weight = body.embed_tokens.weight
    share(stock.model.norm, body.core_norm if config.final_norm_closes_loops else body.norm)
    stock.lm_head.weight = model.lm_head.weight
    stock.model.rotary_emb = type(stock.model.rotary_emb)(stock_config).to(model.device)
    stock.generation_config.update(**{name: getattr(model.generation_config, name) for name in shared[-3:]})
    return stock.eval()


def check_count(config: LoopedConfig, num_loops: int) -> None:
    """ValueError where the model may not run so many loops."""
    if config.max_num_loops is not None and num_loops > config.max_num_loops:
        raise ValueError(f"--loops {num_loops} is more than max_num_loops={config.max_num_loops} of the model.")


def fill(target: nn.Module, layer: nn.Module, family: Family) -> None:
    """Give a layer of a stock model the tensors of a layer of ours; biases that ours lack are zero."""
    for name, source in layer.named_modules():
        if isinstance(source, (nn.Linear, nn.RMSNorm, nn.LayerNorm)):
            share(target.get_submodule(family.names.get(name, name)), source)


def share(target: nn.Module, source: nn.Module) -> None:
    """Have a linear map or a norm of a stock model use the tensors of ours."""
    own = dict(source.named_parameters(recurse=False))
    zeros = nn.Parameter(source.weight.new_zeros(source.weight.shape[0]), requires_grad=False)
    for name in dict(target.named_parameters(recurse=False)):
        setattr(target, name, own.get(name, zeros))


__all__ = ["Family", "Target", "family_of", "unroll"]
