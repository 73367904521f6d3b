"""Llama's layer, except that its KV slot is an argument; with its MLPs, norms and positions.

Legend: B rows, T tokens, S cached tokens and these T, D hidden size, H heads, K key-value heads, d head size.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Literal, final

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache_layers_looped import LAYERS_WRITE_ENGINE_CACHES
from .gates_looped import KV_GATES
from .initial_looped import SetsInitialValues
from .masks_looped import PATTERNS
from .two_sources_looped import FirstPass, LaterPass

Section = Literal["prelude", "core", "coda"]


def make_norm(config: PreTrainedConfig, size: int | None = None) -> nn.Module:
    """The norm that `norm_type` names, over `size` features, `hidden_size` by default."""
    norm = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm(size or config.hidden_size, eps=config.norm_eps)


def as_is(hidden_states: torch.Tensor) -> torch.Tensor:
    """Stands for a norm or dropout that a configuration does not have. An nn.Identity would cost a module call."""
    return hidden_states


def make_multiplier(factor: float) -> Callable:
    """Multiplication by a number, or nothing at all where it is 1."""
    return as_is if factor == 1 else partial(torch.mul, other=factor)


def make_dropout(probability: float) -> Callable:
    """Dropout, or nothing at all where the probability is 0."""
    return nn.Dropout(probability) if probability else as_is


def make_outer_norm(config: PreTrainedConfig) -> Callable:
    """What `norm_placement` puts behind a sublayer: a norm, or nothing."""
    return as_is if config.norm_placement == "pre" else make_norm(config)


def rotated(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads (B, H, T, d) turned by the angles of their positions, (B or 1, T, d) each, as Llama turns them."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sines.unsqueeze(1)


def add_normalised(norm: Callable, dropout: Callable, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """residual + norm(output), of (B, T, D) each."""
    return residual + dropout(norm(output))


def normalise_sum(norm: Callable, dropout: Callable, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """norm(residual + output), of (B, T, D) each."""
    return norm(residual + dropout(output))


# How a sublayer's output joins the residual; without norms behind sublayers, the norm is `as_is`.
JOINS = {"pre": add_normalised, "sandwich": add_normalised, "sandwich_sum": normalise_sum}


class LoopedMLP(nn.Module):
    """GPT-2's MLP: down(act(up(x)))."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


