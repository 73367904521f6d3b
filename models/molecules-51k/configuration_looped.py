"""Configuration of a looped transformer: which sections it has, how they loop, what the KV cache keeps.

    e     = prelude(embed(ids))                              num_prelude_layers, once
    state = core(core(... core(e)))                          num_core_layers, num_loops times, same weights
    h     = coda(state)                                      num_coda_layers, once

One KV slot per attention call: `[prelude | coda | core @ loop 0 | core @ loop 1 | ...]`, so more loops only append.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .cache_looped import SHARINGS
from .connections_looped import (
    CONNECTIONS,
    DISCRETE_CHANNELS,
    GATES_OF_LOOP,
    HYPER_CONNECTIONS,
    HYPER_INITS,
    LOOP_EMBEDDINGS,
    STARTS,
)
from .depth_looped import SavedDepth, too_many_loops
from .gates_looped import KV_GATES
from .layers_looped import POSITIONS
from .losses_looped import EXIT_LOSSES
from .masks_looped import PATTERNS

logger = logging.get_logger(__name__)

# One repository serves every Auto class, whichever class was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_looped.LoopedConfig",
    "AutoModel": "modeling_looped.LoopedModel",
    "AutoModelForCausalLM": "modeling_looped.LoopedForCausalLM",
    "AutoModelForSequenceClassification": "modeling_looped.LoopedForSequenceClassification",
}

# What PreTrainedConfig accepts beside the declared fields: its own keyword arguments, what it writes into config.json,
# and what quantisers and Trainer store there.
BASE_ARGUMENTS = frozenset(
    {
        "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path", "_output_attentions",
        "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_hidden_layers",
        "num_labels", "output_attentions", "per_layer_config", "quantization_config", "rope_scaling", "rope_theta",
        "tie_last_hidden_states", "torch_dtype", "transformers_version",
    }
)  # fmt: skip


@as_validated_field
def positive_int(value: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"must be an integer >= 1, got {value!r}")


@as_validated_field
def optional_positive_int(value: int | None):
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"must be an integer >= 1 or None, got {value!r}")


@as_validated_field
def optional_window(value: int | None):
    # The sliding layers of transformers' caches keep all but the newest token of a window; of 1 that would be none.
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
        raise ValueError(f"must be an integer >= 2, which counts the token itself, or None, got {value!r}")


@as_validated_field
def non_negative_int(value: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"must be an integer >= 0, got {value!r}")


# Far more than any model needs: what is larger overflows float32 somewhere else.
LARGEST = 1000


@as_validated_field
def scale(value: int | float | None):
    """Standard deviations and weights; None where another field is the default."""
    if value is not None and not 0 <= value <= LARGEST:
        raise ValueError(f"must be a number in [0, {LARGEST}], got {value!r}")


@as_validated_field
def epsilon(value: int | float):
    if not 0 < value <= 1:
        raise ValueError(f"must be a number in (0, 1], got {value!r}")


@as_validated_field
def probability(value: int | float):
    if not 0.0 <= value < 1.0:
        raise ValueError(f"must be in [0, 1), got {value!r}")


@as_validated_field
def share(value: int | float):
    if not 0 <= value <= 1:
        raise ValueError(f"must be a number in [0, 1], got {value!r}")


@as_validated_field
def activation(value: str):
    if value not in ACT2FN:
        near = difflib.get_close_matches(str(value), list(ACT2FN), n=3)
        raise ValueError(f"must be an activation of transformers, got {value!r}; near names: {near}")


def name_in(registry: Mapping[str, object]):
    """A field that holds one of the names of a registry."""

    @as_validated_field
    def name(value: str):
        if value not in registry:
            near = difflib.get_close_matches(str(value), list(registry), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"must be one of {list(registry)}, got {value!r}{hint}")

    return name


@dataclass(frozen=True)
class KVSlots:
    """Which entry of a KV cache an attention call uses: `[prelude | coda | core @ loop 0 | core @ loop 1 | ...]`.

    Args:
        num_prelude_layers, num_coda_layers, num_core_layers: layers of each section.
        per_loop: every loop has its own core slots; otherwise all loops share those of loop 0.
    """

    num_prelude_layers: int
    num_coda_layers: int
    num_core_layers: int
    per_loop: bool

    def slot(self, section: Literal["prelude", "core", "coda"], layer: int, loop: int = 0) -> int:
        """The slot of layer `layer` of `section` in loop `loop`."""
        if section == "prelude":
            return layer
        if section == "coda":
            return self.num_prelude_layers + layer
        loop = loop if self.per_loop else 0
        return self.num_prelude_layers + self.num_coda_layers + loop * self.num_core_layers + layer

    def count(self, num_loops: int) -> int:
        """Slots that `num_loops` loops need."""
        return self.slot("core", self.num_core_layers - 1, num_loops - 1) + 1


@strict
class LoopedConfig(SavedDepth, PreTrainedConfig):
    r"""
    Configuration of a looped model. Sizes use the words of `LlamaConfig`; what is new:

    Args:
        num_prelude_layers (`int`, defaults to 0): layers run once before the loop.
        num_core_layers (`int`, defaults to 2): layers of the core, run `num_loops` times with the same weights.
        num_coda_layers (`int`, defaults to 0): layers run once after the loop.
        num_loops (`int`, defaults to 4): loops run when the caller does not say (>= 1).
        norm_type (`"rmsnorm"` | `"layernorm"`): every norm of the model, epsilon `norm_eps`.
        norm_placement (`"pre"` | `"sandwich"` | `"sandwich_sum"`): sandwich also normalises sublayer outputs (Ouro,
            2510.25741), sandwich_sum also what they and the residual add up to (Huginn, 2502.05171).
        norm_between_loops (`bool`): feed the normalised state into the next loop (Ouro). With no coda that norm is the
            final norm.
        norm_before_coda (`bool`): the final norm is also what the coda reads the last loop's state through (Huginn).
        embedding_multiplier (`float`): times the token embeddings; the head, also a tied one, is as it is.
        gated_mlp (`bool`): `down(act(gate(x)) * up(x))` if true, else `down(act(up(x)))`.
        qk_norm (`bool`): normalise queries and keys per head before the rotary embedding.
        position_embedding (`"rope"` | `"learned"` | `"none"`).
        attention_pattern (`"causal"` | `"prefix"` | `"bidirectional"`): which tokens a token sees: itself and earlier
            ones; in a prompt the whole prompt, where `token_type_ids` say what is prompt (0) and answer (1); or the
            whole text, for answers in place and without `generate`. See `masks_looped.py`.
        sliding_window (`int`, *optional*): in every layer and loop a token sees itself and the `sliding_window - 1`
            tokens before it, as in Mistral, and caches keep no more than these; >= 2. None: all earlier tokens.
        residual_init (`"zero"` | `"normal"`): zero makes every layer start as the identity (Fixup; arXiv 2604.07822).
        embedding_init_std (`float`, *optional*): defaults to `initializer_range`.
        loop_connection (`"plain"` | `"inject_add"` | `"inject_concat"` | `"hyper"` | `"damped"` | `"disco"`): how a
            loop reads and writes the state, see `connections_looped.py`.
        loop_embedding (`"none"` | `"learned"` | `"sinusoidal"`): what is added to the core's output to say which loop
            it was; learned vectors exist for `max_num_loops` loops, waves for any.
        max_num_loops (`int`, *optional*): the most loops a call may ask for. None is no limit; where loops have
            parameters of their own (`hyper_gates="per_loop"`, `loop_embedding="learned"`) it says how many of them
            there are, `num_loops` by default.
        num_streams (`int`): residual streams between loops. This field and the next three are for
            `loop_connection="hyper"`.
        hyper_mixing (`"diagonal"` | `"identity"` | `"sinkhorn"` | `"static"`): what H_res is, how a loop keeps the
            streams: each scaled by a gate (Hyperloop, 2604.21254), whole, mixed by a doubly stochastic matrix (mHC,
            2512.24880), or, without any stream gate, mixed by learned scalars (2604.21106).
        hyper_gates (`"per_loop"` | `"shared"`): each loop has stream gates of its own, or all loops have the same:
            then any number of loops can be run.
        hyper_init (`"norm_preserving"` | `"euler"` | `"plain"` | `"zero"`): what fresh stream gates let through, see
            `HYPER_INITS`; `"euler"` puts a pretrained core into a damped loop.
        damped_beta, damped_horizon (`float`): for `loop_connection="damped"` (2605.23872): initial weight of the first
            loop's output in what leaves the loop, and initial length of all steps together. By default 0.5 and 1.
        disco_channel (`"expected"` | `"likeliest"`): for `loop_connection="disco"` (DiscoLoop, 2607.00341): which
            token embedding a loop reads beside the state: the one expected under what the head reads, or that of the
            likeliest token.
        disco_weight (`float`): for `loop_connection="disco"`: initial weight of that embedding, in [0, 1]; the state
            has the rest.
        state_init (`"embeddings"` | `"zeros"` | `"normal"` | `"truncated_normal"`): what the first loop starts from;
            the last is normal noise without what is beyond three standard deviations (Huginn).
        state_init_std (`float`): standard deviation of normal noise, before it is truncated.
        kv_sharing (`"per_loop"` | `"first"` | `"natural"` | `"last"` | `"mean"` | `"gated"`): which loops of a token
            its cached entries keep, see `cache_looped.py`.
        kv_gate (`"elementwise"` | `"low_rank"` | `"scalar"` | `"mean"` | `"ema"` | `"last"`): how `kv_sharing="gated"`
            (MELT, 2605.07721) mixes loops into what keys and values are computed from, see `gates_looped.py`.
        kv_gate_rank (`int`): rank of `kv_gate="low_rank"`.
        prefill_chunk (`int`, *optional*): tokens of a chunk, for the KV policies whose result depends on it
            (`"last"`, `"mean"`, `"gated"`): longer calls are run chunk by chunk, see `chunks_looped.py`. None: a call
            is one chunk.
        exit_gate (`bool`): an exit gate reads after every loop how likely each token is to halt (Ouro). `labels` then
            give the loss that `exit_loss` names, and the halting rule `"q_exit"` can be asked for.
        exit_loss (`"expected"` | `"gate"`): train the model on the loss expected under the exit gate; or train the
            exit gate alone, on what each loop gains. See `losses_looped.py`.
        exit_entropy_weight (`float`): weight of the exit distribution's entropy, in nats, in the expected loss. Ouro
            starts with 0.1 and goes on with 0.05.

    Raises:
        ValueError (or a strict-dataclass error carrying one): a field of the wrong type or range, an unknown field
            (with the nearest name), sizes that do not divide.
    """

    model_type = "looped"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "loops_used"]  # noqa: RUF012 (an annotation would make it a field)
    # SGLang reads it, or else num_loops, of every model and makes its cache so many times as large as
    # num_hidden_layers says, which counts the loops already. No field: it is not saved.
    loop_num = 1
    vocab_size: int = positive_int(default=32000)
    hidden_size: int = positive_int(default=768)
    intermediate_size: int = positive_int(default=2048)
    num_attention_heads: int = positive_int(default=12)
    num_key_value_heads: int | None = optional_positive_int(default=None)
    head_dim: int | None = optional_positive_int(default=None)
    max_position_embeddings: int = positive_int(default=2048)

    num_prelude_layers: int = non_negative_int(default=0)
    num_core_layers: int = positive_int(default=2)
    num_coda_layers: int = non_negative_int(default=0)
    num_loops: int = positive_int(default=4)

    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: int | float = epsilon(default=1e-6)
    norm_placement: Literal["pre", "sandwich", "sandwich_sum"] = "pre"
    norm_between_loops: bool = False
    norm_before_coda: bool = False
    embedding_multiplier: int | float = scale(default=1.0)
    hidden_act: str = activation(default="silu")
    gated_mlp: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_dropout: int | float = probability(default=0.0)
    residual_dropout: int | float = probability(default=0.0)
    embedding_dropout: int | float = probability(default=0.0)
    tie_word_embeddings: bool = True

    position_embedding: str = name_in(POSITIONS)(default="rope")
    rope_parameters: RopeParameters | dict | None = None
    attention_pattern: str = name_in(PATTERNS)(default="causal")
    sliding_window: int | None = optional_window(default=None)

    residual_init: Literal["zero", "normal"] = "normal"
    initializer_range: int | float = scale(default=0.02)
    embedding_init_std: int | float | None = scale(default=None)

    loop_connection: str = name_in(CONNECTIONS)(default="plain")
    loop_embedding: str = name_in(LOOP_EMBEDDINGS)(default="none")
    max_num_loops: int | None = optional_positive_int(default=None)
    num_streams: int = positive_int(default=4)
    hyper_mixing: str = name_in(HYPER_CONNECTIONS)(default="diagonal")
    hyper_gates: str = name_in(GATES_OF_LOOP)(default="per_loop")
    hyper_init: str = name_in(HYPER_INITS)(default="norm_preserving")
    damped_beta: int | float = scale(default=0.5)
    damped_horizon: int | float = scale(default=1.0)
    disco_channel: str = name_in(DISCRETE_CHANNELS)(default="expected")
    disco_weight: int | float = share(default=0.5)
    state_init: str = name_in(STARTS)(default="embeddings")
    state_init_std: int | float = scale(default=1.0)
    kv_sharing: str = name_in(SHARINGS)(default="per_loop")
    kv_gate: str = name_in(KV_GATES)(default="elementwise")
    kv_gate_rank: int = positive_int(default=64)
    prefill_chunk: int | None = None
    exit_gate: bool = False
    exit_loss: str = name_in(EXIT_LOSSES)(default="expected")
    exit_entropy_weight: int | float = scale(default=0.1)

    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __new__(cls, *args, **fields):
        config = super().__new__(cls)
        if {"num_loops", "num_hidden_layers"} <= set(fields):
            # Only here can a loop count that was given be told from the default.
            vars(config)["_says_depth_twice"] = True
        return config

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
        self._refuse_two_ropes(kwargs)
        labels = kwargs.get("num_labels")
        if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int) or labels < 1):
            raise ValueError(f"num_labels must be an integer >= 1, got {labels!r}.")
        if vars(self).pop("_says_depth_twice", False):
            self._refuse_contradiction(self.num_loops, kwargs["num_hidden_layers"])
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads ({self.num_attention_heads}) does not divide hidden_size "
                    f"({self.hidden_size}): change one of them, or set head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.max_num_loops is None and self.loops_have_parameters:
            self.max_num_loops = self.num_loops
        # Plans name modules, and must name none that a section of zero layers does not have.
        self.base_model_tp_plan = self._tensor_parallel_plan()
        self.base_model_fsdp_plan = self._sharding_plan()
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @classmethod
    def _refuse_unknown(cls, arguments: dict):
        """PreTrainedConfig keeps any keyword as an attribute, so a misspelt field would be saved and do nothing."""
        known = {field.name for field in fields(cls)}
        generation = set(GenerationConfig().to_dict())
        for name in sorted(set(arguments) - known - BASE_ARGUMENTS):
            if name in generation:
                raise ValueError(f"{name!r} is a generation setting: set it in `model.generation_config`.")
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the fields are {sorted(known)}"
            raise ValueError(f"LoopedConfig has no field {name!r} (value {arguments[name]!r}); {hint}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; keywords that are fields go before the dict."""
        loaded = super().from_dict(config_dict, **kwargs)
        if {"num_loops", "num_hidden_layers"} <= set(kwargs):
            config = loaded[0] if isinstance(loaded, tuple) else loaded
            config._refuse_contradiction(kwargs["num_loops"], kwargs["num_hidden_layers"])
        return loaded

    def _refuse_contradiction(self, num_loops: int, num_hidden_layers: int):
        """The number of layers is derived from the loops: whoever says both has to mean one depth."""
        count = self.kv_slots().count(num_loops)
        if num_hidden_layers != count:
            raise ValueError(
                f"num_hidden_layers={num_hidden_layers} contradicts num_loops={num_loops}, which has {count}: leave "
                "num_hidden_layers out, it is derived."
            )

    def _refuse_two_ropes(self, arguments: dict):
        """Older files say `rope_theta` and `rope_scaling`: beside `rope_parameters` they have to mean the same."""
        own = self.rope_parameters or {}
        said = {"rope_theta": arguments.get("rope_theta")} | dict(arguments.get("rope_scaling") or {})
        for name, value in said.items():
            if value is not None and own.get(name, value) != value:
                raise ValueError(
                    f"{name}={value!r} contradicts rope_parameters, which has {name}={own[name]!r}: say it in "
                    "rope_parameters alone."
                )

    def validate_sizes(self):
        """Pairs of sizes that must fit together; run by `@strict` after construction and before saving."""
        if self.num_key_value_heads is None or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.head_dim is None or (self.position_embedding == "rope" and self.head_dim % 2):
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even for rotary position embeddings; by default it is "
                "hidden_size / num_attention_heads."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id ({self.pad_token_id}) must be None or a token, in 0 .. vocab_size - 1 = "
                f"{self.vocab_size - 1}."
            )

    def validate_rope_numbers(self):
        """The numbers of `rope_parameters`, of which transformers checks the names: wavelengths and their factors."""
        for name, value in (self.rope_parameters or {}).items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                least = 0 if "mscale" in name else math.ulp(0)
                if isinstance(number, bool) or not isinstance(number, (int, float)):
                    continue
                if not least <= number < math.inf:
                    raise ValueError(f"rope_parameters: {name} must be a positive number, got {value!r}.")

    def validate_loops(self):
        """A loop without parameters of its own cannot be run where the others have some."""
        if self.max_num_loops is not None and not 1 <= self.num_loops <= self.max_num_loops:
            raise ValueError(too_many_loops(self.num_loops, self.max_num_loops))
        if self.loops_have_parameters and self.max_num_loops is None:
            raise ValueError("max_num_loops must say how many loops have gates or embeddings of their own, got None.")

    def validate_norms(self):
        """Norms that would do nothing, or undo what another field says."""
        if self.norm_before_coda and not self.num_coda_layers:
            raise ValueError(
                "norm_before_coda=True needs a coda, and num_coda_layers=0: leave it out, or add layers to the coda."
            )
        if self.norm_placement == "sandwich_sum" and self.residual_init == "zero":
            raise ValueError(
                "residual_init='zero' starts layers as the identity, which no layer with "
                "norm_placement='sandwich_sum' is: use residual_init='normal'."
            )

    def validate_start(self):
        """Said, not refused: such a model is a building block of tests, and nothing else."""
        if self.state_init != "embeddings" and not CONNECTIONS[self.loop_connection].reads_embeds:
            logger.warning_once(
                f"state_init={self.state_init!r} with loop_connection={self.loop_connection!r} never reads the input: "
                "use loop_connection='inject_add' or 'inject_concat'."
            )

    def validate_hyper(self):
        """Initial values that the connection does not have."""
        if self.hyper_init == "euler" and self.hyper_mixing != "diagonal":
            raise ValueError(
                f"hyper_init='euler' keeps a share of each stream, which hyper_mixing={self.hyper_mixing!r} cannot: "
                "use hyper_mixing='diagonal'."
            )
        if self.hyper_mixing == "static" and self.hyper_init != "norm_preserving":
            raise ValueError(
                f"hyper_init={self.hyper_init!r} is of gates, and hyper_mixing='static' has none: leave it out."
            )

    def validate_pattern(self):
        """What a pattern of attention that looks ahead cannot be combined with."""
        pattern, said = PATTERNS[self.attention_pattern], f"attention_pattern={self.attention_pattern!r}"
        sharings = pattern.sharings
        if sharings is not None and self.kv_sharing not in sharings:
            raise ValueError(
                f"{said} needs kv_sharing={' or '.join(map(repr, sharings))}, got {self.kv_sharing!r}: a token that "
                "sees later ones would see other entries of them than a cache has."
            )
        if pattern.looks_ahead and self.sliding_window is not None:
            raise ValueError(
                f"{said} sees more than earlier tokens, and sliding_window={self.sliding_window} less: leave "
                "sliding_window out, or use attention_pattern='causal'."
            )

    def validate_chunks(self):
        """Chunks mean something only where a loop rewrites the entries of the loop before."""
        if self.prefill_chunk is None:
            return
        if isinstance(self.prefill_chunk, bool) or self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be an integer >= 1 or None, got {self.prefill_chunk!r}.")
        if not SHARINGS[self.kv_sharing].rewrites:
            raise ValueError(
                f"prefill_chunk={self.prefill_chunk} has no meaning with kv_sharing={self.kv_sharing!r}, where every "
                "chunk length gives the same output: leave it out. `generate(prefill_chunk_size=...)` saves memory."
            )

    def validate_exit(self):
        """An exit gate weighs what is read after every loop, and a coda is run after the last loop only."""
        if self.exit_gate and self.num_coda_layers:
            raise ValueError(
                f"exit_gate=True reads the state after every loop, which num_coda_layers={self.num_coda_layers} would "
                "change before it is read out: use num_coda_layers=0."
            )

    @property
    def loops_have_parameters(self) -> bool:
        """Whether loops have gates or embeddings of their own, so that no more of them can be run."""
        connection, embedding = CONNECTIONS[self.loop_connection], LOOP_EMBEDDINGS[self.loop_embedding]
        return connection.has_parameters_per_loop(self) or embedding.has_parameters_per_loop

    @property
    def num_hidden_layers(self) -> int:
        """Attention calls with a KV slot of their own: what stock caches, recorders and engines size themselves by."""
        return self.kv_slots().count(self.num_loops)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        """Early-exit drafting and tools that shrink a model assign this field: it sets the loop count."""
        loops = self.loops_of(value)
        if SHARINGS[self.kv_sharing].slot_per_loop:
            self.num_loops = loops

    def loops_of(self, num_hidden_layers: int) -> int:
        """The loop count that has `num_hidden_layers` KV slots.

        Raises:
            ValueError: no whole number of loops does.
        """
        outside = self.num_prelude_layers + self.num_coda_layers
        loops, rest = divmod(num_hidden_layers - outside, self.num_core_layers)
        if rest or loops < 1 or (loops > 1 and not SHARINGS[self.kv_sharing].slot_per_loop):
            raise ValueError(
                f"num_hidden_layers={num_hidden_layers} is not {outside} layers outside the core plus a whole number "
                f"of loops of {self.num_core_layers} core layers with kv_sharing={self.kv_sharing!r}: set num_loops."
            )
        return loops

    @property
    def num_layer_calls(self) -> int:
        """Layers run per token by default: what recorded hidden states are counted by."""
        return self.num_prelude_layers + self.num_coda_layers + self.num_core_layers * self.num_loops

    @property
    def final_norm_closes_loops(self) -> bool:
        """The norm between loops is also the final one: nothing comes after the last loop (Ouro)."""
        closes = CONNECTIONS[self.loop_connection].closes_with_norm
        return closes and self.norm_between_loops and self.num_coda_layers == 0

    def _sections(self) -> list[str]:
        layers = {"prelude": self.num_prelude_layers, "core": self.num_core_layers, "coda": self.num_coda_layers}
        return [section for section, count in layers.items() if count]

    def _tensor_parallel_plan(self) -> dict[str, str]:
        plan = {f"self_attn.{name}_proj": "colwise" for name in "qkv"} | {"self_attn.o_proj": "rowwise"}
        plan |= {"mlp.gate_proj": "colwise"} if self.gated_mlp else {}
        plan |= {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        return {f"{section}.*.{module}": kind for section in self._sections() for module, kind in plan.items()}

    def _sharding_plan(self) -> dict[str, str]:
        layers = {f"{section}.*": "free_full_weight" for section in self._sections()}
        norms = {"core_norm": self.norm_between_loops, "norm": not self.final_norm_closes_loops}
        kept = {norm: "keep_full_weight" for norm, exists in norms.items() if exists}
        return {"embed_tokens": "free_full_weight", **layers, **kept}

    def to_dict(self) -> dict:
        """As in transformers, without attributes that are no fields: tools set some, and loading would refuse them."""
        output = super().to_dict()
        known = {field.name for field in fields(self)} | BASE_ARGUMENTS
        for name in [name for name in output if name not in known]:
            logger.warning_once(f"{name!r} is not a field of LoopedConfig and is not saved.")
            del output[name]
        return output

    def kv_slots(self) -> KVSlots:
        """The slot arithmetic of this configuration."""
        per_loop = SHARINGS[self.kv_sharing].slot_per_loop
        return KVSlots(self.num_prelude_layers, self.num_coda_layers, self.num_core_layers, per_loop)


__all__ = ["KVSlots", "LoopedConfig"]
