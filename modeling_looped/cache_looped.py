"""KV sharing: which loops of a token its cached keys and values keep.

    per_loop   one row per (token, loop); stock cache layers, one slot per (loop, layer). Cached == uncached.
    first      one row per token, that of loop 0, read by every loop (MELT's z = 1). Cached == uncached.
    last       one row per token, rewritten by every loop (MELT's z = 0): tokens of one chunk see each other at the
               current loop, later chunks see the last loop (Ouro, arXiv 2510.25741).
    mean       as last, but what later chunks see is the mean of the loops' rows (Ouro).
    gated      as last, but a loop's keys and values come from a latent that a gate mixes from the loops so far
               (MELT, arXiv 2605.07721; `gates_looped.py`).

A chunk is a call, or `prefill_chunk` tokens of it. The last three depend on where chunks end, by definition: token by
token they are one model, whole prompts at once another, and `prefill_chunk=1` is decoding.

A policy is used in every forward, whatever the cache:

    sharing.open(cache, num_loops)               sizes the slots for the loops asked for
    keys = sharing.key_source()                  keys.run_layer(layer, index, x, loop) runs a layer, and chooses what
                                                 keys and values are computed from
    sharing.close(cache, loops_run, num_tokens)  tokens that stopped early are filled in: all slots stay level

The fill policy is *last computed*: a slot of a loop that a token never ran holds the token's rows of the deepest loop
it did run; a shared row is that of the loops it ran. Legend: B rows, K heads, S cached tokens, T tokens of this call,
d head size.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import final

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What models, their outputs and generate call the KV cache: transformers 5.24 renamed it from `past_key_values`. Calls
# of transformers go by this name; forward takes both. Since then an attention layer writes an engine's cache itself,
# too; before, the attention function did.
CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = CACHE_NAMES[any(field.name == "cache" for field in fields(BaseModelOutputWithPast))]
LAYERS_WRITE_ENGINE_CACHES = CACHE_NAME == "cache"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache given under either of its names; ValueError for two."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of the KV cache: give one of them.")
    return cache if past_key_values is None else past_key_values


def recent_rows(layer: DynamicLayer | StaticLayer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `count` tokens of a cache layer: keys and values (B, K, count, d), without reading a length back."""
    if isinstance(layer, StaticLayer):
        rows = layer.cumulative_length - count + torch.arange(count, device=layer.keys.device)
        return layer.keys.index_select(2, rows), layer.values.index_select(2, rows)
    return layer.keys[:, :, -count:], layer.values[:, :, -count:]


def rewrite_recent(layer: DynamicLayer | StaticLayer, order: torch.Tensor) -> None:
    """Put the last T tokens of each row into another order, (B, T)."""
    rows = [rows.gather(2, order[:, None, :, None].expand_as(rows)) for rows in recent_rows(layer, order.shape[1])]
    if isinstance(layer, StaticLayer):
        where = layer.cumulative_length - order.shape[1] + torch.arange(order.shape[1], device=order.device)
        layer.keys.index_copy_(2, where, rows[0])
        layer.values.index_copy_(2, where, rows[1])
    else:
        layer.keys = torch.cat([layer.keys[:, :, : -order.shape[1]], rows[0]], dim=2)
        layer.values = torch.cat([layer.values[:, :, : -order.shape[1]], rows[1]], dim=2)


def readable(cache: Cache, slot: int) -> DynamicLayer | StaticLayer:
    """The cache layer at `slot`, if its rows can be read back.

    Raises:
        ValueError: it is quantized, sliding or of an unknown kind.
    """
    layer = cache.layers[slot]
    # Quantized and sliding layers are subclasses of these, and keep other tensors than their rows.
    plain = type(layer) in (DynamicLayer, StaticLayer) or isinstance(layer, RewritingLayer)
    if plain and isinstance(layer, (DynamicLayer, StaticLayer)):
        return layer
    raise ValueError(
        f"slot {slot} is a {type(layer).__name__}, whose rows cannot be read back: rows of different depth, early "
        "halting, shared KV and a num_loops that changes between calls need a DynamicCache or StaticCache."
    )