@final
class LoopedGatedMLP(LoopedMLP):
    """Llama's MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


# Heads of 16 numbers take 2.4 times as long in bfloat16, forward and backward, heads of 24 1.5 times, of 64 as long.
SHORT_HEAD = 48


def in_float32(attend: Callable) -> Callable:
    """An attention function that computes in float32 and returns the precision of its queries."""

    def attend_in_float32(module, query, key, value, attention_mask, **settings):
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            output, weights = attend(module, query.float(), key.float(), value.float(), attention_mask, **settings)
        return output.to(query.dtype), weights

    return attend_in_float32


@final
class SlotAttention(nn.Module):
    """The attention of one KV slot, without parameters: caches, paged attention and engines find the slot here.

    A layer has one for every slot, and uses another one in every loop. Nothing is written to it after it was made, so
    that several threads can run one model at different loop counts.
    """

    def __init__(self, config: PreTrainedConfig, slot: int):
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None  # both filled by the configuration
        self.config = config
        self.layer_idx = slot
        self.is_causal = PATTERNS[config.attention_pattern].is_causal
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window  # paged attention and engines look for it here

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries (B, H, T, d), keys and values (B, K, T, d) -> (B, T, H, d), and the attention weights or None."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        elif LAYERS_WRITE_ENGINE_CACHES and kwargs.get("cache") is not None:
            key, value = kwargs.pop("cache").update(key, value, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # pyright: ignore[reportArgumentType]
            eager_attention_forward,
        )
        if self.is_slow_in_bfloat16(query):
            attention_interface = in_float32(attention_interface)
        # The only call in this function, and with these arguments by name: vLLM looks for them in its source.
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )

    def is_slow_in_bfloat16(self, query: torch.Tensor) -> bool:
        """Whether sdpa is faster in float32: in training on a CPU, with heads too short for the kernel in bfloat16."""
        return (
            torch.is_grad_enabled()
            and query.device.type == "cpu"
            and query.shape[-1] < SHORT_HEAD
            and (query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"))
            and self.config._attn_implementation == "sdpa"
        )


@final
class LoopedAttention(nn.Module):
    """Llama's attention, except that every loop has a KV slot of its own and keys may come from another input.

    All loops share the projections; `attentions` holds one attention for every slot of the layer.

    Args:
        section, index: which layer this is, see `KVSlots.slot`.
    """

    def __init__(self, config: PreTrainedConfig, section: Section = "core", index: int = 0):
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None  # both filled by the configuration
        self.config, self.index = config, index
        self.section: Section = section
        # Under the names that tools look for in an attention of transformers.
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else as_is
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else as_is
        self.has_slot_per_loop = section == "core" and config.kv_slots().per_loop
        # By loop; a ModuleList is slower to read, ten times per token. No name is a number: vLLM wants one number in
        # the name of an attention, and the layer has one.
        self.attentions = nn.ModuleDict()
        self.open_slots(config.num_loops)

    def at(self, loop: int) -> SlotAttention:
        """The attention of the slot of a loop, counted from 0."""
        return self.attentions[f"loop_{loop if self.has_slot_per_loop else 0}"]  # pyright: ignore[reportReturnType]

    def open_slots(self, num_loops: int) -> None:
        """Have an attention for the slot of every loop. They are only ever added, by one thread at a time."""
        slots = self.config.kv_slots()
        needed = num_loops if self.has_slot_per_loop else 1
        for loop in range(len(self.attentions), needed):
            attention = SlotAttention(self.config, slots.slot(self.section, self.index, loop))
            self.attentions[f"loop_{loop}"] = attention.train(self.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention: SlotAttention | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) -> (B, T, D); keys and values come from `key_value_states` (B, T, D) where given.

        `attention` is the one of the slot, by default of the layer's first. It is an argument, and not the loop's
        number, so that a compiled layer is the same code in every loop.
        """
        attend = self.at(0) if attention is None else attention
        source = hidden_states if key_value_states is None else key_value_states
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)  # (B, H, T, d)
        key = self.k_norm(self.k_proj(source).unflatten(-1, heads)).transpose(1, 2)
        value = self.v_proj(source).unflatten(-1, heads).transpose(1, 2)

        if position_embeddings is not None and key_value_states is None:
            both = rotated(torch.cat((query, key), dim=1), *position_embeddings)  # in half the steps
            query, key = both[:, : query.shape[1]], both[:, query.shape[1] :]
        elif position_embeddings is not None:  # there may be keys of several sources, one after another
            query, key = rotated(query, *position_embeddings), rotated(key, *position_embeddings)
        output, weights = attend(query, key, value, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class LoopedLayer(GradientCheckpointingLayer, SetsInitialValues):
    """Pre-norm layer; each sublayer's output, or its sum with the residual, may be normalised as well."""

    def __init__(self, config: PreTrainedConfig, section: Section = "core", index: int = 0):
        super().__init__()
        self.self_attn = LoopedAttention(config, section, index)
        self.mlp = LoopedGatedMLP(config) if config.gated_mlp else LoopedMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        # Names of the released Ouro checkpoints.
        self.input_layernorm_2 = make_outer_norm(config)
        self.post_attention_layernorm_2 = make_outer_norm(config)
        self.dropout = make_dropout(config.residual_dropout)
        self.join = JOINS[config.norm_placement]
        self.starts_as_identity = config.residual_init == "zero"
        self.has_outer_norms = config.norm_placement == "sandwich"

    def initialize(self) -> None:
        """With `residual_init="zero"` the last module of each sublayer is zero: the layer starts as the identity.

        That is the output projection, or under sandwich norms the outer norm: a norm that is fed zeros would multiply
        gradients by norm_eps ** -0.5.
        """
        if self.starts_as_identity:
            norms, projections = (
                (self.input_layernorm_2, self.post_attention_layernorm_2),
                (self.self_attn.o_proj, self.mlp.down_proj),
            )
            for end in norms if self.has_outer_norms else projections:
                for parameter in end.parameters():
                    init.zeros_(parameter)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D); keys and values come from `key_value_states` (B, T, D) where given."""
        if key_value_states is not None:
            key_value_states = self.input_layernorm(key_value_states)
        output, _ = self.self_attn(self.input_layernorm(hidden_states), key_value_states, **kwargs)
        return self.add_and_transform(hidden_states, output)

    def add_and_transform(self, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The layer after its attention, whose output is (B, T, D)."""
        hidden_states = self.join(self.input_layernorm_2, self.dropout, hidden_states, output)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.join(self.post_attention_layernorm_2, self.dropout, hidden_states, output)


