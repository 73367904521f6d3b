"""KV sharing: which loops of a token its cached keys and values keep.

    per_loop   one row per (token, loop); stock cache layers, one slot per (loop, layer). Cached == uncached.
    first      one row per token, that of loop 0, read by every loop (MELT's z = 1). Cached == uncached.
    last       one row per token, rewritten by every loop (MELT's z = 0): tokens of one call see each other at the
               current loop, later calls see the last loop. The cache is therefore a different model from the uncached
               run: the one obtained by calling the model token by token (Ouro, arXiv 2510.25741).

A policy is used in every forward, whatever the cache:

    sharing.open(cache, num_loops)               sizes the slots for the loops asked for
    inputs = sharing.inputs()                    inputs.of(layer, x): what keys and values are computed from
    sharing.close(cache, loops_run, num_tokens)  tokens that stopped early are filled in: all slots stay level

The fill policy is *last computed*: a slot of a loop that a token never ran holds the token's rows of the deepest loop
it did run. Legend: B rows, K heads, S cached tokens, T tokens of this call, d head size.
"""

import copy

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer


def recent_rows(layer: DynamicLayer | StaticLayer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `count` tokens of a cache layer: keys and values (B, K, count, d), without reading a length back."""
    if isinstance(layer, StaticLayer):
        rows = layer.cumulative_length - count + torch.arange(count, device=layer.keys.device)
        return layer.keys.index_select(2, rows), layer.values.index_select(2, rows)
    return layer.keys[:, :, -count:], layer.values[:, :, -count:]


def readable(cache: Cache, slot: int) -> DynamicLayer | StaticLayer:
    """The cache layer at `slot`, if its rows can be read back.

    Raises:
        ValueError: it is quantized, sliding or of an unknown kind.
    """
    layer = cache.layers[slot]
    # Quantized and sliding layers are subclasses of these, and keep other tensors than their rows.
    plain = type(layer) in (DynamicLayer, StaticLayer, RewritingDynamicLayer, RewritingStaticLayer)
    if plain and isinstance(layer, (DynamicLayer, StaticLayer)):
        return layer
    raise ValueError(
        f"slot {slot} is a {type(layer).__name__}, whose rows cannot be read back: rows of different depth, early "
        "halting, shared KV and a num_loops that changes between calls need a DynamicCache or StaticCache."
    )


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
            blank = copy.deepcopy(readable(cache, slot - 1))
            blank.reset()
            cache.layers.append(blank)
            self._fill(cache, slot, seen)

    def _fill(self, cache: Cache, slot: int, num_tokens: int) -> None:
        keys, values = recent_rows(readable(cache, self.previous(slot)), num_tokens)
        cache.update(keys.clone(), values.clone(), slot)

    def inputs(self) -> "OwnInputs":
        return OwnInputs()

    def previous(self, slot: int) -> int:
        """The slot that holds this layer's rows of the loop before."""
        return slot - self.slots.num_core_layers

    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """Fill the slots of loops that were not run with this call's rows of the last one that was."""
        for slot in range(self.slots.count(loops_run), len(cache.layers)):
            self._fill(cache, slot, num_tokens)


class LastSharing:
    """One slot per core layer; every loop rewrites the rows of this call's tokens."""

    def __init__(self, config):
        self.slots = config.kv_slots()
        self.name = config.kv_sharing

    def open(self, cache: Cache, num_loops: int) -> None:
        """Put rewriting layers into an empty cache, and open a step in them.

        Raises:
            ValueError: the cache already holds tokens that another policy wrote, or is quantized.
        """
        first, end = self.slots.slot("core", 0), self.slots.count(num_loops)
        if cache.layer_class_to_replicate is not None:
            cache.layers.extend(cache.layer_class_to_replicate() for _ in range(end - len(cache.layers)))
        for slot in range(first, end):
            if not isinstance(cache.layers[slot], RewritingLayer):
                cache.layers[slot] = self._rewriting(cache, slot)
            cache.layers[slot].open_step()

    def _rewriting(self, cache: Cache, slot: int) -> "RewritingLayer":
        layer = readable(cache, slot)
        if not is_empty(cache):
            raise ValueError(
                f"kv_sharing={self.name!r} rewrites its rows, but slot {slot} of this cache was filled by "
                "a layer that appends. Start from an empty DynamicCache or StaticCache."
            )
        if isinstance(layer, StaticLayer):
            return RewritingStaticLayer(max_cache_len=layer.max_cache_len)
        return RewritingDynamicLayer()

    def inputs(self) -> "OwnInputs":
        return OwnInputs()

    def previous(self, slot: int) -> int:
        """The slot that holds this layer's rows of the loop before: the same one."""
        return slot

    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """Nothing to fill: a token that stops early leaves the row of its last loop."""


class FirstSharing(LastSharing):
    """One slot per core layer; keys and values come from loop 0 in every loop, cached or not."""

    def inputs(self) -> "FirstInputs":
        return FirstInputs()


SHARINGS = {"per_loop": PerLoopSharing, "last": LastSharing, "first": FirstSharing}


class OwnInputs:
    """Keys and values are computed from what the layer runs on."""

    def of(self, layer: int, hidden_states: torch.Tensor) -> None:
        return None

    def keep(self, rows: torch.Tensor) -> None:
        """Rows left the batch; there is nothing to keep in step."""

    def join(self, parts: list) -> "OwnInputs":
        """Those of successive tokens as one block, this one's the first."""
        return self


class FirstInputs:
    """Keys and values are computed from what the layer ran on in loop 0."""

    def __init__(self):
        self.inputs = []

    def of(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer == len(self.inputs):
            self.inputs.append(hidden_states)
        return self.inputs[layer]

    def keep(self, rows: torch.Tensor) -> None:
        self.inputs = [hidden_states[rows] for hidden_states in self.inputs]

    def join(self, parts: list) -> "FirstInputs":
        joined = FirstInputs()
        joined.inputs = [torch.cat(tokens, dim=1) for tokens in zip(*(part.inputs for part in parts), strict=True)]
        return joined


class RewritingLayer(CacheLayerMixin):
    """A cache layer whose rows of one step are written once per loop: the first update appends, the others overwrite.

    A stock layer would append every loop, which is silently wrong under sdpa: six tokens would become 6 x loops rows.
    """

    step_is_open = True

    def open_step(self) -> None:
        """The next update belongs to new tokens."""
        self.step_is_open = True


class RewritingDynamicLayer(RewritingLayer, DynamicLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        """Append or overwrite T rows; returns all keys and values, (B, K, S, d)."""
        if self.step_is_open:
            self.step_is_open = False
            return super().update(key_states, value_states)
        kept = self.keys.shape[-2] - key_states.shape[-2]
        self.keys = torch.cat([self.keys[:, :, :kept], key_states], dim=-2)
        self.values = torch.cat([self.values[:, :, :kept], value_states], dim=-2)
        return self.keys, self.values


class RewritingStaticLayer(RewritingLayer, StaticLayer):
    def update(self, key_states, value_states, *args, **kwargs):
        """Append or overwrite T rows in place; returns all keys and values, (B, K, max_cache_len, d)."""
        if not self.step_is_open:
            self.cumulative_length.sub_(key_states.shape[-2])
        self.step_is_open = False
        return super().update(key_states, value_states)


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
        keys, values = self.cache.update(keys, values, slot)
        return keys[self.rows], values[self.rows]


def is_empty(cache: Cache) -> bool:
    return int(cache.get_seq_length()) == 0
