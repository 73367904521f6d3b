"""A looped (recurrent-depth) transformer: the core's weights run `num_loops` times, and that count is an argument.

    e     = prelude(embed(ids))                               # (B, T, D)  once
    state = connection.open(start(e), e)                      # (B, T, D)
    for loop in range(num_loops):                             # same weights every time
        x, gates = connection.read(state, e, loop)
        state    = connection.write(state, gates, core(x), loop)   # with the loop's embedding, where loops have one
        rows that are done leave the batch                    # no work is done for them
    h      = coda(connection.close(state))                    # (B, T, D)  once
    logits = head(norm(h))                                    # (B, T, V)

Layers are Llama's (or GPT-2's, by configuration); what differs is the loop, its KV slots and its exits. Sources: Loop,
Think & Generalize (arXiv 2604.07822) for the plain loop and halting, Ouro (2510.25741) for sandwich norms and the norm
between loops, Huginn (2502.05171) for prelude, coda, injection and random starts. Legend: B rows, T tokens, D hidden
size, H heads, d head size, V vocabulary.
"""

import difflib
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_looped import CACHE_NAME, LAYERS_WRITE_ENGINE_CACHES, SHARINGS, ActiveCache, OwnInputs, one_cache
from .chunks_looped import ENGINE_ARGUMENTS, Call, CallContext, Chunks
from .configuration_looped import REWRITING_SHARINGS, LoopedConfig, too_many_loops
from .connections_looped import CONNECTIONS, INITIALIZED, LOOP_EMBEDDINGS, STARTS
from .depth_looped import asked_count, check_loops_of_rows, count_to_save, generation_count, mark_saved_settings
from .gates_looped import KV_GATES, LearnedGate
from .halting_looped import ActiveRows, Decision, FixedRule, halting_rule
from .losses_looped import ExpectedLoss, make_loss
from .speculation_looped import CALLS_ARE_PREPARED, calls_are_prepared, self_speculation

# What attention backends and serving engines pass through forward (continuous batching, vLLM); any other keyword that
# is not a parameter is a mistake.
BACKEND_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | ENGINE_ARGUMENTS | {
    "logits_indices", "logits_processor_args", "max_seqlen_k", "max_seqlen_q", "return_dict",
}  # fmt: skip
Section = Literal["prelude", "core", "coda"]
OPENING = threading.Lock()  # held while a model gets attentions for more slots
LOOP_SETTINGS = ("num_loops", "halting")
GENERATION_SETTINGS = (*LOOP_SETTINGS, "draft_loops")  # what a generation config may hold beside those of transformers
FORWARD_DOCSTRING = r"""
        num_loops (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Loops of the core, >= 1; `config.num_loops` by default. With a tensor each row gets its own depth, equal
            to running it alone, and leaves the batch when it has had it.
        num_grad_loops (`int`, *optional*):
            Only the last `num_grad_loops` loops are differentiated (truncated back-propagation). Head and exit gate
            learn from all loops they read.
        cut_chunks (`bool`, *optional*):
            With `config.prefill_chunk`: no gradient goes from a chunk of tokens to the KV rows of earlier ones.
        halting (`str` or `dict`, *optional*):
            Rule by which a row stops before `num_loops`: `"kl_entropy"`, `"kl"`, `"latent"`, `"q_exit"`, `"fixed"`,
            or a dict with the rule's thresholds, `{"rule": "kl_entropy", "kl_threshold": 0.01, "max_entropy": 3.0}`;
            `"q_exit"` needs `exit_gate=True` in the configuration. It is read at the positions of `logits_to_keep`,
            padding excluded, and a row stops when all of them agree.
        generator (`torch.Generator`, *optional*):
            Seed of `state_init="normal"`, see `connections_looped.py`.
        past_key_values (`Cache`, *optional*):
            Keys and values of earlier calls, from which this one goes on and to which it adds; a new `DynamicCache` if
            not given.
        cache (`Cache`, *optional*):
            The same: its name in transformers from 5.24 on.

        Raises `ValueError` for a loop count, mask, token id or halting rule that does not fit, `TypeError` for an
        unknown keyword.
"""


@dataclass
class LoopedModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` plus the loops run.

    `hidden_states` and `attentions` have one entry per layer call, in the order of the calls; entries of a loop hold
    the rows that were still looping. A call that `prefill_chunk` cuts has those of one chunk after the other, with
    padding on the left moved to the end.

    Args:
        loops_used (`torch.LongTensor` of shape `(batch_size, sequence_length)`): loops run for each token.
    """

    loops_used: torch.Tensor | None = None


@dataclass
class LoopedCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` plus the loops run.

    Args:
        loops_used (`torch.LongTensor` of shape `(batch_size, sequence_length)`): loops run for each token.
    """

    loops_used: torch.Tensor | None = None


@dataclass
class LoopedGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` plus the loops run.

    Args:
        loops_used (`torch.LongTensor` of shape `(batch_size, new_tokens)`): loops of the call that made each token.
    """

    loops_used: torch.Tensor | None = None