@final
class GatedLoopedLayer(LoopedLayer):
    """A core layer whose keys and values come from a latent that a KV gate carries from loop to loop (MELT)."""

    def __init__(self, config: PreTrainedConfig, section: Section = "core", index: int = 0):
        super().__init__(config, section, index)
        self.kv_gate = KV_GATES[config.kv_gate](config)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: torch.Tensor,
        latent: torch.Tensor | None = None,
        loop: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, D) and the latent (B, T, D) of the loop before, if there was one -> (B, T, D) and this loop's."""
        x = self.input_layernorm(hidden_states)
        latent = self.kv_gate(x, latent, loop)  # (B, T, D)
        output, _ = self.self_attn(x, latent, **kwargs)
        return self.add_and_transform(hidden_states, output), latent


@final
class NaturalLoopedLayer(LoopedLayer):
    """A core layer that attends to the entries which earlier tokens left in loop 0, and to its own current ones."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: torch.Tensor,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D), and in later loops what loop 0 attended to -> (B, T, D), and what loop 0 attended to.

        That is keys and values, (B, K, S, d) each. columns: (T,), where the entries of this call are among the S.
        """
        if keys is None or values is None or columns is None:
            seen = FirstPass(past_key_values)
        else:
            seen = LaterPass(keys, values, columns)
        output, _ = self.self_attn(self.input_layernorm(hidden_states), past_key_values=seen, **kwargs)
        return self.add_and_transform(hidden_states, output), seen.keys, seen.values


OPENING = threading.Lock()  # held while a model gets attentions for more slots


def open_slots(core: Iterable, num_loops: int) -> None:
    """Have an attention in every core layer for every slot of `num_loops` loops; the last layer gets its own last."""
    layers = [layer.self_attn for layer in core]
    # It asks for the last slot, and not how many there are, which a compiled step would compare with other counts'.
    if layers[-1].has_slot_per_loop and f"loop_{num_loops - 1}" not in layers[-1].attentions:
        with nullcontext() if torch.compiler.is_compiling() else OPENING:  # a lock cannot be traced
            for layer in layers:
                layer.open_slots(num_loops)


class Positions(ABC):
    """How a token's position reaches the model."""

    def embed(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings (B, T, D) at positions (B or 1, T) -> (B, T, D) with what is added to them."""
        return embeds

    @abstractmethod
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines (B or 1, T, d) by which queries and keys are rotated, in the precision of `x`; or None."""


@final
class LoopedRotaryEmbedding(LlamaRotaryEmbedding, Positions):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Rotary position embeddings: queries and keys are rotated in every layer, by the same angles in every loop.

    The name ends in RotaryEmbedding because transformers computes the frequencies of such modules again after loading.
    """


@final
class LearnedPositions(nn.Module, Positions):
    """A learned table added to the token embeddings, (max_position_embeddings, D)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def embed(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        # Only on CPU, where it is free: on an accelerator it would wait for the device.
        checkable = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if checkable and int(position_ids.max()) >= self.table.num_embeddings:
            raise ValueError(
                f"position {int(position_ids.max())} is beyond max_position_embeddings={self.table.num_embeddings}, "
                "the size of the learned position table: shorten the input or train with a larger table."
            )
        return embeds + self.table(position_ids)

    def forward(self, x, position_ids):
        return None


@final
class NoPositions(nn.Module, Positions):
    """No positions at all: order is seen through the causal mask only (arXiv 2604.07822, k-hop task)."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()

    def forward(self, x, position_ids):
        return None


POSITIONS = {"rope": LoopedRotaryEmbedding, "learned": LearnedPositions, "none": NoPositions}
