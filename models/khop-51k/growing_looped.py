"""Layers of a KV cache that grow by doubling: a token costs the writing of its own entries, not a copy of all others.

A stock `DynamicLayer` concatenates all entries anew in every layer call, so that a token after S cached tokens copies
S entries in every slot. A growing layer writes into room that it has left over, and its keys and values are views of
the filled part. What it returns, crops, reorders and resets is what the stock layer would, bit for bit:

    keys       |e e e e e e|. . . . . .|      S entries and as much room again; room is made anew when it is full
    update      writes behind the last entry, where nobody has seen anything
    crop        takes a shorter view. What was cropped may still be seen by somebody: the next update moves, unless
                `activate_past_recording` said that this cache is cropped after every call (drafts)

Where a gradient may be wanted, or a graph is in the making, it is the stock layer.

Legend: B batch rows, K key-value heads, S cached tokens, T tokens of an update, d head size.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class Growing(CacheLayerMixin):
    """What both growing layers share; stands before a stock dynamic layer, whose keys and values it manages.

    Attributes:
        most: tokens that this text can have, if that is known: no room is made for more.
        record_past: crops come after every call, and nobody keeps what was cropped.
    """

    most: int | None = None
    record_past: bool = False
    room: tuple[torch.Tensor, torch.Tensor] | None = None  # keys, values: (B, K, capacity, d), which may differ in d
    views: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values, where they lie in `room`
    seen: int = 0  # columns of the room that were shown to somebody
    kind: tuple | None = None  # of the last update that fitted into this room

    def activate_past_recording(self) -> None:
        """This cache is cropped after every call: what is cropped makes room."""
        self.record_past = True

    def grown(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views of the entries that are kept and of these (B, K, T, d) behind them; None where the stock layer must
        do it."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        new = keys, values
        kind = keys.shape, values.shape, keys.dtype, values.dtype, keys.device, values.device
        if not (kind == self.kind and self.lies_in_room()) and not self.fits(new):
            return None
        assert self.keys is not None  # they fit beside something
        num_kept = self.keys.shape[-2]
        start = self.start()
        end = start + num_kept + keys.shape[-2]
        if not self.has_room(start + num_kept, end):
            start, end = 0, end - start
            self.move(new, end)
        self.kind = kind
        assert self.room is not None  # now
        self.seen = end
        for room, entries in zip(self.room, new, strict=True):
            room[:, :, start + num_kept : end] = entries
        return self.room[0][:, :, start:end], self.room[1][:, :, start:end]

    def fits(self, new) -> bool:
        """Whether these entries can stand beside those that are kept: a first update, and one that is a mistake, are
        the stock layer's."""
        if self.keys is None or self.values is None or self.keys.ndim != 4:
            return False
        return all(
            old.dtype == entries.dtype
            and old.device == entries.device
            and (*old.shape[:2], old.shape[3]) == (*entries.shape[:2], entries.shape[3])
            for old, entries in zip((self.keys, self.values), new, strict=True)
        )

    def lies_in_room(self) -> bool:
        """Whether keys and values are still the views that this layer made: others put their own tensors here."""
        return self.views is not None and self.keys is self.views[0] and self.values is self.views[1]

    def start(self) -> int:
        """The column of the room at which keys and values begin."""
        return self.keys.storage_offset() // self.keys.shape[-1] if self.lies_in_room() else 0

    def has_room(self, begin: int, end: int) -> bool:
        """Whether the columns begin .. end - 1 can be written."""
        if not self.lies_in_room() or end > self.room[0].shape[2]:
            return False
        if self.room[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        return begin >= self.seen or self.record_past

    def move(self, new, num_columns: int) -> None:
        """Make new room, for as many columns again unless the text ends before, and put the entries in front."""
        doubled = 2 * num_columns
        capacity = doubled if self.most is None or self.most < num_columns else min(doubled, self.most)
        self.room = tuple(e.new_empty(*e.shape[:2], capacity, e.shape[3]) for e in new)
        assert self.keys is not None
        assert self.values is not None
        for room, entries in zip(self.room, (self.keys, self.values), strict=True):
            room[:, :, : entries.shape[2]] = entries

    def show(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have these views of the room as keys and values."""
        self.keys, self.values = self.views = keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """As the stock layer."""
        lay_in_room = self.lies_in_room()
        super().crop(tokens_to_remove)
        if lay_in_room:
            self.views = self.keys, self.values

    def reset(self) -> None:
        """As the stock layer."""
        super().reset()
        self.room = self.views = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As the stock layer, (B',) batch rows of these; they are copied to where they can grow."""
        in_room = self.lies_in_room() and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not in_room or self.get_seq_length() == 0:
            super().reorder_cache(beam_idx)
            return
        rows, start, num_kept = beam_idx.to(self.keys.device), self.start(), self.keys.shape[2]
        assert self.room is not None
        assert self.views is not None
        room = tuple(old.new_empty(len(rows), *old.shape[1:]) for old in self.room)
        views = tuple(new[:, :, start : start + num_kept] for new in room)
        for old, new in zip(self.views, views, strict=True):
            torch.index_select(old, 0, rows, out=new)
        self.room, self.seen, self.kind = room, start + num_kept, None
        self.show(*views)


class GrowingLayer(Growing, DynamicLayer):
    """A `DynamicLayer` that grows by doubling."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Write T entries, (B, K, T, d); returns all keys and values, (B, K, S + T, d)."""
        grown = self.grown(key_states, value_states)
        if grown is None:
            self.room = self.views = None
            return super().update(key_states, value_states, *args, **kwargs)
        self.show(*grown)
        return grown


class GrowingSlidingWindowLayer(Growing, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` whose window moves through room of twice its size."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Write T entries, (B, K, T, d); returns the keys and values that these tokens may see."""
        grown = self.grown(key_states, value_states)
        if grown is None:
            self.room = self.views = None
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        window = self.sliding_window - 1
        self.show(*(grown if self.record_past else last(grown, window)))
        return last(grown, window + key_states.shape[-2]) if self.record_past else grown


def last(entries: tuple[torch.Tensor, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the last `count` tokens, or of all where there are fewer."""
    return entries[0][:, :, -count:], entries[1][:, :, -count:]


def let_grow(cache: DynamicCache, most: int | None = None) -> DynamicCache:
    """Have the empty stock dynamic layers of a cache grow by doubling, in place; returns it.

    Args:
        cache: layers of other kinds, and what holds tokens already, stay as they are.
        most: tokens that the text can have, if that is known.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers = [growing_like(layer) for layer in cache.layers]
    for layer in cache.layers:
        if isinstance(layer, Growing):
            layer.most = most
    return cache


def growing_like(layer):
    """An empty growing layer for an empty stock dynamic one; another layer is returned as it is."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.is_initialized:
        return layer
    if type(layer) is DynamicLayer:
        return GrowingLayer()
    return in_place_of(layer, GrowingSlidingWindowLayer(layer.sliding_window))


def in_place_of(layer, new):
    """An empty layer that takes the place of another, with what that one was told of its text; it is returned."""
    if isinstance(layer, Growing):
        new.most, new.record_past = layer.most, layer.record_past
    elif isinstance(layer, DynamicSlidingWindowLayer):
        new.record_past = layer.record_past
    return new


def growing_cache(config) -> DynamicCache:
    """A `DynamicCache` for a model of this configuration, whose layers grow by doubling."""
    return let_grow(DynamicCache(config=config))


class GrowingCacheMixin:
    """Stands before `GenerationMixin`: the cache that `generate` makes grows by doubling, unless the call or its
    generation config asks for another with `cache_implementation`; `"dynamic"` is transformers' own."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """As in transformers."""
        given = [value for value in model_kwargs.values() if isinstance(value, Cache)]
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if given or generation_config.cache_implementation is not None:
            return
        for cache in model_kwargs.values():
            if type(cache) is DynamicCache:
                let_grow(cache, most=max_cache_length)
                if generation_config.is_assistant:
                    cache.activate_past_recording()
