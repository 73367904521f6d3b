"""One call of a looped model, and the rows of it that still loop.

Legend: B rows, b of them that still loop, T tokens, K positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep

from .cache_looped import ActiveCache
from .checks_looped import is_row_mask
from .halting_looped import FixedRule, Readout


@dataclass(frozen=True)
class Decision:
    """A halting rule with what it looks at.

    Args:
        rule: the rule, or None where only a budget can end a row.
        readout: norm + head on a state, (b, K, D) -> (b, K, V), or None in a model without a head.
        logits_to_keep: as in `forward`: the last K positions (0: all), or a 1-D tensor of positions.
        exit_readout: norm + exit gate on a state, (b, K, D) -> (b, K), or None in a model without a gate.
        visit: called with the rows that still looped, (b,), and their states at these positions, (b, K, D), after
            every loop.

    Raises:
        ValueError: the rule reads an exit gate that the model does not have, or positions differ between rows.
    """

    rule: FixedRule | None
    readout: Readout | None = None
    logits_to_keep: int | torch.Tensor = 0
    exit_readout: Readout | None = None
    visit: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def __post_init__(self):
        if self.rule and self.rule.reads_exit_gate and self.exit_readout is None:
            raise ValueError(
                f"the halting rule {type(self.rule).__name__} reads an exit gate, which this model does not have: "
                "train one with exit_gate=True in the configuration, or use another rule."
            )
        keep = self.logits_to_keep
        if (self.rule or self.visit) and isinstance(keep, torch.Tensor) and keep.ndim != 1:
            raise ValueError(
                "halting and the loss of an exit gate need positions that all rows share: logits_to_keep must be an "
                f"int or a 1-D tensor, got a {keep.ndim}-D tensor."
            )

    def step(self, memory, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the rule says of states (b, K, D), see `FixedRule.step`."""
        assert self.rule is not None
        return self.rule.step(memory, state, self.exit_readout if self.rule.reads_exit_gate else self.readout)


@dataclass(frozen=True)
class Call:
    """What one forward was asked, checked and completed; or one chunk of it.

    Args:
        embeds: (B, T, D).
        attention_mask: (B, S) of cached and new tokens, a prepared mask, or None.
        position_ids: (B or 1, T).
        past_key_values: the cache, or None.
        num_loops: an int, or (B,) per row.
        first_grad_loop: the first loop that is differentiated.
        decision: the halting rule and what it looks at.
        generator: seed of the initial state.
        deciding: (B, T) bool, the tokens that the rule is read at; None for all that are real.
    """

    embeds: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    past_key_values: Cache | None
    num_loops: int | torch.Tensor
    first_grad_loop: int
    decision: Decision
    generator: torch.Generator | None
    deciding: torch.Tensor | None = None


@dataclass
class CallContext:
    """What every layer call of one forward shares; all of it follows the rows that still loop."""

    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    position_ids: torch.Tensor
    past_key_values: Cache | ActiveCache | None

    def check_rows_can_leave(self) -> None:
        """ValueError where they cannot."""
        if self.attention_mask is not None and not isinstance(self.attention_mask, torch.Tensor):
            raise ValueError(
                "rows cannot leave the batch under flex attention, whose block mask is fixed: use attn_implementation="
                "'sdpa' or 'eager' with a num_loops per row or a halting rule."
            )

    def keep(self, rows: torch.Tensor) -> "CallContext":
        """The context of the (b,) `rows` of this one."""

        def select(tensor):
            return tensor if tensor is None or len(tensor) == 1 else tensor[rows]

        return replace(
            self,
            attention_mask=select(self.attention_mask),
            position_embeddings=self.position_embeddings and tuple(map(select, self.position_embeddings)),
            position_ids=select(self.position_ids),
        )


class ActiveRows:
    """Which rows of a batch still loop: a budget per row, a halting rule, and what the rows that left had reached.

    Args:
        num_loops: an int for all rows, or a (B,) LongTensor with a budget per row.
        decision: the halting rule and what it looks at.
    """

    def __init__(self, num_loops: int | torch.Tensor, decision: Decision):
        self.budget = num_loops if isinstance(num_loops, torch.Tensor) else None
        self.num_loops = int(num_loops.max()) if isinstance(num_loops, torch.Tensor) else num_loops
        self.loops_run = self.num_loops
        self.decision = decision
        self.may_leave = decision.rule is not None or (
            self.budget is not None and int(self.budget.min()) < self.num_loops
        )
        self.tracks_rows = self.may_leave or decision.visit is not None
        self.memory = None
        self.left = []  # (rows, state, loops) of those that halted

    def open(self, real: torch.Tensor) -> None:
        """Start with all rows; `real` is (B, T) bool, false at padding. Needed only where rows are tracked."""
        self.real = self._deciding(real.unsqueeze(-1)).squeeze(-1)  # (B, K)
        self.rows = torch.arange(len(real), device=real.device)

    def _deciding(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return slice_logits_to_keep(hidden_states, self.decision.logits_to_keep)

    def leave(self, loop: int, state: torch.Tensor, close: Callable) -> torch.Tensor | None:
        """Take the rows that halt after `loop` out of the batch.

        Args:
            state: (b, ...) of the current rows, kept for those that leave.
            close: (b, ...) -> (b, T, D), what the rule reads of a state.

        Returns:
            The (b',) indices, within the current rows, of those that go on; None when all of them do.
        """
        if self.decision.visit is not None:
            self.decision.visit(self.rows, self._deciding(close(state)))
        if not self.may_leave or loop + 1 == self.num_loops:
            return None
        done = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)
        if self.budget is not None:
            done |= self.budget[self.rows] <= loop + 1
        if self.decision.rule is not None:
            self.memory, halted = self.decision.step(self.memory, self._deciding(close(state)))
            real = self.real[self.rows]
            done |= (halted | ~real).all(dim=1) & real.any(dim=1)
        if not done.any():
            return None
        self._record(done.nonzero().squeeze(1), state, loop + 1)
        keep = (~done).nonzero().squeeze(1)
        self.rows = self.rows[keep]
        self.memory = None if self.memory is None else self.memory[keep]
        if len(keep) == 0:
            self.loops_run = loop + 1
        return keep

    def _record(self, rows: torch.Tensor, state: torch.Tensor, loops: int) -> None:
        self.left.append((self.rows[rows], state[rows], torch.full_like(rows, loops)))

    def gather(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | int]:
        """All rows' states in batch order, and the loops each ran: (B,), or one int for all."""
        if not self.left:
            return state, self.num_loops
        self._record(torch.arange(len(self.rows), device=self.rows.device), state, self.num_loops)
        rows, states, loops = (torch.cat(parts) for parts in zip(*self.left, strict=True))
        order = rows.argsort()
        return states[order], loops[order]


def make_position_ids(inputs_embeds, attention_mask, past_key_values) -> torch.Tensor:
    """(B or 1, T): counted over real tokens where a (B, S) mask says which they are, else over all."""
    num_tokens = inputs_embeds.shape[1]
    if is_row_mask(attention_mask):
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -num_tokens:]
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(num_tokens, device=inputs_embeds.device) + past).unsqueeze(0)


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
