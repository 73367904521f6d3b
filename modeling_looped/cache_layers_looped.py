"""Layers of a KV cache: how entries are read back, and how one entry of a token is rewritten by every loop.

An entry is what one token leaves in one slot: a key and a value. Stock layers only append entries. A rewriting layer
appends the entries of a step (a call, or a chunk of it) in the first loop and overwrites them in the loops after it:

    layer.open_step()
    layer.update(keys, values)      # loop 0 appends T entries
    layer.update(keys, values)      # loop 1 overwrites the same T entries, and so on
    layer.close_step()              # what stays: the last loop's entries, or their mean over loops

With a sliding window W stock layers drop what no later token can see: growing ones keep the entries of the last W - 1
tokens, static ones of the last W. What was dropped is never needed again, so that it is neither read back nor copied.

Legend: B batch rows, K key-value heads, S cached tokens, T tokens of a step, d head size.
"""

from dataclasses import fields
from typing import Any, final

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from .growing_looped import Growing, GrowingLayer, GrowingSlidingWindowLayer, in_place_of

# What models, their outputs and generate call the KV cache: transformers 5.24 renamed it from `past_key_values`. Calls
# of transformers go by this name; forward takes both. Since then an attention layer writes the cache of an engine
# itself, too; before, the attention function did.
CACHE_NAMES = ("past_key_values", "cache")
LAYERS_WRITE_ENGINE_CACHES = any(field.name == "cache" for field in fields(BaseModelOutputWithPast))
CACHE_NAME = "cache" if LAYERS_WRITE_ENGINE_CACHES else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache given under either of its names; ValueError for two."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of the KV cache: give one of them.")
    return cache if past_key_values is None else past_key_values


def is_empty(cache: Cache) -> bool:
    """Whether no token is cached yet."""
    return int(cache.get_seq_length()) == 0


def readable(cache: Cache, slot: int) -> DynamicLayer | StaticLayer:
    """The cache layer at `slot`, if its entries can be read back.

    Raises:
        ValueError: it is quantized or of an unknown kind.
    """
    layer = cache.layers[slot]
    # Quantized layers are subclasses of these, and keep other tensors than their entries.
    plain = type(layer) in STOCK_LAYERS or isinstance(layer, RewritingLayer)
    if plain and isinstance(layer, (DynamicLayer, StaticLayer)):
        return layer
    raise ValueError(
        f"slot {slot} is a {type(layer).__name__}, whose rows cannot be read back: batch rows of different depth, "
        "early halting, shared KV and a num_loops that changes between calls need a DynamicCache or StaticCache."
    )