def blank_like(layer: DynamicLayer | StaticLayer) -> DynamicLayer | StaticLayer:
    """An empty stock layer of the same kind and length; a copy could not be made of rows that have a gradient."""
    return StaticLayer(max_cache_len=layer.max_cache_len) if isinstance(layer, StaticLayer) else DynamicLayer()


class PerLoopSharing:
    """Every (loop, layer) has a slot of its own; the cache needs no class of ours."""

    def __init__(self, config):
        self.slots = config.kv_slots()

    def open(self, cache: Cache, num_loops: int) -> None:
        """Size `cache` for `num_loops`: exactly while it is empty; grown and filled when it is not."""
        needed = self.slots.count(num_loops)
        if len(cache.layers) == needed:
            return
        if is_empty(cache):
            if cache.layer_class_to_replicate is None:
                del cache.layers[needed:]
                cache.layers.extend(copy.deepcopy(cache.layers[-1]) for _ in range(needed - len(cache.layers)))
        elif len(cache.layers) < needed:
            self._deepen(cache, needed)

    def _deepen(self, cache: Cache, needed: int) -> None:
        seen = int(cache.get_seq_length())
        for slot in range(len(cache.layers), needed):
            cache.layers.append(blank_like(readable(cache, slot - 1)))
            self._fill(cache, slot, seen)

    def _fill(self, cache: Cache, slot: int, num_tokens: int) -> None:
        keys, values = recent_rows(readable(cache, self.previous(slot)), num_tokens)
        cache.update(keys.clone(), values.clone(), slot)

    def key_source(self) -> "KeySource":
        return OWN_KEYS

    def previous(self, slot: int) -> int:
        """The slot that holds this layer's rows of the loop before."""
        return slot - self.slots.num_core_layers

    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """Fill the slots of loops that were not run with this call's rows of the last one that was."""
        for slot in range(self.slots.count(loops_run), len(cache.layers)):
            self._fill(cache, slot, num_tokens)


class LastSharing:
    """One slot per core layer; every loop rewrites the rows of this chunk's tokens."""

    def __init__(self, config):
        self.slots = config.kv_slots()
        self.name = config.kv_sharing

    def open(self, cache: Cache, num_loops: int) -> None:
        """Put rewriting layers into an empty cache, and open a step in them.

        Raises:
            ValueError: the cache already holds tokens that another policy wrote, or is quantized.
        """
        if cache.layer_class_to_replicate is not None:
            missing = self.slots.count(num_loops) - len(cache.layers)
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(missing))
        for slot in self._core_slots():
            if not isinstance(cache.layers[slot], RewritingLayer):
                cache.layers[slot] = self._rewriting(cache, slot)
            cache.layers[slot].open_step()

    def _core_slots(self) -> range:
        return range(self.slots.slot("core", 0), self.slots.count(1))

    def _rewriting(self, cache: Cache, slot: int) -> "RewritingLayer":
        layer = readable(cache, slot)
        # A graph in the making cannot look how many tokens a static cache holds.
        if not torch.compiler.is_compiling() and not is_empty(cache):
            raise ValueError(
                f"kv_sharing={self.name!r} rewrites its rows, but slot {slot} of this cache was filled by "
                "a layer that appends, as PEFT's prefix tuning and cartridges fill them. Start from an empty "
                "DynamicCache or StaticCache."
            )
        return self.layer_like(layer)

    def layer_like(self, layer: DynamicLayer | StaticLayer) -> "RewritingLayer":
        """An empty layer of this policy, of the kind and length of a stock one."""
        if isinstance(layer, StaticLayer):
            return RewritingStaticLayer.of(layer)
        return RewritingDynamicLayer()

    def key_source(self) -> "KeySource":
        return OWN_KEYS

    def previous(self, slot: int) -> int:
        """The slot that holds this layer's rows of the loop before: the same one."""
        return slot

    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """Nothing to fill: a token that stops early leaves the row of its last loop."""
        for slot in self._core_slots():
            cache.layers[slot].close_step()


class FirstSharing(LastSharing):
    """One slot per core layer; keys and values come from loop 0 in every loop, cached or not."""

    def key_source(self) -> "KeySource":
        return FirstLoopKeys()


