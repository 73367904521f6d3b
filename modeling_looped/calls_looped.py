"""One call of a looped model, and the batch rows of it that still loop.

    context = everything that a layer call needs beside hidden states
    active  = ActiveBatch(call, state, embeds, context, sharing)
    for loop in range(call.most_loops):
        active.reach(loop)                     # the cache has slots for it
        active.state = ... one loop ...
        active.leave(loop, close)              # the batch rows that halt leave, with all that is theirs
    state, loops_used = active.gather()        # every batch row again, in the order of the call

A long call is run chunk by chunk (`chunks_looped.py`); every chunk is a call.

Legend: B batch rows of the call, b batch rows that still loop, T tokens, K of them a halting rule reads, S cached and
new tokens, D hidden size, d head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import final

import torch
from transformers.cache_utils import Cache

from .cache_layers_looped import gets_slots_late
from .cache_looped import ActiveAttention, ActiveCache, KeySource, Sharing, chosen, places_of
from .checks_looped import check_positions, is_row_mask
from .halting_looped import Readout, Rule, halting_rule
from .layers_looped import SlotAttention
from .versions_looped import slice_logits_to_keep

Observer = Callable[[torch.Tensor, torch.Tensor], None]


@final
@dataclass(frozen=True)
class Decision:
    """A halting rule and what the rule reads of a state.

    Args:
        rule: the rule.
        head: norm and head, (b, K, D) -> logits (b, K, V); None in a model without a head.
        gate: norm and exit gate, (b, K, D) -> logits (b, K); None in a model without an exit gate.
        positions: `logits_to_keep` of the call: the last K positions (0: all), or a 1-D tensor of K positions.

    Raises:
        ValueError: the rule reads an exit gate that the model does not have, or positions differ between batch rows.
    """

    rule: Rule
    head: Readout | None = None
    gate: Readout | None = None
    positions: int | torch.Tensor = 0

    def __post_init__(self):
        if self.rule.reads_exit_gate and self.gate is None:
            raise ValueError(
                f"the halting rule {type(self.rule).__name__} reads an exit gate, which this model does not have: "
                "train one with exit_gate=True in the configuration, or use another rule."
            )
        check_positions(self.positions)

    @classmethod
    def of(cls, halting, **readouts) -> "Decision | None":
        """What `halting` of a call names, with its readouts; None where no batch row can halt early."""
        rule = halting_rule(halting)
        return None if rule is None else cls(rule, **readouts)

    def step(self, memory, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rule says of states (b, K, D), see `Rule.step`."""
        return self.rule.step(memory, state, self.gate if self.rule.reads_exit_gate else self.head)


@final
@dataclass(frozen=True)
class Call:
    """What one forward was asked, checked and completed; or one chunk of it.

    Args:
        embeds: (B, T, D) token embeddings.
        attention_mask: (B, S) of cached and new tokens, a prepared mask, or None.
        position_ids: (B or 1, T).
        past_key_values: the cache, or None.
        num_loops: an int for all batch rows, or a (B,) LongTensor with a loop count for each.
        first_grad_loop: the first loop that is differentiated.
        halting: the halting rule and what it reads, or None.
        observe: is shown the states after every loop, see `forward`; or None.
        generator: seed of the initial state.
        read_at: (B, T) bool, the tokens that the rule reads; None for all that are real.
        token_type_ids: (B, T), see `masks_looped.py`; or None.
        num_positions: no position is as large, where that is known without asking the device; or None.
        counted: the positions were counted here, so that no sequences are packed into a batch row.
        budgets: `num_loops` of the batch rows on the host, read from the device once; None for an int.
    """

    embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    past_key_values: Cache | None
    num_loops: int | torch.Tensor
    first_grad_loop: int = 0
    halting: Decision | None = None
    observe: Observer | None = None
    generator: torch.Generator | None = None
    read_at: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    num_positions: int | None = None
    counted: bool = False
    budgets: Sequence[int] | None = None

    @property
    def most_loops(self) -> int:
        """Loops of the batch row that may loop the longest."""
        return self.num_loops if isinstance(self.num_loops, int) else max(self.budgets or [0])

    @property
    def sure_loops(self) -> int:
        """Loops that the cache is opened for: all of the call, or one where it may be deepened as loops run."""
        cache = self.past_key_values
        return 1 if self.halting is not None and cache is not None and gets_slots_late(cache) else self.most_loops

    @property
    def rows_may_halt(self) -> bool:
        """Whether a batch row may halt before another."""
        return self.halting is not None or len(set(self.budgets or [])) > 1

    @property
    def real_tokens(self) -> torch.Tensor:
        """(B, T) bool: the tokens of this call that are not padding."""
        if isinstance(self.attention_mask, torch.Tensor) and self.attention_mask.ndim == 2:
            return self.attention_mask[:, -self.embeds.shape[1] :].bool()
        return torch.ones(self.embeds.shape[:2], dtype=torch.bool, device=self.embeds.device)


