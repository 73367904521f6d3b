"""KV policies (KV sharing): which loops of a token its cached entries keep.

    per_loop   one entry per (token, loop), in stock cache layers: a slot per (loop, layer). Cached equals uncached.
    first      one entry per token, that of loop 0, which every loop reads (MELT's z = 1). Cached equals uncached.
    natural    one entry per token, that of loop 0, which later tokens read; its own current keys a token reads in each
               loop (training-free looping, arXiv 2605.23872). Cached equals uncached.
    last       one entry per token, rewritten by every loop (MELT's z = 0): tokens of one chunk see each other at the
               current loop, later chunks see the last loop (Ouro, arXiv 2510.25741).
    mean       like last, but later chunks see the mean of the entries over loops (Ouro).
    gated      like last, but a loop computes keys and values from a latent that a KV gate mixes from the loops so far
               (MELT, arXiv 2605.07721; `gates_looped.py`).

A chunk is a call, or `prefill_chunk` tokens of it. With last, mean and gated the result depends on where a prompt is
cut: feeding it token by token and feeding it at once compute different things. `prefill_chunk=1` always computes what
token-by-token decoding computes.

Every forward uses its policy, whatever the cache:

    sharing.open(cache, num_loops)               makes the slots that so many loops need
    sharing.deepen(cache, loop, num_loops)       the same within a call, for loops that may not be run
    keys = sharing.key_source()                  keys.run_layer(layer, index, x, loop) runs a layer, and chooses what
                                                 its keys and values are computed from
    sharing.close(cache, loops_run, num_tokens)  gives tokens that stopped early entries in the slots they lack

Tokens that stop early are filled in with what was *last computed*: the slot of a loop that a token did not run holds
the token's entry of the last loop that it did run. A policy with one entry per token keeps that of the loops it ran.

Legend: B batch rows of the call, b batch rows that still loop, K key-value heads, S cached tokens, T tokens of this
call, D hidden size, d head size.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .cache_layers_looped import (
    LastEntries,
    MeanEntries,
    RewindingDynamicLayer,
    RewindingGrowingLayer,
    RewindingStaticLayer,
    RewritingDynamicLayer,
    RewritingGrowingLayer,
    RewritingLayer,
    RewritingStaticLayer,
    blank_like,
    count_dropped,
    is_empty,
    readable,
    recent_entries,
)
from .gates_looped import KV_GATES
from .growing_looped import Growing, in_place_of
from .layers_looped import GatedLoopedLayer, LoopedLayer, NaturalLoopedLayer, SlotAttention
from .two_sources_looped import own_columns, two_source_mask


class KeySource(ABC):
    """What the keys and values of a layer are computed from."""

    @abstractmethod
    def run_layer(
        self, layer: nn.Module, index: int, hidden_states: torch.Tensor, loop: int, **kwargs
    ) -> torch.Tensor:
        """Run layer number `index` of a section in a loop counted from 0: (b, T, D) -> (b, T, D).

        Args:
            kwargs: of the layer: its attention, the mask, rotary angles, positions and the cache.
        """

    @abstractmethod
    def keep(self, rows: torch.Tensor | slice) -> "KeySource":
        """The source of the batch rows `rows` of these, (b',) or a slice."""

    @abstractmethod
    def join(self, later: Sequence) -> "KeySource":
        """The source of a block of tokens: the tokens of this source, then those of `later`."""


@final
class OwnKeys(KeySource):
    """Keys and values are computed from what the layer runs on."""

    def run_layer(self, layer, index, hidden_states, loop, **kwargs):
        return layer(hidden_states, **kwargs)

    def keep(self, rows):
        return self

    def join(self, later):
        return self


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


@final
class NaturalKeys(KeySource):
    """Loop 0 writes the entries. In later loops a token sees those of earlier tokens, and its own current ones.

    Args:
        entries: of each layer, the keys and values that loop 0 attended to, (b, K, S, d) each; empty before loop 0.
        columns: (T,), where the tokens of this call are among the S.
        mask: of later loops, see `two_source_mask`; None if it was not made yet.
        unwritten: layers whose slots lack the entries of these tokens.
    """

    def __init__(self, entries=(), columns=None, mask=None, unwritten=()):
        self.entries: list[tuple[torch.Tensor, torch.Tensor]] = list(entries)
        self.columns: torch.Tensor | None = columns
        self.mask: torch.Tensor | None = mask
        self.unwritten: set[int] = set(unwritten)

    def run_layer(self, layer, index, hidden_states, loop, *, attention, attention_mask, past_key_values, **kwargs):
        kwargs |= {"attention": attention}
        if loop == 0:
            hidden_states, keys, values = layer(
                hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
            self.entries.append((keys, values))
            if self.columns is None:
                self.columns = own_columns(past_key_values, attention.layer_idx, keys, hidden_states.shape[1])
            return hidden_states
        assert self.columns is not None
        keys, values = self.entries[index]
        if index in self.unwritten:
            self.unwritten.remove(index)
            own = -len(self.columns)
            past_key_values.update(keys[:, :, own:], values[:, :, own:], attention.layer_idx)
        if self.mask is None:
            self.mask = two_source_mask(attention_mask, self.columns, keys.shape[2])
        return layer(hidden_states, keys, values, self.columns, attention_mask=self.mask, **kwargs)[0]

    def keep(self, rows):
        entries = [(keys[rows], values[rows]) for keys, values in self.entries]
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[rows]
        return NaturalKeys(entries, self.columns, mask)

    def join(self, later):
        # The last token has attended to all of them. Their slots are cropped, since other policies write them anew.
        entries = (self, *later)[-1].entries
        num_tokens, num_keys = 1 + len(later), entries[0][0].shape[2]
        columns = torch.arange(num_keys - num_tokens, num_keys, device=entries[0][0].device)
        return NaturalKeys(entries, columns, unwritten=range(len(entries)))


OWN_KEYS = OwnKeys()


class Sharing(ABC):
    """A KV policy.

    Attributes:
        rewrites: a loop rewrites the entries of the loop before. Tokens of one call then see each other otherwise than
            tokens of successive calls do: `prefill_chunk` has a meaning, and engines that cut prompts as their load
            has it (paged attention), drafts and `prefill_chunk_size` are refused.
        slot_per_loop: every loop has slots of its own.
        core_layer: the class of the layers of the core.
        has_parameters: the core's layers have parameters that those of the other policies lack.
        engine_trouble: why an engine with a cache of its own cannot run this policy, where it cannot.
    """

    rewrites: ClassVar[bool]
    slot_per_loop: ClassVar[bool] = False
    core_layer: ClassVar[type[LoopedLayer]] = LoopedLayer
    has_parameters: ClassVar[bool] = False
    engine_trouble: ClassVar[str] = "gives other tokens where a prompt is cut, and {} cuts prompts as its load has it"

    def __init__(self, config):
        self.slots = config.kv_slots()

    @property
    def takes_engines(self) -> bool:
        """Whether engines that pack the tokens of several requests into a cache of their own can run this policy."""
        return not self.rewrites

    @classmethod
    def flops(cls, config) -> int:
        """Matrix-product FLOPs of this policy per token and core layer, in every loop but the first."""
        return 0

    @abstractmethod
    def open(self, cache: Cache, num_loops: int) -> None:
        """Give the cache the slots that `num_loops` loops need, before a call writes to it.

        Raises:
            ValueError: the cache holds entries that this policy cannot go on from.
        """

    def deepen(self, cache: Cache, loop: int, num_loops: int) -> None:  # noqa: B027 (few policies need more slots)
        """Give a cache that was opened for fewer loops the slots that `num_loops` loops need, before loop number
        `loop` runs: its slots still hold what was cached before the call."""

    @abstractmethod
    def previous(self, slot: int) -> int:
        """The slot that holds the entries of the same layer in the loop before."""

    @abstractmethod
    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """End a call of `num_tokens` tokens, of which `loops_run` loops ran: all slots are equally long afterwards."""

    def key_source(self) -> KeySource:
        """What keys and values of the core are computed from; a new one for every call."""
        return OWN_KEYS

    def check_attention(self) -> None:  # noqa: B027 (most policies run with any)
        """ValueError for an attention backend that cannot run this policy."""


@final
class PerLoopSharing(Sharing):
    """Every (loop, layer) has a slot of its own, in stock cache layers."""

    rewrites = False
    slot_per_loop = True

    def open(self, cache: Cache, num_loops: int) -> None:
        """An empty cache gets exactly these slots; a filled one is grown, and its new slots are filled."""
        needed = self.slots.count(num_loops)
        if len(cache.layers) == needed:
            return
        if is_empty(cache):
            if cache.layer_class_to_replicate is None:
                del cache.layers[needed:]
                cache.layers.extend(copy.deepcopy(cache.layers[-1]) for _ in range(needed - len(cache.layers)))
        elif len(cache.layers) < needed:
            self._deepen(cache, needed, int(cache.get_seq_length()))

    def deepen(self, cache: Cache, loop: int, num_loops: int) -> None:
        first, needed = self.slots.slot("core", 0, loop), self.slots.count(num_loops)
        if first < len(cache.layers) < needed:  # an empty cache may make its layers as they are written
            self._deepen(cache, needed, int(cache.layers[first].get_seq_length()))

    def _deepen(self, cache: Cache, needed: int, seen: int) -> None:
        for slot in range(len(cache.layers), needed):
            cache.layers.append(blank_like(readable(cache, slot - 1)))
            if seen:
                self._fill(cache, slot, seen)

    def _fill(self, cache: Cache, slot: int, num_tokens: int) -> None:
        keys, values = recent_entries(readable(cache, self.previous(slot)), num_tokens)
        cache.update(keys.clone(), values.clone(), slot)
        count_dropped(cache.layers[slot], num_tokens - keys.shape[-2])

    def previous(self, slot: int) -> int:
        return slot - self.slots.num_core_layers

    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """The slots of loops that did not run get the entries of the last loop that did."""
        for slot in range(self.slots.count(loops_run), len(cache.layers)):
            self._fill(cache, slot, num_tokens)


class OneEntrySharing(Sharing):
    """One slot per core layer, in a rewriting cache layer: one entry per token for all loops."""

    stays: ClassVar[type[LastEntries | MeanEntries]] = LastEntries

    def __init__(self, config):
        super().__init__(config)
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

    def _rewriting(self, cache: Cache, slot: int) -> RewritingLayer:
        layer = readable(cache, slot)
        # A graph in the making cannot look how many tokens a static cache holds.
        if not torch.compiler.is_compiling() and not is_empty(cache):
            raise ValueError(
                f"kv_sharing={self.name!r} rewrites its rows, but slot {slot} of this cache was filled by "
                "a layer that appends, as PEFT's prefix tuning and cartridges fill them. Start from an empty "
                "DynamicCache or StaticCache."
            )
        return self.layer_like(layer)

    def layer_like(self, layer: DynamicLayer | StaticLayer) -> RewritingLayer:
        """An empty layer of this policy, of the kind and length of an empty stock one."""
        if isinstance(layer, StaticSlidingWindowLayer):
            return RewindingStaticLayer(layer, self.stays())
        if isinstance(layer, StaticLayer):
            return RewritingStaticLayer(layer, self.stays())
        grows = isinstance(layer, Growing)
        if isinstance(layer, DynamicSlidingWindowLayer):
            kind = RewindingGrowingLayer if grows else RewindingDynamicLayer
            return in_place_of(layer, kind(layer, self.stays()))
        return in_place_of(layer, (RewritingGrowingLayer if grows else RewritingDynamicLayer)(self.stays()))

    def previous(self, slot: int) -> int:
        return slot

    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """A token that stopped early leaves the entry of the loops that it ran: there is nothing to fill."""
        for slot in self._core_slots():
            cache.layers[slot].close_step()


@final
class LastSharing(OneEntrySharing):
    """A token leaves the entry of its last loop."""

    rewrites = True


@final
class FirstSharing(OneEntrySharing):
    """Keys and values come from loop 0 in every loop, cached or not."""

    rewrites = False  # every loop writes the same entry

    def key_source(self) -> KeySource:
        return FirstLoopKeys()


@final
class NaturalSharing(Sharing):
    """Loop 0 writes and the later loops do not, so that stock cache layers do."""

    rewrites = False
    core_layer = NaturalLoopedLayer
    engine_trouble = "leaves entries in the first loop alone, and {} expects some of every layer call"

    def __init__(self, config):
        super().__init__(config)
        self.config = config

    @property
    def takes_engines(self) -> bool:
        return False

    def open(self, cache: Cache, num_loops: int) -> None:
        """There is a slot for every layer, whatever the loop count."""

    def previous(self, slot: int) -> int:
        return slot

    def close(self, cache: Cache, loops_run: int, num_tokens: int) -> None:
        """Every token has run loop 0: there is nothing to fill."""

    def key_source(self) -> KeySource:
        return NaturalKeys()

    def check_attention(self) -> None:
        attention = self.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise ValueError(
                f"kv_sharing='natural' needs a mask over two sources of keys, which attention {attention!r} does not "
                "take: call model.set_attn_implementation('sdpa'), or use kv_sharing='per_loop'."
            )


@final
class MeanSharing(OneEntrySharing):
    """A token leaves the mean of the entries of the loops that it ran."""

    rewrites = True
    stays = MeanEntries


@final
class GatedSharing(OneEntrySharing):
    """Keys and values come from the latent of `gates_looped.py`; a token leaves the entry of its last loop."""

    rewrites = True
    core_layer = GatedLoopedLayer
    has_parameters = True

    @classmethod
    def flops(cls, config) -> int:
        return KV_GATES[config.kv_gate].flops(config)

    def key_source(self) -> KeySource:
        return GatedKeys()


SHARINGS: dict[str, type[Sharing]] = {
    "per_loop": PerLoopSharing,
    "first": FirstSharing,
    "natural": NaturalSharing,
    "last": LastSharing,
    "mean": MeanSharing,
    "gated": GatedSharing,
}


@final
class ActiveCache:
    """The cache as the batch rows that still loop see it; stands in for `past_key_values` inside attention.

    Batch rows that have halted keep their keys and values of the loop before: they are filled in step by step.

    Args:
        cache: of all B batch rows.
        numbers: the batch rows that still loop, ascending.
        rows: the same on the device, (b,).
        sharing: the policy, which says where the loop before left its entries.
    """

    def __init__(self, cache: Cache, numbers: list[int], rows: torch.Tensor, sharing: Sharing):
        self.cache, self.sharing = cache, sharing
        self.runs = runs_of(numbers)
        one_run = len(self.runs) == 1
        self.active = self.runs[0][1] if one_run else rows

    def update(self, key_states, value_states, slot: int, *args, **kwargs):
        """Write T entries (b, K, T, d) of the active batch rows; returns their keys and values (b, K, S, d)."""
        keys, values = self.write(key_states, value_states, slot)
        return chosen(keys, self.active), chosen(values, self.active)

    def write(self, key_states, value_states, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T entries (b, K, T, d) of the active batch rows; returns those of all batch rows, (B, K, S, d)."""
        before = recent_entries(readable(self.cache, self.sharing.previous(slot)), key_states.shape[-2])
        dropped = key_states.shape[-2] - before[0].shape[-2]  # by a sliding layer: batch rows that halted read none
        if dropped:
            before = [F.pad(entries, (0, 0, dropped, 0)) for entries in before]
        keys, values = map(put, before, (key_states, value_states), (self.active, self.active))
        return self.cache.update(keys, values, slot, rows=self.active)

    def views_pay(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether to read the batch rows run by run, each a view of the cache (B, K, S, d), rather than all of them by
        an index, which copies their whole context. On an accelerator a call costs more, and nobody has measured."""
        if len(self.runs) == 1:
            return True
        copied = (keys[0].numel() + values[0].numel()) * sum(own.stop - own.start for own, _ in self.runs)
        return keys.device.type == "cpu" and copied > RUN_COST * (len(self.runs) - 1)


RUN_COST = 131_072  # numbers that are copied in the time of one more call of an attention, on a CPU


@final
class ActiveAttention:
    """Stands in for the attention of a slot once batch rows have halted: those that still loop are read run by run
    where that is cheaper.

    Args:
        attention: of the slot.
    """

    def __init__(self, attention: SlotAttention):
        self.attention, self.layer_idx = attention, attention.layer_idx

    def __call__(self, query, key, value, attention_mask=None, past_key_values=None, **kwargs):
        """Queries (b, H, T, d), keys and values (b, K, T, d) -> (b, T, H, d), and the attention weights or None."""
        cache = past_key_values
        if not isinstance(cache, ActiveCache):  # the keys are the layer's own
            return self.attention(query, key, value, attention_mask, past_key_values=cache, **kwargs)
        keys, values = cache.write(key, value, self.layer_idx)
        if not cache.views_pay(keys, values):
            keys, values = chosen(keys, cache.active), chosen(values, cache.active)
            return self.attention(query, keys, values, attention_mask, **kwargs)
        outputs = []
        for own, run in cache.runs:
            mask = attention_mask if attention_mask is None or len(attention_mask) == 1 else attention_mask[own]
            outputs.append(self.attention(query[own], keys[run], values[run], mask, **kwargs))
        if len(outputs) == 1:
            return outputs[0]
        output, weights = zip(*outputs, strict=True)
        return torch.cat(output), None if weights[0] is None else torch.cat(weights)


def runs_of(numbers: list[int]) -> list[tuple[slice, slice]]:
    """Numbers that ascend by one: where they lie in the list, and which they are."""
    starts = [place for place, number in enumerate(numbers) if place == 0 or number != numbers[place - 1] + 1]
    ends = [*starts[1:], len(numbers)]
    return [
        (slice(start, end), slice(numbers[start], numbers[start] + end - start))
        for start, end in zip(starts, ends, strict=True)
    ]


def places_of(numbers: list[int], device: torch.device) -> torch.Tensor | slice:
    """Numbers that ascend, as an index: a slice where there is none between them that is missing."""
    runs = runs_of(numbers)
    return runs[0][1] if len(runs) == 1 else torch.tensor(numbers, device=device)


def chosen(values: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Some batch rows, (b,) or a slice, of (B, ...)."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def put(values: torch.Tensor, new: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Values (B, ...) with new ones (b, ...) in some batch rows, (b,) or a slice."""
    if isinstance(rows, slice):
        return torch.cat([values[: rows.start], new, values[rows.stop :]])
    return values.index_copy(0, rows, new)