def make_norm(config: LoopedConfig, size: int | None = None) -> nn.Module:
    norm = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm(size or config.hidden_size, eps=config.norm_eps)


def as_is(hidden_states: torch.Tensor) -> torch.Tensor:
    """Stands for a norm or dropout that a configuration does not have; nn.Identity would cost a module call each."""
    return hidden_states


def make_dropout(probability: float) -> Callable:
    return nn.Dropout(probability) if probability else as_is


def make_outer_norm(config: LoopedConfig) -> Callable:
    return as_is if config.norm_placement == "pre" else make_norm(config)


class LoopedMLP(nn.Module):
    """GPT-2's MLP: down(act(up(x)))."""

    def __init__(self, config: LoopedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class LoopedGatedMLP(LoopedMLP):
    """Llama's MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SlotAttention(nn.Module):
    """The attention of one KV slot, without parameters: caches, paged attention and engines find the slot here.

    A layer runs it with a different one in every loop. Nothing is written to it after it was made, so that several
    threads can run one model at different loop counts.
    """

    def __init__(self, config: LoopedConfig, slot: int):
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None  # both filled by the configuration
        self.config = config
        self.layer_idx = slot
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

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
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )


class LoopedAttention(nn.Module):
    """Llama's attention, except that every loop has a KV slot of its own and keys may come from another input.

    The projections are those of all loops; `attentions` holds one attention for every slot of the layer.

    Args:
        section, index: which layer this is, see `KVSlots.slot`.
    """

    def __init__(self, config: LoopedConfig, section: Section = "core", index: int = 0):
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
        self.attentions = nn.ModuleList()
        self.open_slots(config.num_loops)

    def open_slots(self, num_loops: int) -> None:
        """Have an attention for the slot of every loop. They are only ever added, by one thread at a time."""
        slots = self.config.kv_slots()
        needed = num_loops if self.section == "core" and slots.per_loop else 1
        for loop in range(len(self.attentions), needed):
            attention = SlotAttention(self.config, slots.slot(self.section, self.index, loop))
            self.attentions.append(attention.train(self.training))

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
        attend = self.attentions[0] if attention is None else attention
        source = hidden_states if key_value_states is None else key_value_states
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)  # (B, H, T, d)
        key = self.k_norm(self.k_proj(source).unflatten(-1, heads)).transpose(1, 2)
        value = self.v_proj(source).unflatten(-1, heads).transpose(1, 2)

        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output, weights = attend(query, key, value, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class LoopedLayer(GradientCheckpointingLayer):
    """Pre-norm layer; with `norm_placement="sandwich"` each sublayer's output is normalised as well (Ouro)."""

    def __init__(self, config: LoopedConfig, section: Section = "core", index: int = 0):
        super().__init__()
        self.self_attn = LoopedAttention(config, section, index)
        self.mlp = LoopedGatedMLP(config) if config.gated_mlp else LoopedMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        # Names of the released Ouro checkpoints.
        self.input_layernorm_2 = make_outer_norm(config)
        self.post_attention_layernorm_2 = make_outer_norm(config)
        self.dropout = make_dropout(config.residual_dropout)
        self.starts_as_identity = config.residual_init == "zero"
        self.has_outer_norms = config.norm_placement == "sandwich"

    def initialize(self) -> None:
        """Values of a fresh model that the layer sets after its modules; those that were loaded stay.

        With `residual_init="zero"` what ends a sublayer is zero, and the layer starts as the identity. That is the
        output projection, or the outer norm under sandwich norms: a norm fed with zeros would multiply gradients by
        norm_eps ** -0.5.
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
        hidden_states = hidden_states + self.dropout(self.input_layernorm_2(output))
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.dropout(self.post_attention_layernorm_2(output))


class GatedLoopedLayer(LoopedLayer):
    """A core layer whose keys and values come from a latent that a gate carries from loop to loop (MELT)."""

    def __init__(self, config: LoopedConfig, section: Section = "core", index: int = 0):
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


class LoopedRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary position embeddings: queries and keys are rotated in every layer, by the same angles in every loop.

    Its name ends as transformers expects of a module whose frequencies it must compute again after loading.
    """

    def embed(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return embeds


class LearnedPositions(nn.Module):
    """A learned table added to the token embeddings, (max_position_embeddings, D)."""

    def __init__(self, config: LoopedConfig):
        super().__init__()
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def embed(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and int(position_ids.max()) >= self.table.num_embeddings:
            raise ValueError(
                f"position {int(position_ids.max())} is beyond max_position_embeddings={self.table.num_embeddings}, "
                "the size of the learned position table: shorten the input or train with a larger table."
            )
        return embeds + self.table(position_ids)

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> None:
        return None


class NoPositions(nn.Module):
    """No positions at all: order is seen through the causal mask only (arXiv 2604.07822, k-hop task)."""

    def __init__(self, config: LoopedConfig):
        super().__init__()

    def embed(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return embeds

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> None:
        return None


def choose_hidden_states(forward: Callable) -> Callable:
    """Let the indices in `output_hidden_states` count the layer calls that were made; negative ones from the last.

    Transformers counts by the configuration, and how often the core runs is said by the call, or by a rule. All states
    are kept while such a call runs.
    """

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        asked = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if asked is None or isinstance(asked, bool):
            return forward(self, *args, **kwargs)
        selected = asked if isinstance(asked, (list, tuple, set, range)) else [asked]
        if not all(type(index) is int for index in selected):
            raise ValueError(f"output_hidden_states must be a bool, an index or a list of indices, got {asked!r}.")
        outputs = forward(self, *args, **kwargs | {"output_hidden_states": True, "return_dict": True})
        count = len(outputs.hidden_states)
        kept = {index % count for index in selected if -count <= index < count}
        outputs.hidden_states = tuple(
            state if index in kept else None for index, state in enumerate(outputs.hidden_states)
        )
        return outputs if kwargs.get("return_dict", self.config.return_dict) else outputs.to_tuple()

    return wrapper


POSITIONS = {"rope": LoopedRotaryEmbedding, "learned": LearnedPositions, "none": NoPositions}


@auto_docstring
class LoopedPreTrainedModel(PreTrainedModel):
    config: LoopedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopedLayer", "GatedLoopedLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LoopedLayer,
        "attentions": LoopedAttention,
    }

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.embedding_init_std is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_init_std)
        if isinstance(module, (*INITIALIZED, LearnedGate, LoopedLayer, LoopedModel)):
            module.initialize()

    @classmethod
    def from_pretrained(cls, *args, generation_config=None, **kwargs):
        """As in transformers; `num_loops=...` is the depth of `forward` and `generate` (`depth_looped.py`)."""
        loaded = super().from_pretrained(*args, generation_config=generation_config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.can_generate() and generation_config is None:
            mark_saved_settings(model.generation_config)
        return loaded

    def floating_point_ops(self, inputs: dict) -> int:
        """FLOPs of a training step on `inputs`: 6 for each token and parameter that is no embedding, as `Trainer`
        estimates, those of the core as often as it loops. (Trainer itself counts the core once.)

        Args:
            inputs: of `forward`: input_ids (B, T), and num_loops, an int or (B,), or else the configuration's.
        """
        num_loops = inputs.get("num_loops")
        loops = torch.as_tensor(self.config.num_loops if num_loops is None else num_loops).float().mean().item()
        core = sum(parameter.numel() for parameter in self.base_model.core.parameters())
        used = self.num_parameters(exclude_embeddings=True) + (loops - 1) * core
        return round(6 * inputs["input_ids"].numel() * used)

    def _initialize_weights(self, module, is_custom_code=False):
        # Libraries look for modules whose type is exactly nn.Linear, so values that a linear of ours starts with are
        # set by the module that owns it. Of custom code transformers passes over modules without parameters of their
        # own, since it may fill weights that were loaded; ours are filled through `init`, which spares those.
        super()._initialize_weights(module)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, except that loop settings put into the derived generation config survive a reload."""
        if self.can_generate() and any(name in self.generation_config.to_dict() for name in GENERATION_SETTINGS):
            # Marked as derived from the model config, its custom fields would be dropped on load.
            self.generation_config._from_model_config = False
            count = count_to_save(self.config, self.generation_config)
            if count is not None:
                self.generation_config.num_loops = count
        super().save_pretrained(save_directory, *args, **kwargs)


@auto_docstring
class LoopedModel(LoopedPreTrainedModel):
    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.positions = POSITIONS[config.position_embedding](config)
        self.dropout = make_dropout(config.embedding_dropout)
        core_layer = GatedLoopedLayer if config.kv_sharing == "gated" else LoopedLayer
        self.prelude = nn.ModuleList([LoopedLayer(config, "prelude", i) for i in range(config.num_prelude_layers)])
        self.core = nn.ModuleList([core_layer(config, "core", i) for i in range(config.num_core_layers)])
        self.coda = nn.ModuleList([LoopedLayer(config, "coda", i) for i in range(config.num_coda_layers)])
        self.connection = CONNECTIONS[config.loop_connection](config)
        self.loop_embedding = LOOP_EMBEDDINGS[config.loop_embedding](config)
        self.start = STARTS[config.state_init](config)
        self.sharing = SHARINGS[config.kv_sharing](config)
        # Ouro's final norm closes every loop: what it returns is both the readout and the next loop's input.
        self.core_norm = make_norm(config) if config.norm_between_loops else as_is
        self.norm = as_is if config.final_norm_closes_loops else make_norm(config)
        self.exit_gate = nn.Linear(config.hidden_size, 1) if config.exit_gate else None
        self.gradient_checkpointing = False
        self.post_init()

    def pieces(self) -> list[nn.Module]:
        """What to compile one by one: the layers, and the modules of the loop connection. The loop itself stays in
        Python, so that its length may vary."""
        connection = [module for module in self.connection.modules() if not list(module.children())]
        return [*self.prelude, *self.core, *self.coda, *connection]

    def initialize(self) -> None:
        """Values of a fresh model that it sets after its modules; those that were loaded stay.

        A fresh exit gate leaves after each of `num_loops` loops with chance 1 / num_loops, whatever the state: with
        1/2, deep loops would start with next to no weight in the expected loss.
        """
        if self.exit_gate is not None:
            init.zeros_(self.exit_gate.weight)
            init.constant_(self.exit_gate.bias, -math.log(max(self.config.num_loops - 1, 1)))

    def exit_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """How likely tokens are to leave after a loop (Ouro, arXiv 2510.25741): from normalised states (B, K, D), the
        logits (B, K) in float32."""
        assert self.exit_gate is not None
        return self.exit_gate(hidden_states).squeeze(-1).float()

    @property
    def exit_readout(self) -> Callable | None:
        """Norm + exit gate on a state: (B, K, D) -> (B, K) logits; None in a model without a gate."""
        return None if self.exit_gate is None else lambda state: self.exit_logits(self.norm(state))

    @choose_hidden_states
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(custom_args=FORWARD_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | torch.Tensor | None = None,
        num_grad_loops: int | None = None,
        cut_chunks: bool = False,
        halting: str | dict | FixedRule | Decision | None = None,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LoopedModelOutput:
        refuse_unknown(kwargs)
        if self.config.kv_sharing in REWRITING_SHARINGS:
            refuse_engine(self.config.kv_sharing, cache, kwargs)
        if cache is None or isinstance(cache, Cache):
            past_key_values = one_cache(past_key_values, cache)
        else:  # an engine's, see ENGINE_ARGUMENTS
            kwargs["cache"] = cache
        batch_size, num_tokens = check_inputs(self.config, input_ids, inputs_embeds, attention_mask, past_key_values)
        if torch.compiler.is_compiling():
            self.leave_graph(num_tokens, num_loops, halting)
        num_loops = check_loops(
            self.config.num_loops if num_loops is None else num_loops, batch_size, self.config.max_num_loops
        )
        first_grad_loop = check_grad_loops(num_grad_loops, num_loops)
        if not isinstance(halting, Decision):
            halting = Decision(halting_rule(halting), exit_readout=self.exit_readout)

        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = make_position_ids(embeds, attention_mask, past_key_values)
        call = Call(
            embeds, attention_mask, position_ids, past_key_values, num_loops, first_grad_loop, halting, generator
        )
        if self.is_cut(num_tokens):
            hidden_states, loops_used = Chunks(self, call, cut_chunks).run(**kwargs)
        else:
            hidden_states, loops_used = self.run_call(call, **kwargs)
        return LoopedModelOutput(
            last_hidden_state=hidden_states,
            loops_used=loops_used,
            **{CACHE_NAME: past_key_values},  # pyright: ignore[reportArgumentType]
        )

    def is_cut(self, num_tokens: int) -> bool:
        """Whether a call of so many tokens is run chunk by chunk."""
        return self.config.prefill_chunk is not None and num_tokens > self.config.prefill_chunk

    def leave_graph(self, num_tokens: int, num_loops, halting) -> None:
        """End the graph in the making where a call depends on values that it cannot know.

        `torch.compile` goes on with another graph; with `fullgraph=True` it fails with the reason.

        Raises:
            ValueError: the graph is to be exported.
        """
        rule = halting.rule if isinstance(halting, Decision) else halting_rule(halting)
        reasons = {
            "num_loops as a tensor": isinstance(num_loops, torch.Tensor),
            "a halting rule": rule is not None,
            f"prefill_chunk={self.config.prefill_chunk}": self.is_cut(num_tokens),
            "state_init='normal'": self.config.state_init == "normal" and not self.training,
        }
        for name, holds in reasons.items():
            if holds:
                reason = (
                    f"{name} makes a call data-dependent: compile model.model.pieces() one by one, export without it."
                )
                torch._dynamo.graph_break(msg=reason)
                if torch.compiler.is_exporting():
                    raise ValueError(reason)

    def run_call(self, call: Call, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """One call, or one chunk of it: the (B, T, D) that the head reads, and the loops run for each token (B, T)."""
        embeds, position_ids, past_key_values = call.embeds, call.position_ids, call.past_key_values
        batch_size, num_tokens = embeds.shape[:2]
        causal_mask = create_causal_mask(self.config, embeds, call.attention_mask, past_key_values, position_ids)
        active = ActiveRows(call.num_loops, call.decision)
        self.open_slots(active.num_loops)
        if active.tracks_rows:
            active.open(real_tokens(call.attention_mask, embeds) if call.deciding is None else call.deciding)
        if past_key_values is not None:
            self.sharing.open(past_key_values, active.num_loops)

        embeds = self.dropout(self.positions.embed(embeds, position_ids))
        position_embeddings = self.positions(embeds, position_ids)
        whole = CallContext(causal_mask, position_embeddings, position_ids, past_key_values)
        if active.may_leave:
            whole.check_rows_can_leave()

        own = OwnInputs()
        embeds = self.run_section(self.prelude, "prelude", embeds, whole, own, **kwargs)
        state = self.connection.open(self.start(embeds, position_ids, call.generator, self.training), embeds)
        context, key_inputs = whole, self.sharing.inputs()
        for loop in range(active.num_loops):
            if loop == call.first_grad_loop and self.gradient_checkpointing:
                state = in_graph(state)
            with torch.no_grad() if loop < call.first_grad_loop else nullcontext():
                state = self.run_loop(state, embeds, loop, context, key_inputs, **kwargs)
            rows = active.leave(loop, state, self.connection.close)
            if rows is not None:
                state, embeds = state[rows], embeds[rows]
                key_inputs.keep(rows)
                context = context.keep(rows)
                if past_key_values is not None:
                    context.past_key_values = ActiveCache(past_key_values, active.rows, self.sharing)
                if len(rows) == 0:
                    break
        state, loops_used = active.gather(state)
        hidden_states = self.run_section(self.coda, "coda", self.connection.close(state), whole, own, **kwargs)

        if past_key_values is not None:
            self.sharing.close(past_key_values, active.loops_run, num_tokens)
        return self.norm(hidden_states), per_token(loops_used, batch_size, num_tokens, embeds.device)

    def open_slots(self, num_loops: int) -> None:
        """Have an attention for every slot of `num_loops` loops; the last layer gets its own last."""
        layers = [cast(LoopedLayer, layer).self_attn for layer in self.core]
        if self.sharing.slots.per_loop and len(layers[-1].attentions) < num_loops:
            with nullcontext() if torch.compiler.is_compiling() else OPENING:  # a lock cannot be traced
                for layer in layers:
                    layer.open_slots(num_loops)

    def run_loop(self, state, embeds, loop: int, context, key_inputs, **kwargs) -> torch.Tensor:
        """One loop: the state after it, from the state before it and the prelude's output (B, T, D)."""
        x, gates = self.connection.read(state, embeds, loop)
        x = self.run_section(self.core, "core", x, context, key_inputs, loop, **kwargs)
        x = self.loop_embedding(self.core_norm(x), loop)
        return self.connection.write(state, gates, x, loop)

    def run_section(self, layers, section, hidden_states, context, key_inputs, loop=0, **kwargs):
        """One pass over the layers of a section: (B, T, D) -> (B, T, D)."""
        per_loop = section == "core" and self.sharing.slots.per_loop
        for index, layer in enumerate(layers):
            hidden_states = key_inputs.run(
                layer,
                index,
                hidden_states,
                loop,
                attention=layer.self_attn.attentions[loop if per_loop else 0],
                attention_mask=context.attention_mask,
                position_embeddings=context.position_embeddings,
                position_ids=context.position_ids,
                past_key_values=context.past_key_values,
                **kwargs,
            )
        return hidden_states


@auto_docstring
class LoopedForCausalLM(LoopedPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.model = LoopedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.objective = make_loss(config)
        self.post_init()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"looped {cls.__name__}"] = cls.__name__  # see the end of the file

    def readout(self, state: torch.Tensor) -> torch.Tensor:
        """Norm + head on a state: (B, K, D) -> (B, K, V) logits."""
        return self.lm_head(self.model.norm(state))

    @can_return_tuple
    @auto_docstring(custom_args=FORWARD_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_loops: int | torch.Tensor | None = None,
        num_grad_loops: int | None = None,
        cut_chunks: bool = False,
        halting: str | dict | FixedRule | None = None,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> LoopedCausalLMOutput:
        shift_labels = kwargs.pop("shift_labels", None)
        trains = labels is not None or shift_labels is not None
        states = self.objective.states() if trains else None
        if not trains and self.config.exit_gate and kwargs.get("num_items_in_batch") is not None:
            raise ValueError(
                "the loss is computed outside of the model, from the logits of the last loop, which teach "
                "exit_gate=True nothing: leave out label_smoothing_factor and compute_loss_func, or set "
                "exit_gate=False."
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            num_grad_loops=num_grad_loops,
            cut_chunks=cut_chunks,
            halting=Decision(
                halting_rule(halting), self.readout, logits_to_keep, self.model.exit_readout, states and states.visit
            ),
            generator=generator,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))  # (B, K, V)

        loss = None
        if trains:
            loss = self.objective(self, logits, states, labels=labels, shift_labels=shift_labels, **kwargs)
        return LoopedCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loops_used=outputs.loops_used,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def exits(
        self,
        input_ids: torch.LongTensor,
        shift_labels: torch.LongTensor,
        num_loops: int | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate logits and cross-entropies (nats) of every loop, both (B, T, R), of a model with an exit gate.

        `input_ids` and `shift_labels`, the next token's, are (B, T); what is -100 has no loss. `attention_mask` and
        `position_ids` are those of `forward`: positions that begin anew hold the texts of a row apart.
        `losses_looped.py` says what to do with the result. ValueError without an exit gate.
        """
        if not isinstance(self.objective, ExpectedLoss):
            raise ValueError("exits are read by an exit gate, which this model lacks: train with exit_gate=True.")
        states = self.objective.states()
        self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, num_loops=num_loops,
            use_cache=False, halting=Decision(None, visit=states.visit),
        )  # fmt: skip
        gate_logits, losses = self.objective.read(self, states, shift_labels)
        return states.spread(gate_logits), states.spread(losses)

    def generate(self, *args, **kwargs):
        r"""`GenerationMixin.generate`, with three more settings, also read from `generation_config`:

            num_loops (`int` or `torch.LongTensor` of shape `(batch_size,)`): loops per token.
            halting (`str` or `dict`): rule by which a token stops looping earlier, see `forward`.
            draft_loops (`int`): loops that draft tokens for all loops to verify, of one row, see
                `speculation_looped.py`; 0 for none. How far a draft goes is up to `num_assistant_tokens` and
                `assistant_confidence_threshold`, as in assisted decoding.

        With `return_dict_in_generate=True` the output of sampling and greedy search also has `loops_used`, a
        (B, new tokens) LongTensor, and with `draft_loops` the fields of `SpeculativeGenerateOutput`.
        """
        call = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        settings = call.pop("kwargs", {})
        speculation = self_speculation(self, call, settings)
        if speculation is not None:
            return super().generate(**{**call, "custom_generate": speculation}, **settings)
        return super().generate(**call, **settings)

    def _sample(self, *args, **kwargs):
        return with_loops_used(super()._sample, *args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        return with_loops_used(super()._assisted_decoding, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Loop settings are model arguments: a generation config that knows them must not swallow the call's own."""
        asked = {name: kwargs.pop(name, None) for name in LOOP_SETTINGS}
        given = generation_config
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        cut = generation_config.prefill_chunk_size
        if cut is not None and self.config.kv_sharing in REWRITING_SHARINGS and self.config.prefill_chunk != 1:
            raise ValueError(
                f"prefill_chunk_size={cut}: {cuts_show(self.config.kv_sharing)}. Leave it out; the model's own cuts "
                "are config.prefill_chunk, which bounds memory too."
            )
        if cut is not None and calls_are_prepared(self):
            raise ValueError(f"prefill_chunk_size={cut}: {CALLS_ARE_PREPARED}: leave it out.")
        stored = {
            "num_loops": generation_count(self.config, given, self.generation_config),
            "halting": generation_config.to_dict().get("halting"),
        }
        for name, value in asked.items():
            value = stored[name] if value is None else value
            if value is not None:
                model_kwargs[name] = value
        rule = halting_rule(model_kwargs.pop("halting", None))  # built once: raises before any work, not per token
        if rule is not None:
            model_kwargs["halting"] = rule
        return generation_config, model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, loops_of_calls=None, tokenizer=None, **kwargs
    ):
        # generate looks for inputs_embeds in this signature before it accepts them. The tokenizer, which stop strings
        # need, it hands on to the model, as it does loops_of_calls.
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if self.model.is_cut(tokens.shape[1]) and not is_row_mask(inputs.get("attention_mask")):
            inputs["attention_mask"] = kwargs.get("attention_mask")  # chunks cannot be cut from a prepared mask
        return inputs

    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        """As in transformers, where every request runs `config.num_loops`, which the paged cache is sized by.

        Raises:
            ValueError: the generation config asks for another loop count, or for a halting rule; or tokens depend on
                where prompts are cut (`kv_sharing`).
        """
        if self.config.kv_sharing in REWRITING_SHARINGS:
            raise ValueError(
                f"{cuts_show(self.config.kv_sharing)}, and continuous batching cuts prompts as its load has it: use "
                "generate, or kv_sharing='per_loop' or 'first'."
            )
        num_loops = asked_count(generation_config, self.generation_config)
        halting = (self.generation_config if generation_config is None else generation_config).to_dict().get("halting")
        other = num_loops is not None and (isinstance(num_loops, torch.Tensor) or num_loops != self.config.num_loops)
        if other or halting_rule(halting) is not None:
            raise ValueError(
                f"continuous batching runs config.num_loops={self.config.num_loops} for every token, but the "
                f"generation config asks for num_loops={num_loops}, halting={halting!r}: load the model with "
                "from_pretrained(..., num_loops=...) and leave both out of the generation config."
            )
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _get_candidate_generator(self, generation_config, *args, model_kwargs, assistant_model=None, **kwargs):
        """Drafting: another model that drafts has a depth of its own, or none, and an early exit of this one means
        fewer loops, also where the call names a loop count."""
        if self.config.kv_sharing in REWRITING_SHARINGS:
            raise ValueError(
                f"kv_sharing={self.config.kv_sharing!r} cannot verify drafted tokens: several tokens in one call see "
                "each other at the current loop, so the output would not be that of plain decoding. Use 'per_loop' or "
                "'first'."
            )
        if calls_are_prepared(self):
            raise ValueError(f"drafts of {type(self).__name__}: {CALLS_ARE_PREPARED}: decode without.")
        if assistant_model is not None:
            own = (*LOOP_SETTINGS, "generator", "loops_of_calls")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        candidates = super()._get_candidate_generator(
            generation_config, *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )
        if generation_config.assistant_early_exit is not None:
            candidates.assistant_kwargs["num_loops"] = self.config.loops_of(generation_config.assistant_early_exit)
        elif assistant_model is not None:
            for name in LOOP_SETTINGS:  # what it does not find in the call, it takes from its own generation config
                vars(candidates.generation_config).pop(name, None)
        return candidates

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *, num_new_tokens=1, **kwargs):
        if "loops_of_calls" in model_kwargs:  # decoding loops of other libraries call this as well
            # A call that verifies a draft makes several tokens, all of them at its depth.
            model_kwargs["loops_of_calls"].append(outputs.loops_used[:, -1:].expand(-1, num_new_tokens))
        return super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, num_new_tokens=num_new_tokens, **kwargs
        )


def with_loops_used(decode: Callable, *args, **kwargs):
    """What a decoding method of transformers returns, with the loops of its calls.

    They are asked for here, as a model keyword that only `_update_model_kwargs_for_generation` reads: `generate`
    checks its keywords against the signatures of the model, or of the library that wraps it.
    """
    calls = []
    # In place of the outer call's own, where a model drafts for itself.
    outputs = decode(*args, **kwargs | {"loops_of_calls": calls})
    if type(outputs) is not GenerateDecoderOnlyOutput or any(len(call) != len(outputs.sequences) for call in calls):
        return outputs
    return LoopedGenerateOutput(**outputs, loops_used=torch.cat(calls, dim=1))


class LoopedForSequenceClassification(GenericForSequenceClassification, LoopedPreTrainedModel):
    def __init__(self, config: LoopedConfig):
        # The generic head would build its model through AutoModel, which refuses a config class loaded as remote code.
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LoopedModel(config)
        if self.model.exit_gate is not None:
            # It can be asked when to halt, but no label teaches it: DDP waits for a gradient of all that is trained.
            self.model.exit_gate.requires_grad_(False)
        self.score = nn.Linear(config.hidden_size, len(config.id2label or {}), bias=False)
        self.post_init()


# Trainer and pipelines know a model's task by the names in these tables. Trainer takes a causal model's labels for the
# next token's only if the name of its class is here, or that of its body, which it reads under PEFT's prompt methods.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES |= {"looped": "LoopedForCausalLM", "looped_body": "LoopedModel"}
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["looped"] = "LoopedForSequenceClassification"


def refuse_unknown(kwargs: Iterable[str]) -> None:
    """A misspelt loop argument must not vanish into the attention keywords."""
    for name in kwargs:
        if name not in BACKEND_ARGUMENTS:
            names = [*LoopedForCausalLM.forward.__annotations__, *BACKEND_ARGUMENTS]
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"forward got an unexpected keyword argument {name!r}.{hint}")


