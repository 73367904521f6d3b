"""What `forward` takes and returns, as its users read it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

FORWARD_DOCSTRING = r"""
        num_loops (`int` or `torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Loops of the core, >= 1; `config.num_loops` by default. With a tensor every batch row gets a loop count of
            its own, as if it were run alone, and leaves the batch after its last loop.
        num_grad_loops (`int`, *optional*):
            Only the last `num_grad_loops` loops are differentiated (truncated back-propagation). Head and exit gate
            learn from all loops they read.
        cut_chunks (`bool`, *optional*):
            With `config.prefill_chunk`: no gradient goes from a chunk of tokens to the cached entries of earlier ones.
        halting (`str` or `dict`, *optional*):
            Rule by which a batch row halts before `num_loops`: the name of one of `RULES` in `halting_looped.py`, such
            as `"kl_entropy"`; a dict with the rule's thresholds, `{"rule": "kl_entropy", "kl_threshold": 0.01,
            "max_entropy": 3.0}`; or a rule object. `"q_exit"` needs `exit_gate=True` in the configuration. The rule
            reads the positions of `logits_to_keep`, padding excluded. A batch row halts when all of them agree.
        observe (`Callable`, *optional*):
            Called after every loop as `observe(rows, state)`: with a `(b,)` LongTensor of the batch rows that ran it,
            and what coda and readout see of their state, `(b, sequence_length, hidden_size)`, before the final norm.
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

    `hidden_states` and `attentions` have one entry per layer call, in the order of the calls. The entry of a loop
    covers only the batch rows that still looped in it. In a chunked call (`prefill_chunk`) the entries of all chunks
    follow each other, and left padding is moved to the right.

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