def recent_entries(layer: DynamicLayer | StaticLayer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the last `count` tokens, (B, K, count, d) each, or of those that a sliding layer still has.

    No length is read back from the device.
    """
    if isinstance(layer, StaticSlidingWindowLayer):
        kept = min(layer.cumulative_length_int, layer.max_cache_len)
        where = slice(max(kept - count, 0), kept)
        return layer.keys[:, :, where], layer.values[:, :, where]
    if isinstance(layer, StaticLayer):
        where = layer.cumulative_length - count + torch.arange(count, device=layer.keys.device)
        return layer.keys.index_select(2, where), layer.values.index_select(2, where)
    return layer.keys[:, :, -count:], layer.values[:, :, -count:]


def reorder_recent(layer: DynamicLayer | StaticLayer, order: torch.Tensor) -> None:
    """Put the entries of the last T tokens of every batch row into the order (B, T)."""
    recent = recent_entries(layer, order.shape[1])
    keys, values = (entries.gather(2, order[:, None, :, None].expand_as(entries)) for entries in recent)
    if isinstance(layer, StaticLayer):
        where = layer.cumulative_length - order.shape[1] + torch.arange(order.shape[1], device=order.device)
        layer.keys.index_copy_(2, where, keys)
        layer.values.index_copy_(2, where, values)
    else:
        layer.keys = torch.cat([layer.keys[:, :, : -order.shape[1]], keys], dim=2)
        layer.values = torch.cat([layer.values[:, :, : -order.shape[1]], values], dim=2)


def blank_like(layer: DynamicLayer | StaticLayer) -> DynamicLayer | StaticLayer:
    """An empty stock layer of the same kind and length. A copy cannot be made of entries that have a gradient."""
    if isinstance(layer, StaticSlidingWindowLayer):
        return StaticSlidingWindowLayer(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len)
    if isinstance(layer, StaticLayer):
        return StaticLayer(max_cache_len=layer.max_cache_len)
    grows = isinstance(layer, Growing)
    if isinstance(layer, DynamicSlidingWindowLayer):
        kind = GrowingSlidingWindowLayer if grows else DynamicSlidingWindowLayer
        return in_place_of(layer, kind(layer.sliding_window))
    return in_place_of(layer, GrowingLayer() if grows else DynamicLayer())


# The most special first.
STOCK_LAYERS = (
    StaticSlidingWindowLayer,
    StaticLayer,
    GrowingSlidingWindowLayer,
    DynamicSlidingWindowLayer,
    GrowingLayer,
    DynamicLayer,
)


def gets_slots_late(cache: Cache) -> bool:
    """Whether a cache may get slots within a call: the layers of a static cache are part of compiled graphs, and a new
    slot is filled with what is read back from another."""
    kinds = {type(layer) for layer in cache.layers}
    return all(kind in STOCK_LAYERS and issubclass(kind, DynamicLayer) for kind in kinds)


def append(layer: object, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
    """Put the entries of `num_tokens` tokens at the end of a layer, whatever its policy does with loops.

    Args:
        keys, values: of the tokens that are still in the window, (B, K, T <= num_tokens, d).
    """
    stock_update(layer, keys, values)
    count_dropped(layer, num_tokens - keys.shape[-2])


def stock_update(layer: object, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The update of the stock layer that `layer` is, or is made from."""
    stock: Any = next(kind for kind in STOCK_LAYERS if isinstance(layer, kind))
    return stock.update(layer, keys, values)


def count_dropped(layer: object, num_tokens: int) -> None:
    """Have a sliding layer count tokens whose entries it was not given, since they have left the window."""
    if num_tokens and isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int += num_tokens
    elif num_tokens and isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length += num_tokens


@final
class LastEntries:
    """What stays of a step: the entries of the last loop."""

    def add(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | slice | None, is_first: bool) -> None:
        """Note the entries (B, K, T, d) that a loop writes.

        Args:
            rows: the batch rows that ran this loop, (b,) or a slice; None for all. The others repeat their old
                entries.
            is_first: whether it is the first loop of the step.
        """

    def result(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values (B, K, T, d) to leave; None for those of the last loop."""
        return None


@final
class MeanEntries:
    """What stays of a step: the mean of the entries over the loops that a batch row ran."""

    sums: tuple[torch.Tensor, torch.Tensor]  # keys, values
    counts: torch.Tensor  # (B, 1, 1, 1) loops

    def add(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | slice | None, is_first: bool) -> None:
        """See `LastEntries.add`."""
        if is_first:
            self.sums, self.counts = (keys, values), keys.new_ones(len(keys), 1, 1, 1)
            return
        if rows is None or isinstance(rows, slice):
            rows = torch.arange(len(keys), device=keys.device)[slice(None) if rows is None else rows]
        sum_of_keys, sum_of_values = self.sums
        self.sums = sum_of_keys.index_add(0, rows, keys[rows]), sum_of_values.index_add(0, rows, values[rows])
        self.counts = self.counts.index_add(0, rows, self.counts.new_ones(len(rows), 1, 1, 1))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LastEntries.result`."""
        (keys, values), counts = self.sums, self.counts
        del self.sums, self.counts
        return keys / counts, values / counts


class RewritingLayer(CacheLayerMixin):
    """A cache layer whose entries of one step are written once per loop: the first update appends, others overwrite.

    A stock layer would append in every loop, which under sdpa is wrong without an error: six tokens would become
    6 * loops entries. A subclass has `write`, which appends or overwrites.
    """

    step_is_open = True
    stays: LastEntries | MeanEntries

    def open_step(self) -> None:
        """The next update belongs to new tokens."""
        self.step_is_open = True

    def update(self, key_states, value_states, *args, rows: torch.Tensor | slice | None = None, **kwargs):
        """Write T entries, (B, K, T, d); returns all keys and values, (B, K, S, d) or of a static cache's length.

        Only the batch rows in `rows`, (b,) or a slice, are new; the others have stopped looping and repeat their old
        entries.
        """
        self.stays.add(key_states, value_states, rows, is_first=self.step_is_open)
        return self.write(key_states, value_states)

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the entries (B, K, T, d) if the step has just been opened, or else overwrite those of the step."""
        raise NotImplementedError

    def close_step(self) -> None:
        """The tokens of this step have had their last loop."""
        result = self.stays.result()
        if result is not None:
            self.write(*result)


class RewritingDynamicLayer(RewritingLayer, DynamicLayer):
    # Keys and values before this step, once a gradient goes through its entries.
    before: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, stays: LastEntries | MeanEntries | None = None):
        super().__init__()
        self.stays = LastEntries() if stays is None else stays

    def write(self, keys, values):
        if self.step_is_open:
            self.step_is_open = False
            return stock_update(self, keys, values)
        past = self.keys.shape[-2] - keys.shape[-2]
        if not torch.is_grad_enabled():
            self.keys[:, :, past:], self.values[:, :, past:] = keys, values
        elif past == 0:
            self.keys, self.values = keys, values
        else:  # what was returned before is part of the graph, and must stay as it is
            if self.before is None:  # the loops so far may have had no gradient
                self.before = (self.keys[:, :, :past], self.values[:, :, :past])
            self.keys = torch.cat([self.before[0], keys], dim=-2)
            self.values = torch.cat([self.before[1], values], dim=-2)
        return self.keys, self.values

    def close_step(self) -> None:
        super().close_step()
        self.before = None


class RewritingGrowingLayer(RewritingDynamicLayer, GrowingLayer):
    """The same in room that grows by doubling."""


class RewritingStaticLayer(RewritingLayer, StaticLayer):
    def __init__(self, like: StaticLayer, stays: LastEntries | MeanEntries):
        """A rewriting layer over the tensors of an empty stock layer, if it has some: an exported graph owns them."""
        super().__init__(max_cache_len=like.max_cache_len)
        vars(self).update(vars(like))
        self.stays = stays

    def write(self, keys, values):
        if not self.step_is_open:
            self.cumulative_length.sub_(keys.shape[-2])
        self.step_is_open = False
        return StaticLayer.update(self, keys, values)


class RewindingLayer(RewritingLayer):
    """A rewriting layer with a sliding window: what a loop pushed out is put back before the next loop writes."""

    before: tuple | None = None  # what the layer held before this step

    def write(self, keys, values):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.step_is_open:
            self.step_is_open = False
            self.before = self.held()
        else:
            assert self.before is not None  # since the step was opened
            self.put_back(keys.shape[-2], *self.before)
        return stock_update(self, keys, values)

    def close_step(self) -> None:
        super().close_step()
        self.before = None

    def held(self) -> tuple:
        """All that a step of new tokens may overwrite."""
        raise NotImplementedError

    def put_back(self, num_tokens: int, *held) -> None:
        """Undo a step of `num_tokens` tokens, before which the layer `held` these."""
        raise NotImplementedError


class RewindingDynamicLayer(RewindingLayer, DynamicSlidingWindowLayer):
    # What the first loop of this step was shown, and every loop is: keys and values, (B, K, S, d) each.
    shown: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, like: DynamicSlidingWindowLayer, stays: LastEntries | MeanEntries):
        """A rewriting layer of the window of an empty stock one."""
        super().__init__(like.sliding_window)
        self.stays = stays

    def write(self, keys, values):
        if self.step_is_open or torch.is_grad_enabled():
            self.shown = super().write(keys, values)
        else:  # keys and values of this layer are views of these
            for shown, entries in zip(self.shown, (keys, values), strict=True):
                shown[:, :, -entries.shape[2] :] = entries
        return self.shown

    def close_step(self) -> None:
        super().close_step()
        del self.shown

    def held(self):
        return self.keys, self.values

    def put_back(self, num_tokens, keys, values):
        self.keys, self.values = keys, values
        self.cumulative_length -= num_tokens


class RewindingGrowingLayer(RewindingDynamicLayer, GrowingSlidingWindowLayer):
    """The same in room of twice the window."""


class RewindingStaticLayer(RewindingLayer, StaticSlidingWindowLayer):
    def __init__(self, like: StaticSlidingWindowLayer, stays: LastEntries | MeanEntries):
        """A rewriting layer over the tensors of an empty stock one, if it has some."""
        super().__init__(max_cache_len=like.max_cache_len, sliding_window=like.max_cache_len)
        vars(self).update(vars(like))
        self.stays = stays

    def held(self):
        return self.keys.clone(), self.values.clone(), self.cumulative_length.clone()

    def put_back(self, num_tokens, keys, values, cumulative_length):
        # In place: the addresses of a static cache are part of compiled graphs.
        self.keys.copy_(keys)
        self.values.copy_(values)
        self.cumulative_length.copy_(cumulative_length)
        self.cumulative_length_int -= num_tokens
