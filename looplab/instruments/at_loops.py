"""What a model says at several loop counts, from one forward pass to the largest of them.

    at_loops(model, [1, 2, 8], read, input_ids=ids)      {1: read(logits), 2: read(logits), 8: read(logits)}
    hidden_at_loops(model, [1, 2], read, input_ids=ids)  the same of what the head reads

A loop does not depend on how many loops follow, so the state after loop t of R is that of a call with t loops (arXiv
2604.07822); coda, norm and head make its logits of it. Two kinds of calls are exceptions, and take a forward pass per
loop count. Where a KV policy rewrites its entries and the call is cut into chunks, a chunk attends to what the last
loop left of the chunks before it. And a damped loop takes smaller steps the more of them there are. Legend: B batch
rows, T tokens, K positions that are read, D hidden size, V vocabulary.
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

    def whole(num_loops: int, observe: Observer | None) -> Reading:
        call = {"num_loops": num_loops, "observe": observe, "logits_to_keep": logits_to_keep, "use_cache": False}
        return read(model(**call, **inputs).logits)

    def stopped(hidden_states: torch.Tensor) -> Reading:
        return read(model.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep)))

    return one_pass(model, loops, whole, stopped, observe, inputs)


def hidden_at_loops(
    model: PreTrainedModel,
    loops: Collection[int],
    read: Callable[[torch.Tensor], Reading],
    **inputs: torch.Tensor,
) -> dict[int, Reading]:
    """Loop count -> `read` of what the head reads (B, T, D) in a call with so many loops; see `at_loops`."""

    def whole(num_loops: int, observe: Observer | None) -> Reading:
        return read(model.model(num_loops=num_loops, observe=observe, use_cache=False, **inputs).last_hidden_state)

    return one_pass(model, loops, whole, read, None, inputs)


def one_pass(
    model: PreTrainedModel,
    loops: Collection[int],
    whole: Callable[[int, Observer | None], Reading],
    stopped: Callable[[torch.Tensor], Reading],
    observe: Observer | None,
    inputs: dict[str, torch.Tensor],
) -> dict[int, Reading]:
    """Loop count -> reading.

    Args:
        whole: the reading of a call with so many loops, which shows its states to an observer.
        stopped: the reading of what the head would read after a loop, (B, T, D).
    """
    wanted, most = set(loops), max(loops)
    apart = takes_calls(model, inputs["input_ids"].shape[1])
    readings, done = {}, 0

    def visit(rows: torch.Tensor, state: torch.Tensor) -> None:
        nonlocal done
        done += 1
        if observe is not None:
            observe(rows, state)
        if done in wanted and done < most and not apart:
            masks = {name: inputs.get(name) for name in ("attention_mask", "position_ids", "token_type_ids")}
            readings[done] = stopped(model.model.stopped(state, **masks))

    # The call with most loops comes first: if the model may not run them, the error comes before any work.
    readings[most] = whole(most, visit)
    if apart:
        readings |= {count: whole(count, None) for count in wanted - {most}}
    return dict(sorted(readings.items()))


def takes_calls(model: PreTrainedModel, num_tokens: int) -> bool:
    """Whether the state after a loop of a call with so many tokens depends on how many loops follow."""
    looped = model.model
    return looped.connection.counts_loops or (looped.sharing.rewrites and looped.is_cut(num_tokens))
