"""Record and edit what every layer call of a looped model puts out.

    recording = record(model, input_ids)                   one forward
    recording.states["core", 2, 0]                         (B, T, D)  core layer 0 in the third loop
    recording.readout(("core", 2, 0))                      (B, T, V)  what the model would say if it stopped there

    with edit(model, ("core", 2, 0), change, positions=[1]):
        model(input_ids)                                   change: (B, K, D) -> (B, K, D) replaces that output

A core layer is one module that runs once per loop, so a call is named (section, loop, layer), all counted from 0;
prelude and coda have loop 0. Works on every LoopedForCausalLM, also one loaded through the code saved beside its
weights. Legend: B rows, T tokens, K edited positions, D hidden size, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class LayerCall(NamedTuple):
    """One run of one layer; equal to the plain tuple of its fields."""

    section: str
    loop: int
    layer: int


def layer_calls(config: PreTrainedConfig, num_loops: int | None = None) -> list[LayerCall]:
    """The layer calls of a forward in the order they happen; `config.num_loops` loops unless given."""
    num_loops = config.num_loops if num_loops is None else num_loops
    prelude = [LayerCall("prelude", 0, layer) for layer in range(config.num_prelude_layers)]
    core = [LayerCall("core", loop, layer) for loop in range(num_loops) for layer in range(config.num_core_layers)]
    return prelude + core + [LayerCall("coda", 0, layer) for layer in range(config.num_coda_layers)]


@dataclass(frozen=True)
class Recording:
    """One forward: the output of every layer call, in call order, and the logits (B, T, V) at the end."""

    model: PreTrainedModel
    states: dict[LayerCall, torch.Tensor]
    logits: torch.Tensor

    @torch.no_grad()
    def readout(self, call: tuple[str, int, int]) -> torch.Tensor:
        """Logits (B, T, V) if every later layer were the identity (logit lens; nostalgebraist 2020)."""
        return stopped_readout(self.model, LayerCall(*call), self.states[call])


def stopped_readout(model: PreTrainedModel, call: LayerCall, state: torch.Tensor) -> torch.Tensor:
    """Readout of a state (B, K, D) that `call` put out: the norms that still lie ahead of it, then the head."""
    if call.section != "coda":
        state = model.model.core_norm(state)
    return model.readout(state)


@torch.no_grad()
def record(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    num_loops: int | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Recording:
    """Run `model` once, in evaluation mode, on `input_ids` (B, T), and keep the output of every layer call.

    Args:
        num_loops: one loop count for all rows, `config.num_loops` unless given.

    Raises:
        ValueError: num_loops is not an int >= 1.
    """
    if num_loops is not None and type(num_loops) is not int:
        raise ValueError(
            f"num_loops must be one int for all rows, got {num_loops!r}: record rows of different depth one by one."
        )
    states = {}
    model.eval()
    with watching(model, states.__setitem__):
        output = model(input_ids.to(model.device), attention_mask=attention_mask, num_loops=num_loops, use_cache=False)
    return Recording(model, states, output.logits)


@contextmanager
def edit(
    model: PreTrainedModel,
    call: tuple[str, int, int],
    change: Callable[[torch.Tensor], torch.Tensor],
    positions: Sequence[int] | None = None,
) -> Iterator[None]:
    """Within the block, every forward continues from `change(state)` in place of what `call` puts out.

    Edits nest, and `record` inside the block sees them.

    Args:
        change: (B, K, D) -> (B, K, D), given the state at `positions`.
        positions: the K edited positions, all T unless given; negative ones count from the end.

    Raises:
        ValueError: the model has no such call, `change` returns another shape, or no forward reached the call.
    """
    call = LayerCall(*call)
    check_call(model.config, call)
    where = slice(None) if positions is None else list(positions)
    reached = False

    def visit(current: LayerCall, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal reached
        if current != call:
            return None
        reached = True
        changed = change(output[:, where])
        if changed.shape != output[:, where].shape:
            raise ValueError(
                f"change must return the shape it is given, {tuple(output[:, where].shape)}, got "
                f"{tuple(changed.shape)}; rows that halted early are not in it."
            )
        output = output.clone()
        output[:, where] = changed
        return output

    with watching(model, visit):
        yield
    if not reached:
        raise ValueError(f"no forward reached {tuple(call)}: run the model inside the block, with enough loops.")


def check_call(config: PreTrainedConfig, call: LayerCall) -> None:
    """ValueError unless a forward with enough loops makes `call`."""
    if call not in layer_calls(config, max(call.loop, 0) + 1):
        raise ValueError(
            f"there is no layer call {tuple(call)}: the model has {config.num_prelude_layers} prelude, "
            f"{config.num_core_layers} core and {config.num_coda_layers} coda layers, counted from 0; only core loops."
        )


@contextmanager
def watching(
    model: PreTrainedModel, visit: Callable[[LayerCall, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Within the block, `visit(call, output)` sees every layer call and returns a new output, or None to keep it."""
    loops: Counter[nn.Module] = Counter()  # times each layer has run in the forward under way

    def hook_of(section: str, index: int) -> Callable:
        def hook(layer: nn.Module, arguments: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple | None:
            call = LayerCall(section, loops[layer], index)
            loops[layer] += 1
            if isinstance(output, torch.Tensor):
                return visit(call, output)
            hidden_states, latent = output  # of a layer with a KV gate
            changed = visit(call, hidden_states)
            return None if changed is None else (changed, latent)

        return hook

    base = model.model
    sections = {"prelude": base.prelude, "core": base.core, "coda": base.coda}
    handles = [base.register_forward_pre_hook(lambda module, arguments: loops.clear())]
    handles += [
        layer.register_forward_hook(hook_of(section, index))
        for section, layers in sections.items()
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