class MeanSharing(LastSharing):
    """One slot per core layer; what stays of a token is the mean of the rows of the loops it ran."""

    def layer_like(self, layer: DynamicLayer | StaticLayer) -> "RewritingLayer":
        if isinstance(layer, StaticLayer):
            return AveragingStaticLayer.of(layer)
        return AveragingDynamicLayer()


class GatedSharing(LastSharing):
    """One slot per core layer; keys and values come from the latent of `gates_looped.py`."""

    def key_source(self) -> "KeySource":
        return GatedKeys()


SHARINGS = {
    "per_loop": PerLoopSharing,
    "last": LastSharing,
    "first": FirstSharing,
    "mean": MeanSharing,
    "gated": GatedSharing,
}


class KeySource(ABC):
    """What the keys and values of a layer are computed from."""

    @abstractmethod
    def run_layer(
        self, layer: nn.Module, index: int, hidden_states: torch.Tensor, loop: int, **kwargs
    ) -> torch.Tensor:
        """Run layer number `index` of a section on `hidden_states`: (b, T, D) -> (b, T, D)."""

    @abstractmethod
    def keep(self, rows: torch.Tensor) -> "KeySource":
        """The source of the (b',) batch rows `rows` of these."""

    @abstractmethod
    def join(self, later: Sequence) -> "KeySource":
        """The source of a block of tokens: those of this one first, those of `later` behind them."""


@final
class OwnKeys(KeySource):
    """Keys and values are computed from what the layer runs on."""

    def run_layer(self, layer, index, hidden_states, loop, **kwargs):
        return layer(hidden_states, **kwargs)

    def keep(self, rows):
        return self

    def join(self, later):
        return self


OWN_KEYS = OwnKeys()


@final
class FirstLoopKeys(KeySource):
    """Keys and values are computed from what the layer ran on in loop 0.

    Args:
        inputs: of each layer, (b, T, D); empty before loop 0.
    """

    def __init__(self, inputs: Sequence[torch.Tensor] = ()):
        self.inputs = list(inputs)

    def run_layer(self, layer, index, hidden_states, loop, **kwargs):
        if loop == 0:
            self.inputs.append(hidden_states)
        return layer(hidden_states, self.inputs[index], **kwargs)

    def keep(self, rows):
        return FirstLoopKeys([inputs[rows] for inputs in self.inputs])

    def join(self, later):
        blocks = zip(self.inputs, *(source.inputs for source in later), strict=True)
        return FirstLoopKeys([torch.cat(tokens, dim=1) for tokens in blocks])


@final
class GatedKeys(KeySource):
    """Keys and values are computed from a latent that the KV gate of the layer carries from loop to loop.

    Args:
        latents: of each layer that has run, its latent (b, T, D) of the loop before.
    """

    def __init__(self, latents: dict[int, torch.Tensor] | None = None):
        self.latents = latents or {}

    def run_layer(self, layer, index, hidden_states, loop, **kwargs):
        hidden_states, self.latents[index] = layer(hidden_states, self.latents.get(index), loop, **kwargs)
        return hidden_states

    def keep(self, rows):
        return GatedKeys({index: latent[rows] for index, latent in self.latents.items()})

    def join(self, later):
        blocks = {index: [self.latents[index], *(source.latents[index] for source in later)] for index in self.latents}
        return GatedKeys({index: torch.cat(tokens, dim=1) for index, tokens in blocks.items()})


class RewritingLayer(CacheLayerMixin):
    """A cache layer whose rows of one step are written once per loop: the first update appends, the others overwrite.

    A stock layer would append every loop, which is silently wrong under sdpa: six tokens would become 6 x loops rows.
    """

    step_is_open = True

    def open_step(self) -> None:
        """The next update belongs to new tokens."""
        self.step_is_open = True

    def close_step(self) -> None:
        """The tokens of this step have had their last loop."""


