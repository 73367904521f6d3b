"""What `forward` takes and returns, as its users read it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class LoopedModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` plus the loops run.

    Hidden states and attentions have one entry per layer call, in the order of the calls. The entry of a loop
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