def refuse_engine(kv_sharing: str, cache, kwargs: dict) -> None:
    """An engine that packs requests cuts their prompts as its load has it, which would show in the answers."""
    engine = {name: value for name, value in kwargs.items() if name in ENGINE_ARGUMENTS and value is not None}
    engine |= {} if cache is None or isinstance(cache, Cache) else {"cache": cache}
    if engine:
        raise ValueError(
            f"{cuts_show(kv_sharing)}, and an engine that packs requests ({min(engine)} is given) cuts prompts as its "
            "load has it: use generate, or kv_sharing='per_loop' or 'first'."
        )


def cuts_show(kv_sharing: str) -> str:
    return f"kv_sharing={kv_sharing!r} gives other tokens where a prompt is cut"


def check_inputs(config, input_ids, inputs_embeds, attention_mask, past_key_values) -> tuple[int, int]:
    """(B, T) of a call, after checking what would otherwise fail far from its cause."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds.")
    batch_size, num_tokens = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
    # Only on CPU, where it is free: on an accelerator it would wait for the device and break graph capture.
    checkable = input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if checkable and input_ids.numel():
        lowest, highest = (int(bound) for bound in input_ids.aminmax())
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"input_ids must be in [0, {config.vocab_size - 1}] (vocab_size={config.vocab_size}), got values from "
                f"{lowest} to {highest}: is this the tokenizer of another model?"
            )
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    # A static cache counts on the device; its masks are made by generate.
    checkable = is_row_mask(attention_mask) and isinstance(past, int)
    if checkable and attention_mask.shape != (batch_size, past + num_tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but there are {batch_size} rows of {past} "
            f"cached + {num_tokens} new tokens: expected {(batch_size, past + num_tokens)}."
        )
    return batch_size, num_tokens


def is_row_mask(attention_mask) -> bool:
    """A (B, S) mask of real tokens, as opposed to a prepared 4-D or block mask."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def check_loops(num_loops, batch_size: int, max_num_loops: int | None) -> int | torch.Tensor:
    """An int in 1 .. max_num_loops, or a (B,) LongTensor of such."""
    num_loops = check_loops_of_rows(num_loops, batch_size)
    if max_num_loops is not None:
        most = num_loops if isinstance(num_loops, int) else int(num_loops.max())
        if most > max_num_loops:
            raise ValueError(too_many_loops(most, max_num_loops))
    return num_loops


