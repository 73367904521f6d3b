"""What a model says at several loop counts, from one forward pass to the largest of them.

    at_loops(model, [1, 2, 8], read, input_ids=ids)      {1: read(logits), 2: read(logits), 8: read(logits)}

A loop does not depend on how many loops follow, so the state after loop t of R is that of a call with t loops (arXiv
2604.07822); coda, norm and head make its logits of it. Two kinds of calls are exceptions, and take a forward pass per
loop count. Where a KV policy rewrites its entries and the call is cut into chunks, a chunk attends to what the last
loop left of the chunks before it. And a damped loop takes smaller steps the more of them there are. Legend: B batch
rows, T tokens, K positions that are read, V vocabulary.
"""

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep

from modeling_looped.calls_looped import Observer

Reading = TypeVar("Reading")


def at_loops(
    model: PreTrainedModel,
    loops: Collection[int],
    read: Callable[[torch.Tensor], Reading],
    *,
    logits_to_keep: int = 0,
    observe: Observer | None = None,
    **inputs: torch.Tensor,
) -> dict[int, Reading]:
    """Loop count -> `read` of the logits (B, K, V) of a call with so many loops, in ascending order.

    The logits of the smaller counts are read while the pass runs, so that they need not all be kept.

    Args:
        loops: one loop count or more.
        logits_to_keep: as of the model's forward.
        observe: is shown the states of the call with most loops, see the model's forward.
        inputs: `input_ids` (B, T), and `attention_mask`, `position_ids` and `token_type_ids` if there are any.
    """
    wanted, most = set(loops), max(loops)
    call = {"use_cache": False, "logits_to_keep": logits_to_keep, **inputs}
    apart = takes_calls(model, inputs["input_ids"].shape[1])
    readings, done = {}, 0

    def visit(rows: torch.Tensor, state: torch.Tensor) -> None:
        nonlocal done
        done += 1
        if observe is not None:
            observe(rows, state)
        if done in wanted and done < most and not apart:
            masks = {name: inputs.get(name) for name in ("attention_mask", "position_ids", "token_type_ids")}
            hidden_states = slice_logits_to_keep(model.model.stopped(state, **masks), logits_to_keep)
            readings[done] = read(model.lm_head(hidden_states))

    # The call with most loops comes first: if the model may not run them, the error comes before any work.
    readings[most] = read(model(num_loops=most, observe=visit, **call).logits)
    if apart:
        readings |= {count: read(model(num_loops=count, **call).logits) for count in wanted - {most}}
    return dict(sorted(readings.items()))


def takes_calls(model: PreTrainedModel, num_tokens: int) -> bool:
    """Whether the state after a loop of a call with so many tokens depends on how many loops follow."""
    looped = model.model
    return looped.connection.counts_loops or (looped.sharing.rewrites and looped.is_cut(num_tokens))
