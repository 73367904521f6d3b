"""A looped (recurrent-depth) transformer: the core's weights run `num_loops` times, and that count is an argument.

    e     = prelude(embed(ids))                               # (B, T, D)  once
    state = connection.open(start(e), e)                      # (B, T, D)
    for loop in range(num_loops):                             # the same weights every time
        x, carry = connection.read(state, e, loop)
        state    = connection.write(state, carry, core(x), loop)   # with the loop's embedding, where loops have one
        batch rows that halt leave the batch                  # no work is done for them
    h      = coda(connection.close(state))                    # (B, T, D)  once
    logits = head(norm(h))                                    # (B, T, V)

`LoopedModel.run_call` is this page in code. Layers are Llama's (or GPT-2's, by configuration); what differs is the
loop, its KV slots and its halting. Sources: Loop, Think & Generalize (arXiv 2604.07822) for the plain loop and
halting, Ouro (2510.25741) for sandwich norms and the norm between loops, Huginn (2502.05171) for prelude, coda,
injection and random starts.

Legend: B batch rows, b batch rows that still loop, T tokens, K positions that are read out, D hidden size, S streams,
V vocabulary, R loops. Loops are counted from 0.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .base_looped import LoopedPreTrainedModel
from .cache_layers_looped import CACHE_NAME, one_cache
from .cache_looped import OWN_KEYS, SHARINGS
from .calls_looped import (
    ActiveBatch,
    Call,
    CallContext,
    Decision,
    LoopStates,
    Observer,
    longest_text,
    make_position_ids,
    positions_below,
)
from .checks_looped import (
    check_grad_loops,
    check_inputs,
    check_loops,
    check_no_cache,
    check_served,
    leave_graph,
    refuse_engine,
    refuse_unknown,
)
from .chunks_looped import Chunks
from .configuration_looped import LoopedConfig
from .connections_looped import CONNECTIONS, LOOP_EMBEDDINGS, STARTS
from .generation_looped import LoopedGenerationMixin
from .growing_looped import growing_cache
from .halting_looped import Rule, halting_rule
from .initial_looped import SetsInitialValues
from .layers_looped import POSITIONS, LoopedLayer, as_is, make_dropout, make_multiplier, make_norm, open_slots
from .losses_looped import ExitObjective, make_objective
from .masks_looped import PATTERNS, check_pattern
from .outputs_looped import LoopedCausalLMOutput, LoopedModelOutput, choose_hidden_states
from .versions_looped import slice_logits_to_keep


class LoopedModel(LoopedPreTrainedModel, SetsInitialValues):
    """A looped transformer without a head: prelude, core, coda and final norm.

    Args:
        config: sizes, and how the loop reads, writes, caches and starts.
    """

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.multiply = make_multiplier(config.embedding_multiplier)
        self.positions = POSITIONS[config.position_embedding](config)
        self.dropout = make_dropout(config.embedding_dropout)
        self.sharing = SHARINGS[config.kv_sharing](config)
        self.pattern = PATTERNS[config.attention_pattern]
        check_served(config, self.sharing)
        self.prelude = nn.ModuleList([LoopedLayer(config, "prelude", i) for i in range(config.num_prelude_layers)])
        self.core = nn.ModuleList([self.sharing.core_layer(config, "core", i) for i in range(config.num_core_layers)])
        self.coda = nn.ModuleList([LoopedLayer(config, "coda", i) for i in range(config.num_coda_layers)])
        self.connection = CONNECTIONS[config.loop_connection].of(config)(config)
        self.loop_embedding = LOOP_EMBEDDINGS[config.loop_embedding](config)
        self.start = STARTS[config.state_init](config)
        self.core_norm = make_norm(config) if config.norm_between_loops else as_is
        self.norm = as_is if config.final_norm_closes_loops else make_norm(config)
        self.exit_gate = nn.Linear(config.hidden_size, 1) if config.exit_gate else None
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def readout_norm(self) -> Callable:
        """The norm through which head and exit gate read a state: logits = W readout_norm(h), (B, K, D) -> (B, K, D).

        It is the final norm. Ouro (arXiv 2510.25741) has one norm for everything, which closes every loop: with h_t =
        core_norm(core(h_{t-1})) the state is normalised already, logits_t = W h_t, and this is the identity.
        """
        return self.norm

    @property
    def coda_norm(self) -> Callable:
        """What the coda reads the state through, (B, T, D) -> (B, T, D): the final norm, or nothing."""
        return self.norm if self.config.norm_before_coda else as_is

    def pieces(self) -> list[nn.Module]:
        """What to compile one by one: the layers, and the modules of the loop connection.

        The loop itself stays in Python, so that its length may vary.
        """
        connection = [module for module in self.connection.modules() if not list(module.children())]
        return [*self.prelude, *self.core, *self.coda, *connection]

    def initialize(self) -> None:
        """A fresh exit gate says for every loop that the token halts there with chance 1 / num_loops.

        It does so whatever the state. With 1/2, deep loops would start with next to no weight in the expected loss.
        """
        if self.exit_gate is not None:
            init.zeros_(self.exit_gate.weight)
            init.constant_(self.exit_gate.bias, -math.log(max(self.config.num_loops - 1, 1)))

    def exit_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The exit gate's logits, how likely each token is to halt after a loop (Ouro, arXiv 2510.25741).

        Normalised states (B, K, D) -> (B, K) in float32.
        """
        assert self.exit_gate is not None
        return self.exit_gate(hidden_states).squeeze(-1).float()

    @property
    def exit_readout(self) -> Callable | None:
        """Norm and exit gate on a state: (B, K, D) -> (B, K) logits; None in a model without an exit gate."""
        return None if self.exit_gate is None else lambda state: self.exit_logits(self.readout_norm(state))

    @choose_hidden_states
    @merge_with_config_defaults
    @capture_outputs
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
        halting: str | dict | Rule | Decision | None = None,
        observe: Observer | None = None,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> LoopedModelOutput:
        """One call of the model: the hidden states (B, T, D) that a head reads, after the final norm.

        What is not listed here is as in `LoopedForCausalLM.forward`.

        Args:
            halting: a rule that needs no logits, `"latent"` or `"q_exit"`; or a `Decision`, which brings a head.

        Raises:
            ValueError: a loop count, mask, token id or halting rule does not fit.
            TypeError: a keyword is unknown.
        """
        refuse_unknown(kwargs, LoopedForCausalLM.forward.__annotations__)
        check_served(self.config, self.sharing, num_loops, halting is not None)
        if not self.sharing.takes_engines or self.pattern.looks_ahead:
            refuse_engine(self.config, self.sharing, cache, kwargs)
        if cache is None or isinstance(cache, Cache):
            past_key_values = one_cache(past_key_values, cache)
        else:  # an engine's, see ENGINE_ARGUMENTS
            kwargs["cache"] = cache
        batch_size, num_tokens = check_inputs(self.config, input_ids, inputs_embeds, attention_mask, past_key_values)
        if torch.compiler.is_compiling():
            leave_graph(
                {
                    "num_loops as a tensor": isinstance(num_loops, torch.Tensor),
                    "a halting rule": isinstance(halting, Decision) or halting_rule(halting) is not None,
                    f"prefill_chunk={self.config.prefill_chunk}": self.is_cut(num_tokens),
                    f"state_init={self.config.state_init!r}": not self.training
                    and not self.start.in_graph(generator, longest_text(past_key_values)),
                }
            )
        num_loops = check_loops(
            self.config.num_loops if num_loops is None else num_loops, batch_size, self.config.max_num_loops
        )
        first_grad_loop = check_grad_loops(num_grad_loops, num_loops)
        if not isinstance(halting, Decision):
            halting = Decision.of(halting, gate=self.exit_readout)

        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        self.pattern.check_types(token_type_ids, embeds)
        if not self.pattern.takes_cache:
            check_no_cache(self.config.attention_pattern, past_key_values)
        elif use_cache and past_key_values is None:
            new_cache = DynamicCache if torch.compiler.is_compiling() else growing_cache
            past_key_values = new_cache(config=self.config)
        longest = longest_text(past_key_values)
        if longest is not None and not torch.compiler.is_compiling():
            self.start.prepare(longest, generator, embeds.device)
        counted = position_ids is None
        if position_ids is None:
            position_ids = make_position_ids(embeds, attention_mask, past_key_values)
        call = Call(
            embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            num_loops=num_loops,
            first_grad_loop=first_grad_loop,
            halting=halting,
            observe=observe,
            generator=generator,
            token_type_ids=token_type_ids,
            num_positions=positions_below(embeds, past_key_values) if counted else None,
            counted=counted,
            budgets=None if isinstance(num_loops, int) else num_loops.tolist(),
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

    def stopped(
        self, state: torch.Tensor, attention_mask=None, position_ids=None, token_type_ids=None
    ) -> torch.Tensor:
        """What the head reads in a call without a cache whose last loop left `state`: (B, T, D) -> (B, T, D).

        So a state that `observe` shows gives what a call with fewer loops would give, except where the connection
        counts loops.

        Args:
            state: of all batch rows, as `observe` shows it.
            attention_mask, position_ids, token_type_ids: of the call.
        """
        if self.config.num_coda_layers == 0:
            return self.readout_norm(state)
        counted = position_ids is None
        if counted:
            position_ids = make_position_ids(state, attention_mask, None)
        call = Call(
            state, attention_mask, position_ids, None, num_loops=1, token_type_ids=token_type_ids, counted=counted
        )
        context = self.open_context(call)
        return self.readout_norm(self.run_section(self.coda, self.coda_norm(state), context))

    def is_cut(self, num_tokens: int) -> bool:
        """Whether a call of so many tokens is run chunk by chunk."""
        return self.config.prefill_chunk is not None and num_tokens > self.config.prefill_chunk

    def run_call(self, call: Call, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """One call, or one chunk of it: the (B, T, D) that the head reads, and the loops run for each token (B, T)."""
        context, embeds, state = self.begin(call, **kwargs)
        active = ActiveBatch(call, state, embeds, context, self.sharing)
        for loop in range(call.most_loops):  # the same weights every time
            active.reach(loop)
            with active.gradients(loop, self.gradient_checkpointing):
                active.state = self.run_loop(active.state, active.embeds, active.context, loop, **kwargs)
            if not active.leave(loop, self.connection.close):  # batch rows that halt leave, with all that is theirs
                break
        state, loops_used = active.gather()  # every batch row again
        hidden_states = self.coda_norm(self.connection.close(state))  # (B, T, D)
        hidden_states = self.run_section(self.coda, hidden_states, context, **kwargs)  # (B, T, D)  once
        if call.past_key_values is not None:
            self.sharing.close(call.past_key_values, active.loops_run, embeds.shape[1])
        return self.readout_norm(hidden_states), loops_used

    def begin(self, call: Call, **kwargs) -> tuple[CallContext, torch.Tensor, torch.Tensor]:
        """What comes before the loops: the context, the output of the prelude (B, T, D), and the initial state,
        (B, T, D) or, with S streams, (B, T, S, D)."""
        context = self.open_context(call)  # mask, rotary angles, the cache with its slots open
        embeds = self.embed(call.embeds, call.position_ids)
        embeds = self.run_section(self.prelude, embeds, context, **kwargs)  # (B, T, D)  once
        start = self.start(embeds, call.position_ids, call.generator, self.training, call.num_positions)
        return context, embeds, self.connection.open(start, embeds)

    def open_context(self, call: Call) -> CallContext:
        """What the layers of a call share: the mask, the rotary angles, and the cache with its slots open."""
        self.sharing.check_attention()
        check_pattern(self.config)
        cache, position_ids = call.past_key_values, call.position_ids
        # transformers looks in position ids for packed sequences, for which an accelerator would wait.
        packing = None if call.counted else position_ids
        mask = self.pattern.mask(self.config, call.embeds, call.attention_mask, cache, packing, call.token_type_ids)
        angles = self.positions(call.embeds, position_ids)
        num_loops = call.num_loops if isinstance(call.num_loops, int) else call.num_loops.to(call.embeds.device)
        context = CallContext(mask, angles, position_ids, cache, OWN_KEYS, num_loops)
        if call.rows_may_halt:
            context.check_rows_can_leave()
        open_slots(self.core, call.most_loops)
        if cache is not None:
            self.sharing.open(cache, call.sure_loops)
        return context

    def embed(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings (B, T, D) at positions (B or 1, T) -> what the prelude runs on, (B, T, D)."""
        return self.dropout(self.positions.embed(self.multiply(embeds), position_ids))

    def embed_words(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings without positions: ids (...) -> (..., D)."""
        return self.multiply(self.embed_tokens(ids))

    def run_section(self, layers, hidden_states: torch.Tensor, context: CallContext, loop: int = 0, **kwargs):
        """The layers of a section one after the other, in a loop counted from 0: (b, T, D) -> (b, T, D)."""
        for index, layer in enumerate(layers):
            hidden_states = context.key_source.run_layer(
                layer,
                index,
                hidden_states,
                loop,
                attention=context.attention(layer.self_attn.at(loop)),
                attention_mask=context.attention_mask,
                position_embeddings=context.position_embeddings,
                position_ids=context.position_ids,
                past_key_values=context.past_key_values,
                **kwargs,
            )
        return hidden_states

    def run_loop(self, state: torch.Tensor, embeds: torch.Tensor, context: CallContext, loop: int, **kwargs):
        """One loop, counted from 0: the state (b, T, D) or (b, T, S, D) before it -> the state after it.

        Args:
            embeds: (b, T, D), the output of the prelude.
            context: of these b batch rows.
        """
        connection = self.connection.at(context.num_loops)
        x, carry = connection.read(state, embeds, loop)
        x = self.run_section(self.core, x, context, loop, **kwargs)
        x = self.loop_embedding(self.core_norm(x), loop)
        return connection.write(state, carry, x, loop)


class LoopedForCausalLM(LoopedPreTrainedModel, LoopedGenerationMixin):
    """A looped transformer that predicts the next token, with `generate`.

    >>> model = LoopedForCausalLM(LoopedConfig(vocab_size=100, hidden_size=64, num_attention_heads=4)).eval()
    >>> ids = torch.tensor([[5, 3, 8]])
    >>> model(ids, num_loops=8).logits.shape
    torch.Size([1, 3, 100])
    >>> model.generate(ids, num_loops=8, max_new_tokens=4).shape
    torch.Size([1, 7])

    Args:
        config: sizes, and how the loop reads, writes, caches and starts.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: LoopedConfig):
        super().__init__(config)
        self.model = LoopedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.objective = make_objective(config)
        self.model.connection.bind(self.readout, self.model.embed_words)
        self.post_init()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"looped {cls.__name__}"] = cls.__name__  # see the end of the file

    def readout(self, state: torch.Tensor) -> torch.Tensor:
        """Norm and head on a state: (B, K, D) -> (B, K, V) logits."""
        return self.lm_head(self.model.readout_norm(state))

    @can_return_tuple
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
        halting: str | dict | Rule | None = None,
        observe: Observer | None = None,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> LoopedCausalLMOutput:
        """One call of the model: logits, with the loss where labels are given.

        B batch rows, T tokens, D hidden size, V vocabulary.

        Args:
            input_ids: (B, T) tokens; these or `inputs_embeds`.
            attention_mask: (B, T), 0 for padding, or a mask that a library has prepared, (B, 1, T, cached + T).
            position_ids: (B, T) or (1, T); by default they count the tokens that are not padding.
            past_key_values: keys and values of earlier calls, from which this one goes on and to which it adds; a new
                `DynamicCache` if not given, whose layers grow by doubling (`growing_looped.py`).
            inputs_embeds: (B, T, D), in place of `input_ids`.
            labels: (B, T), the tokens themselves: the loss shifts them. -100 has no loss.
            use_cache: return the cache; `config.use_cache` by default.
            logits_to_keep: compute the logits of so many last tokens, 0 for all, or of the positions in a LongTensor.
            num_loops: loops of the core, >= 1; `config.num_loops` by default. With a (B,) LongTensor every batch row
                gets a loop count of its own, as if it were run alone, and leaves the batch after its last loop.
            num_grad_loops: only so many last loops are differentiated (truncated back-propagation). Head and exit
                gate learn from all loops they read.
            cut_chunks: with `config.prefill_chunk`, no gradient goes from a chunk of tokens to the cached entries of
                earlier ones.
            halting: rule by which a batch row halts before `num_loops`: the name of one of `RULES` in
                `halting_looped.py`, such as `"kl_entropy"`; a dict with the rule's thresholds, `{"rule":
                "kl_entropy", "kl_threshold": 0.01, "max_entropy": 3.0}`; or a rule object. `"q_exit"` needs
                `exit_gate=True` in the configuration. The rule reads the positions of `logits_to_keep`, padding
                excluded. A batch row halts when all of them agree.
            observe: called after every loop as `observe(rows, state)`: with a (b,) LongTensor of the batch rows that
                ran it, and what coda and readout see of their state, (b, T, D), before the final norm.
            generator: seed of `state_init="normal"`, see `connections_looped.py`.
            cache: the same as `past_key_values`: its name in transformers from 5.24 on.
            token_type_ids: (B, T), 0 for a token of the prompt and 1 for one of the answer, where
                `config.attention_pattern` is `"prefix"`. By default a text is a prompt and what follows it in the
                cache an answer; a call with labels has to say.
            **kwargs: `shift_labels` (B, T), the next token of every token, in place of `labels`;
                `output_hidden_states`, `output_attentions`, `return_dict`, and what the attention takes.

        Returns:
            Logits (B, T, V), or of the tokens kept; the loss in nats; the cache; and `loops_used` (B, T).

        Raises:
            ValueError: a loop count, mask, token id or halting rule does not fit.
            TypeError: a keyword is unknown.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        trains = labels is not None or shift_labels is not None
        states = self.objective.states(logits_to_keep, observe) if trains else None
        if not trains and self.config.exit_gate and kwargs.get("num_items_in_batch") is not None:
            raise ValueError(
                "the loss is computed outside of the model, from the logits of the last loop, which teach "
                "exit_gate=True nothing: leave out label_smoothing_factor and compute_loss_func, or set "
                "exit_gate=False."
            )
        if trains and token_type_ids is None and self.model.pattern.tells_prompts:
            raise ValueError(
                "labels of attention_pattern='prefix' need token_type_ids, 0 for the prompt's tokens and 1 for the "
                "answer's: without them the whole text is a prompt, which sees what it has to predict."
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
            halting=Decision.of(halting, head=self.readout, gate=self.model.exit_readout, positions=logits_to_keep),
            observe=observe if states is None else states,
            generator=generator,
            token_type_ids=token_type_ids,
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
        token_type_ids: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The exit gate's logits and the cross-entropies (nats) of every loop, (B, T, R) each.

        `losses_looped.py` says what to do with them.

        Args:
            input_ids: (B, T).
            shift_labels: (B, T), the next token of every token; -100 has no loss.
            num_loops: R, by default the configuration's.
            attention_mask, position_ids, token_type_ids: as in `forward`; positions that begin anew separate texts in
                a batch row.

        Raises:
            ValueError: the model has no exit gate.
        """
        if not isinstance(self.objective, ExitObjective):
            raise ValueError("exits are read by an exit gate, which this model lacks: train with exit_gate=True.")
        states = LoopStates()
        self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, num_loops=num_loops,
            use_cache=False, observe=states, token_type_ids=token_type_ids,
        )  # fmt: skip
        gate_logits, losses = self.objective.read(self, states, shift_labels)
        return states.spread(gate_logits), states.spread(losses)


class LoopedForSequenceClassification(GenericForSequenceClassification, LoopedPreTrainedModel):
    """A looped transformer that scores classes at the last token of a text, or one number.

    Args:
        config: sizes, how the loop reads, writes, caches and starts, and `num_labels`.
    """

    def __init__(self, config: LoopedConfig):
        # The generic head would build its model through AutoModel, which refuses a config class loaded as remote code.
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LoopedModel(config)
        if self.model.exit_gate is not None:
            # A halting rule may read it, but no label teaches it: DDP waits for a gradient of all that is trained.
            self.model.exit_gate.requires_grad_(False)
        self.score = nn.Linear(config.hidden_size, len(config.id2label or {}), bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | torch.Tensor | None = None,
        num_grad_loops: int | None = None,
        cut_chunks: bool = False,
        halting: str | dict | Rule | None = None,
        observe: Observer | None = None,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """One call of the model: a score for every class, with the loss where labels are given.

        What is not listed here is as in `LoopedForCausalLM.forward`.

        Args:
            labels: (B,), classes from 0 on; numbers where `config.num_labels` is 1.
            halting: a rule that needs no logits, `"latent"` or `"q_exit"`.

        Returns:
            Scores (B, num_labels), read at the last token that is not padding; the loss; the cache.

        Raises:
            ValueError: several rows and no `config.pad_token_id`; a loop count or halting rule that does not fit.
            TypeError: a keyword is unknown.
        """
        of_the_body = {
            CACHE_NAME: one_cache(past_key_values, cache),
            "num_loops": num_loops,
            "num_grad_loops": num_grad_loops,
            "cut_chunks": cut_chunks,
            "halting": halting,
            "observe": observe,
            "generator": generator,
            "token_type_ids": token_type_ids,
        }
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,  # pyright: ignore[reportArgumentType]
            use_cache=use_cache,
            **of_the_body,
            **kwargs,
        )


# generate reads it for every token of a model that comes with code of its own, and it takes long to read.
LoopedForCausalLM.forward.__signature__ = inspect.signature(LoopedForCausalLM.forward)  # pyright: ignore

# Trainer and pipelines know a model's task by the names in these tables. Trainer takes a causal model's labels for the
# next token's only if the name of its class is here, or that of its body, which it reads under PEFT's prompt methods.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES |= {"looped": "LoopedForCausalLM", "looped_body": "LoopedModel"}

MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["looped"] = "LoopedForSequenceClassification"


__all__ = [
    "LoopedForCausalLM",
    "LoopedForSequenceClassification",
    "LoopedModel",
    "LoopedPreTrainedModel",
]
