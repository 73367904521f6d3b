"""Record and edit the output of every layer call of a looped model.

    recording = record(model, input_ids)                   one forward
    recording.states["core", 2, 0]                         (B, T, D)  core layer 0 in the third loop
    recording.readout(("core", 2, 0))                      (B, T, V)  logits if the model stopped there

    with edit(model, ("core", 2, 0), change, positions=[1]):
        model(input_ids)                                   change: (B, K, D) -> (B, K, D) replaces that output
    with edit_head(model, ("core", 2, 0), head, change):   the same for one attention head, (B, T, d)

A core layer is one module that runs once per loop, so a layer call is named (section, loop, layer), all counted from
0; prelude and coda have loop 0. The model may be any LoopedForCausalLM, also one loaded by the code saved beside its
weights. Legend: B batch rows, T tokens, K edited positions, D hidden size, H heads, d head size, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel


class LayerCall(NamedTuple):
    """One run of one layer; equal to the plain tuple of its fields."""

    section: str
    loop: int
    layer: int


def layer_calls(config: PreTrainedConfig, num_loops: int | None = None) -> list[LayerCall]:
    """The layer calls of a forward pass, in order. num_loops: `config.num_loops` unless given."""
    num_loops = config.num_loops if num_loops is None else num_loops
    prelude = [LayerCall("prelude", 0, layer) for layer in range(config.num_prelude_layers)]
    core = [LayerCall("core", loop, layer) for loop in range(num_loops) for layer in range(config.num_core_layers)]
    return prelude + core + [LayerCall("coda", 0, layer) for layer in range(config.num_coda_layers)]


@dataclass(frozen=True)
class Recording:
    """One forward pass: the output (B, T, D) of every layer call, in order, and the logits (B, T, V)."""

    model: PreTrainedModel
    states: dict[LayerCall, torch.Tensor]
    logits: torch.Tensor

    @torch.no_grad()
    def readout(self, call: tuple[str, int, int]) -> torch.Tensor:
        """Logits (B, T, V) as if every layer after `call` were the identity (logit lens; nostalgebraist 2020)."""
        return stopped_readout(self.model, LayerCall(*call), self.states[call])


def stopped_readout(model: PreTrainedModel, call: LayerCall, state: torch.Tensor) -> torch.Tensor:
    """Logits (B, K, V) of `state` (B, K, D), the output of `call`: the norms that come after it, then the head."""
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
        num_loops: one loop count for all batch rows, `config.num_loops` unless given.

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
    """Within the block, `change` replaces the output of `call` in every forward pass.

    Edits nest, and `record` inside the block sees them.

    Args:
        change: (B, K, D) -> (B, K, D), from the output at `positions` to the output that replaces it.
        positions: the K edited positions, all T unless given; negative ones count from the end.

    Raises:
        ValueError: the model has no such call, `change` returns another shape, or no forward pass reached the call.
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
                f"{tuple(changed.shape)}; batch rows that halted early are not in it."
            )
        output = output.clone()
        output[:, where] = changed
        return output

    with watching(model, visit):
        yield
    check_reached(reached, call)


def check_call(config: PreTrainedConfig, call: LayerCall) -> None:
    """Raise ValueError unless a forward pass with enough loops makes `call`."""
    if call not in layer_calls(config, max(call.loop, 0) + 1):
        raise ValueError(
            f"there is no layer call {tuple(call)}: the model has {config.num_prelude_layers} prelude, "
            f"{config.num_core_layers} core and {config.num_coda_layers} coda layers, counted from 0; only core loops."
        )


@contextmanager
def edit_head(
    model: PreTrainedModel,
    call: tuple[str, int, int],
    head: int,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Within the block, `change` replaces the output of one attention head in `call`, in every forward pass.

    The output of a head is its slice of the input of the output projection. The head runs in other loops as before.

    Args:
        head: counted from 0.
        change: (B, T, d) -> (B, T, d), or to a shape that broadcasts to it.

    Raises:
        ValueError: the model has no such call or head, or no forward pass reached the call.
    """
    call = LayerCall(*call)
    check_call(model.config, call)
    if not 0 <= head < model.config.num_attention_heads:
        raise ValueError(f"there is no head {head}: the model has {model.config.num_attention_heads}, counted from 0.")
    reached = False

    def visit(current: LayerCall, outputs: torch.Tensor) -> torch.Tensor | None:
        nonlocal reached
        if current != call:
            return None
        reached = True
        outputs = outputs.clone()
        outputs[:, :, head] = change(outputs[:, :, head])
        return outputs

    with watching_heads(model, visit):
        yield
    check_reached(reached, call)


def check_reached(reached: bool, call: LayerCall) -> None:
    """Raise ValueError unless `reached`: an edit that changed nothing is a mistake."""
    if not reached:
        raise ValueError(f"no forward reached {tuple(call)}: run the model inside the block, with enough loops.")


@contextmanager
def watching(
    model: PreTrainedModel, visit: Callable[[LayerCall, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Within the block, `visit(call, output)` gets the output (B, T, D) of every layer call.

    It returns the output that replaces it, or None to keep it.
    """

    def attach(layer: nn.Module, next_call: Callable[[], LayerCall]) -> RemovableHandle:
        def hook(layer: nn.Module, arguments: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple | None:
            call = next_call()
            if isinstance(output, torch.Tensor):
                return visit(call, output)
            hidden_states, latent = output  # a layer with a KV gate returns both
            changed = visit(call, hidden_states)
            return None if changed is None else (changed, latent)

        return layer.register_forward_hook(hook)

    with hooked(model, attach):
        yield


@contextmanager
def watching_heads(
    model: PreTrainedModel, visit: Callable[[LayerCall, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """As `watching`, but `visit` gets the outputs (B, T, H, d) of the heads, before the output projection."""

    def attach(layer: nn.Module, next_call: Callable[[], LayerCall]) -> RemovableHandle:
        def hook(projection: nn.Module, arguments: tuple) -> tuple | None:
            changed = visit(next_call(), arguments[0].unflatten(-1, (-1, layer.self_attn.head_dim)))
            return None if changed is None else (changed.flatten(-2),)

        return layer.self_attn.o_proj.register_forward_pre_hook(hook)

    with hooked(model, attach):
        yield


@contextmanager
def hooked(
    model: PreTrainedModel, attach: Callable[[nn.Module, Callable[[], LayerCall]], RemovableHandle]
) -> Iterator[None]:
    """Within the block, every layer has the hook that `attach(layer, next_call)` puts on it.

    The hook calls `next_call()` exactly once each time its layer runs, and gets the name of that layer call.
    """
    loops: Counter[nn.Module] = Counter()  # times that each layer has run in the present forward pass

    def counter(section: str, index: int, layer: nn.Module) -> Callable[[], LayerCall]:
        def next_call() -> LayerCall:
            loops[layer] += 1
            return LayerCall(section, loops[layer] - 1, index)

        return next_call

    base = model.model
    sections = {"prelude": base.prelude, "core": base.core, "coda": base.coda}
    handles = [base.register_forward_pre_hook(lambda module, arguments: loops.clear())]
    handles += [
        attach(layer, counter(section, index, layer))
        for section, layers in sections.items()
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