def check_grad_loops(num_grad_loops: int | None, num_loops: int | torch.Tensor) -> int:
    """The first loop that is differentiated."""
    if num_grad_loops is None:
        return 0
    if isinstance(num_loops, torch.Tensor):
        raise ValueError("num_grad_loops needs one num_loops for the whole batch: rows of different depth end apart.")
    if isinstance(num_grad_loops, bool) or not isinstance(num_grad_loops, int) or num_grad_loops < 1:
        raise ValueError(f"num_grad_loops must be an int >= 1, got {num_grad_loops!r}.")
    return max(num_loops - num_grad_loops, 0)


def make_position_ids(inputs_embeds, attention_mask, past_key_values) -> torch.Tensor:
    """(B or 1, T): counted over real tokens where a (B, S) mask says which they are, else over all."""
    num_tokens = inputs_embeds.shape[1]
    if is_row_mask(attention_mask):
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -num_tokens:]
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(num_tokens, device=inputs_embeds.device) + past).unsqueeze(0)


def in_graph(state: torch.Tensor) -> torch.Tensor:
    """The state as one with a gradient: where no input has one, `use_reentrant=True` gives weights none either."""
    return state.detach().requires_grad_() if torch.is_grad_enabled() and not state.requires_grad else state


def real_tokens(attention_mask, embeds: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: this call's tokens that are not padding."""
    if is_row_mask(attention_mask):
        return attention_mask[:, -embeds.shape[1] :].bool()
    return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)


def per_token(loops_used: int | torch.Tensor, batch_size: int, num_tokens: int, device) -> torch.Tensor:
    """(B, T) LongTensor of loops run."""
    if isinstance(loops_used, int):
        return torch.full((batch_size, num_tokens), loops_used, dtype=torch.long, device=device)
    return loops_used.unsqueeze(1).expand(batch_size, num_tokens)


__all__ = [
    "LoopedForCausalLM",
    "LoopedForSequenceClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
]