@final
@dataclass(frozen=True)
class CallContext:
    """What a layer call needs beside hidden states; all of it belongs to the batch rows that still loop.

    Args:
        attention_mask: (B or 1, 1, T, S), a mask of another attention backend, or None.
        position_embeddings: cosines and sines of the rotary angles, (B or 1, T, d) each; None without rotary
            embeddings.
        position_ids: (B or 1, T).
        past_key_values: the cache as these batch rows see it, or None.
        key_source: what keys and values are computed from.
        num_loops: an int for all of these batch rows, or a (b,) LongTensor with a loop count for each.
    """

    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    position_ids: torch.Tensor
    past_key_values: Cache | ActiveCache | None
    key_source: KeySource
    num_loops: int | torch.Tensor

    def check_rows_can_leave(self) -> None:
        """ValueError where they cannot."""
        if self.attention_mask is not None and not isinstance(self.attention_mask, torch.Tensor):
            raise ValueError(
                "rows cannot leave the batch under flex attention, whose block mask is fixed: use attn_implementation="
                "'sdpa' or 'eager' with a num_loops per row or a halting rule."
            )

    def attention(self, attention: SlotAttention) -> "SlotAttention | ActiveAttention":
        """The attention of a slot, for these batch rows."""
        return ActiveAttention(attention) if isinstance(self.past_key_values, ActiveCache) else attention

    def with_keys(self, key_source: KeySource) -> "CallContext":
        """The same with another source of keys."""
        return replace(self, key_source=key_source)

    def keep(self, rows: torch.Tensor | slice, past_key_values: Cache | ActiveCache | None) -> "CallContext":
        """The context of the batch rows `rows` of this one, (b,) or a slice, which see the cache as
        `past_key_values`."""

        def select(tensor):
            return tensor if tensor is None or len(tensor) == 1 else chosen(tensor, rows)

        angles = self.position_embeddings
        return CallContext(
            attention_mask=select(self.attention_mask),
            position_embeddings=None if angles is None else (select(angles[0]), select(angles[1])),
            position_ids=select(self.position_ids),
            past_key_values=past_key_values,
            key_source=self.key_source.keep(rows),
            num_loops=self.num_loops if isinstance(self.num_loops, int) else chosen(self.num_loops, rows),
        )