class RewritingDynamicLayer(RewritingLayer, DynamicLayer):
    # Keys and values before this step, once a gradient goes through its rows.
    before: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Append or overwrite T rows; returns all keys and values, (B, K, S, d)."""
        if self.step_is_open:
            self.step_is_open = False
            return super().update(key_states, value_states)
        past = self.keys.shape[-2] - key_states.shape[-2]
        if not torch.is_grad_enabled():
            self.keys[:, :, past:], self.values[:, :, past:] = key_states, value_states
        elif past == 0:
            self.keys, self.values = key_states, value_states
        else:  # what was returned before is part of the graph, and must stay as it is
            if self.before is None:  # the loops so far may have had no gradient
                self.before = (self.keys[:, :, :past], self.values[:, :, :past])
            self.keys = torch.cat([self.before[0], key_states], dim=-2)
            self.values = torch.cat([self.before[1], value_states], dim=-2)
        return self.keys, self.values

    def close_step(self) -> None:
        super().close_step()
        self.before = None


class RewritingStaticLayer(RewritingLayer, StaticLayer):
    @classmethod
    def of(cls, layer: StaticLayer) -> "RewritingStaticLayer":
        """One over the tensors of an empty stock layer, where it has some: an exported graph holds them as its own."""
        rewriting = cls(max_cache_len=layer.max_cache_len)
        vars(rewriting).update(vars(layer))
        return rewriting

    def update(self, key_states, value_states, *args, **kwargs):
        """Append or overwrite T rows in place; returns all keys and values, (B, K, max_cache_len, d)."""
        if not self.step_is_open:
            self.cumulative_length.sub_(key_states.shape[-2])
        self.step_is_open = False
        return super().update(key_states, value_states)


class AveragingLayer(RewritingLayer):
    """A rewriting layer that leaves the mean of what was written: each row's over the loops it ran.

    A subclass has `write`, the update of the rewriting layer it averages in.
    """

    sums: tuple[torch.Tensor, torch.Tensor]
    counts: torch.Tensor  # (B, 1, 1, 1)

    def update(self, key_states, value_states, *args, rows: torch.Tensor | None = None, **kwargs):
        """As in the rewriting layers; of these B rows only `rows` (b,) are written anew, the others had left."""
        if self.step_is_open:
            self.sums, self.counts = (key_states, value_states), key_states.new_ones(len(key_states), 1, 1, 1)
        else:
            if rows is None:
                rows = torch.arange(len(key_states), device=key_states.device)
            keys, values = self.sums
            self.sums = keys.index_add(0, rows, key_states[rows]), values.index_add(0, rows, value_states[rows])
            self.counts = self.counts.index_add(0, rows, self.counts.new_ones(len(rows), 1, 1, 1))
        return self.write(key_states, value_states)

    def close_step(self) -> None:
        keys, values = self.sums
        self.write(keys / self.counts, values / self.counts)
        del self.sums, self.counts
        super().close_step()


class AveragingDynamicLayer(AveragingLayer, RewritingDynamicLayer):
    write = RewritingDynamicLayer.update


class AveragingStaticLayer(AveragingLayer, RewritingStaticLayer):
    write = RewritingStaticLayer.update


class ActiveCache:
    """The cache as the rows that still loop see it; stands in for `past_key_values` inside attention.

    Rows that halted keep their keys and values of the loop before, which is the fill policy, step by step.

    Args:
        cache: the whole batch's cache.
        rows: (b,) indices of the rows still looping.
        sharing: the policy that says where the loop before left its rows.
    """

    def __init__(self, cache: Cache, rows: torch.Tensor, sharing: PerLoopSharing | LastSharing):
        self.cache, self.rows, self.sharing = cache, rows, sharing

    def update(self, key_states, value_states, slot: int, *args, **kwargs):
        """Write (b, K, T, d) rows and return the active rows' keys and values (b, K, S, d)."""
        before = readable(self.cache, self.sharing.previous(slot))
        keys, values = (rows.clone() for rows in recent_rows(before, key_states.shape[-2]))
        keys[self.rows], values[self.rows] = key_states, value_states
        keys, values = self.cache.update(keys, values, slot, rows=self.rows)
        return keys[self.rows], values[self.rows]


def is_empty(cache: Cache) -> bool:
    return int(cache.get_seq_length()) == 0