@final
class ActiveBatch:
    """The batch rows of a call that still loop, with all that is theirs: what one of them leaves with, all leave with.

    Args:
        call: the call, of B batch rows.
        state: (B, T, D) or (B, T, streams, D), the initial state.
        embeds: (B, T, D), the output of the prelude.
        context: of all batch rows, with the whole cache.
        sharing: the KV policy.

    Attributes:
        rows: (b,) LongTensor, which batch rows of the call these are; `numbers` are the same on the host.
        state, embeds, context: of these batch rows.
        loops_run: loops that ran until the last batch row halted.
    """

    def __init__(
        self,
        call: Call,
        state: torch.Tensor,
        embeds: torch.Tensor,
        context: CallContext,
        sharing: Sharing,
    ):
        self.call, self.sharing, self.cache = call, sharing, call.past_key_values
        self.state, self.embeds = state, embeds
        self.context = context.with_keys(sharing.key_source())
        self.rows = torch.arange(embeds.shape[0], device=embeds.device)  # len() would fix it in an exported graph
        self.loops_run = self.most_loops = call.most_loops
        self.may_halt = call.rows_may_halt
        self.memory = None  # of the halting rule
        self.halted: list[tuple[list[int], torch.Tensor, int]] = []  # who left, their state, their loops
        if self.may_halt:
            self.numbers = list(range(len(embeds)))
        self.unread = None  # (b, K) bool, which of the positions that the rule reads are padding; None where none is
        if call.halting is not None and (call.read_at is not None or is_row_mask(call.attention_mask)):
            read_at = call.real_tokens if call.read_at is None else call.read_at
            self.unread = ~self._read(read_at.unsqueeze(-1)).squeeze(-1)

    def gradients(self, loop: int, recomputed: bool) -> AbstractContextManager:
        """Within the block a loop is differentiated, unless it comes before `first_grad_loop`.

        Args:
            loop: counted from 0.
            recomputed: layers are run again in the backward pass (gradient checkpointing).
        """
        if loop < self.call.first_grad_loop:
            return torch.no_grad()
        if loop == self.call.first_grad_loop and recomputed:
            self.state = in_graph(self.state)
        return nullcontext()

    def reach(self, loop: int) -> None:
        """Before `loop`, counted from 0: have slots for it and for the next, in a cache that was not opened for all.

        The next loop's are filled with what this loop's hold, which a sliding window may drop as the loop runs.
        """
        if self.may_halt and self.cache is not None and loop + 1 < self.most_loops:
            self.sharing.deepen(self.cache, loop, loop + 2)

    def leave(self, loop: int, close: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Show the states to the observer, and let the batch rows leave that halt after `loop`.

        Args:
            loop: counted from 0.
            close: a state (b, T, ...) -> what is read of it, (b, T, D).

        Returns:
            Whether a batch row goes on.
        """
        if self.call.observe is not None:
            self.call.observe(self.rows, close(self.state))
        if not self.may_halt or loop + 1 == self.most_loops:
            return True
        done = self._done(loop, close)
        if not any(done):
            return True
        leaving, staying = ([place for place, left in enumerate(done) if left == wanted] for wanted in (True, False))
        self._record(leaving, loop + 1)
        if staying:
            self._keep(staying)
        else:
            self.loops_run = loop + 1
        return bool(staying)

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of all batch rows in the order of the call, and the loops run for each token, (B, T)."""
        batch_size, num_tokens = self.call.embeds.shape[:2]
        device = self.rows.device
        if not self.halted:
            loops = torch.full((batch_size, num_tokens), self.most_loops, dtype=torch.long, device=device)
            return self.state, loops
        if sum(len(numbers) for numbers, _, _ in self.halted) < batch_size:
            self.halted.append((self.numbers, self.state, self.most_loops))
        numbers = [number for halted, _, _ in self.halted for number in halted]
        loops = [loops for halted, _, loops in self.halted for _ in halted]
        order = torch.tensor(sorted(range(batch_size), key=numbers.__getitem__), device=device)
        states = torch.cat([state for _, state, _ in self.halted]).index_select(0, order)
        loops = torch.tensor(loops, device=device).index_select(0, order)
        return states, loops.unsqueeze(1).expand(batch_size, num_tokens)

    def _done(self, loop: int, close: Callable[[torch.Tensor], torch.Tensor]) -> list[bool]:
        """Which of these batch rows halt after `loop`, because of their loop count or of the rule."""
        budgets, halting = self.call.budgets, self.call.halting
        done = [budgets is not None and budgets[number] <= loop + 1 for number in self.numbers]
        if halting is None:
            return done
        self.memory, halted = halting.step(self.memory, self._read(close(self.state)))  # (b, K)
        if self.unread is not None:
            halted = (halted | self.unread).all(dim=1) & ~self.unread.all(dim=1)
        else:
            halted = halted.all(dim=1)
        return [known or found for known, found in zip(done, halted.tolist(), strict=True)]

    def _read(self, values: torch.Tensor) -> torch.Tensor:
        """(b, T, D) -> (b, K, D) at the positions that the rule reads."""
        assert self.call.halting is not None
        return slice_logits_to_keep(values, self.call.halting.positions)

    def _record(self, places: list[int], loops: int) -> None:
        """Note the state of those at these places among the batch rows, which ran `loops` loops."""
        where = places_of(places, self.rows.device)
        self.halted.append(([self.numbers[place] for place in places], chosen(self.state, where), loops))

    def _keep(self, places: list[int]) -> None:
        """Go on with those at these places among the batch rows."""
        where = places_of(places, self.rows.device)
        self.numbers = [self.numbers[place] for place in places]
        self.rows, self.state, self.embeds = (chosen(each, where) for each in (self.rows, self.state, self.embeds))
        self.memory = None if self.memory is None else chosen(self.memory, where)
        self.unread = None if self.unread is None else chosen(self.unread, where)
        seen = None if self.cache is None else ActiveCache(self.cache, self.numbers, self.rows, self.sharing)
        self.context = self.context.keep(where, seen)


@final
class LoopStates:
    """An observer (`observe` of `forward`) that keeps the states after every loop.

    Args:
        logits_to_keep: as in `forward`: the positions to keep, K of the T tokens.
        also: an observer to show them to as well.

    Attributes:
        visits: of every loop, the (b,) batch rows that ran it and their states (b, K, D).
    """

    def __init__(self, logits_to_keep: int | torch.Tensor = 0, also: Observer | None = None):
        check_positions(logits_to_keep)
        self.logits_to_keep, self.also = logits_to_keep, also
        self.visits: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, rows: torch.Tensor, state: torch.Tensor) -> None:
        self.visits.append((rows, slice_logits_to_keep(state, self.logits_to_keep)))
        if self.also is not None:
            self.also(rows, state)

    def loops_run(self) -> torch.Tensor:
        """(B,) loops that each batch row ran; all of them run the first."""
        first, *_ = rows = [rows for rows, _ in self.visits]
        if all(len(each) == len(first) for each in rows):  # an accelerator waits in bincount
            return torch.full_like(first, len(rows))
        return torch.bincount(torch.cat(rows), minlength=len(first))

    def spread(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One (b, K) tensor per loop -> (B, K, R), 0 where a batch row had halted."""
        blank = torch.zeros_like(values[0])
        rows = [rows for rows, _ in self.visits]
        return torch.stack([blank.index_copy(0, r, v) for r, v in zip(rows, values, strict=True)], dim=-1)


def in_graph(state: torch.Tensor) -> torch.Tensor:
    """The state, with a gradient: where no input has one, `use_reentrant=True` gives the weights none either."""
    return state.detach().requires_grad_() if torch.is_grad_enabled() and not state.requires_grad else state


def make_position_ids(inputs_embeds, attention_mask, past_key_values) -> torch.Tensor:
    """(B or 1, T): counted over real tokens where a (B, S) mask says which they are, else over all."""
    num_tokens = inputs_embeds.shape[1]
    if is_row_mask(attention_mask):
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -num_tokens:]
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(num_tokens, device=inputs_embeds.device) + past).unsqueeze(0)


def positions_below(embeds: torch.Tensor, past_key_values: Cache | None) -> int | None:
    """A number that positions counted over the tokens of a cache and these (B, T, D) do not reach; None if unknown."""
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    # A static cache counts on the device.
    return past + embeds.shape[1] if isinstance(past, int) else longest_text(past_key_values)


def longest_text(past_key_values: Cache | None) -> int | None:
    """Tokens that a static cache has room for; None for other caches, and for one with a sliding window."""
    if past_key_values is None or not past_key_values.is_compileable or any(past_key_values.is_sliding):
        return None
    return past_key_values.get_max_length()
