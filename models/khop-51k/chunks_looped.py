"""Chunked calls. A long call is cut into chunks of tokens; each chunk attends to the keys and values that earlier
chunks left in the cache.

    for chunk in chunks of `prefill_chunk` tokens, counted from the first real token of a batch row:
        run it as a call of its own, through one cache

Several sequences may be packed into one batch row, where positions begin anew. Each of them is counted from its own
first token: it becomes a batch row of its own.

Where a token has one cached entry for all loops (`last`, `mean`, `gated`), tokens of one chunk see each other in the
loop under way, and earlier chunks in their final form. The length of a chunk is therefore part of what the model
computes: with `prefill_chunk=1` a whole sequence is computed as decoding would compute it. Training goes through the
same chunks, with gradients through the entries of earlier chunks unless they are cut; under gradient checkpointing
whole chunks are run again. Source: MELT (arXiv 2605.07721), chunk-wise training.

Legend: B batch rows of the call, N batch rows of its chunks, b of them that still loop, T tokens, L tokens of the
longest batch row of the chunks, C tokens of a chunk, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import final

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_layers_looped import append, readable, recent_entries, reorder_recent
from .calls_looped import Call, Decision, LoopStates, Observer
from .growing_looped import growing_cache
from .saved_entries_looped import SavedEntries
from .versions_looped import slice_logits_to_keep


@final
class LeftAligned:
    """Chunks have the batch rows of the call (N = B, L = T), turned so that the first real token comes first.

    Chunks then end at the same tokens as without padding on the left.

    Args:
        real: (B, T) bool, the tokens of the call that are not padding.
        padded: whether some of them may be padding.

    Attributes:
        moves: whether a token changes its place.
        inverse: (B, T), the place in the chunks of every token of the call.
    """

    def __init__(self, real: torch.Tensor, padded: bool = True):
        tokens = torch.arange(real.shape[1], device=real.device)
        padding = (real.int().cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
        self.moves = padded and bool((padding % real.shape[1]).any())
        self.order = (tokens + padding) % real.shape[1]  # (B, T)
        self.inverse = (tokens - padding) % real.shape[1]

    def to_chunk_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(B or 1, T, ...) as the call has them -> (N, L, ...) as the chunks have them."""
        return self._select(values, self.order) if self.moves else values

    def to_call_rows(self, values: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(N, L, ...) as the chunks have them, or (b, L, ...) of the batch rows `rows` -> as the call has them."""
        return self._select(values, self.inverse if rows is None else self.inverse[rows]) if self.moves else values

    def row_numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Batch indices of the rows that `to_call_rows(values, rows)` returns."""
        return rows

    def _select(self, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        values = values.expand(len(order), *values.shape[1:])
        return values[torch.arange(len(order), device=order.device).unsqueeze(1), order]


def begins_of(position_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: where a sequence begins, which as in transformers is wherever positions do not go on."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins


@final
class Unpacked:
    """Every packed sequence becomes a batch row of its own: N batch rows of L tokens.

    A sequence shorter than L is filled with the tokens behind it, which it cannot see.

    Args:
        begins: (B, T) bool, see `begins_of`.
    """

    moves = True

    def __init__(self, begins: torch.Tensor):
        self.shape = begins.shape
        first = begins.flatten().nonzero().squeeze(1)  # (N,) among all B T tokens
        tokens = torch.arange(begins.numel(), device=begins.device)
        self.sequence = begins.flatten().cumsum(0) - 1  # (B T,)
        self.place = tokens - first[self.sequence]  # (B T,)
        longest = torch.arange(int(self.place.max()) + 1, device=begins.device)
        self.order = (first.unsqueeze(1) + longest).clamp(max=len(tokens) - 1)  # (N, L)

    def to_chunk_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(B or 1, T, ...) as the call has them -> (N, L, ...) as the chunks have them."""
        return values.expand(*self.shape, *values.shape[2:]).flatten(0, 1)[self.order]

    def to_call_rows(self, values: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(N, L, ...) -> (B, T, ...); `rows` are all N of them, since all batch rows run the same loops."""
        return values[self.sequence, self.place].unflatten(0, self.shape)

    def row_numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Batch indices of the rows that `to_call_rows` returns."""
        return torch.arange(self.shape[0], device=rows.device)


@final
class Chunks:
    """One call of `model`, chunk by chunk.

    Args:
        model: a LoopedModel.
        call: of more tokens than `prefill_chunk`.
        cut_gradients: no gradient goes through the entries of earlier chunks.

    Raises:
        ValueError: a prepared mask; sequences packed into a batch row together with a cache, a halting rule or a loop
            count per batch row; a loss or an observer together with a halting rule.
    """

    def __init__(self, model, call: Call, cut_gradients: bool):
        mask, size = call.attention_mask, model.config.prefill_chunk
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise ValueError(
                f"prefill_chunk={size} cuts this call, which needs a (batch, tokens) attention_mask or none: "
                "give the mask of real tokens instead of a prepared one, or calls of at most prefill_chunk tokens."
            )
        begins = begins_of(call.position_ids)
        packed = mask is None and not call.counted and bool(begins[:, 1:].any())
        needs_rows = call.past_key_values is not None or call.halting is not None
        if packed and (needs_rows or not isinstance(call.num_loops, int)):
            raise ValueError(
                "position_ids start anew within a row: sequences packed into one row take use_cache=False, no halting "
                "rule and one num_loops for all. Give each a row of its own."
            )
        if call.halting is not None and call.observe is not None:
            raise ValueError(
                f"prefill_chunk={size} cuts this call, and its loss (or observe) is read at all loops: leave out the "
                "halting rule, or give calls of at most prefill_chunk tokens."
            )
        self.model, self.size, self.cut_gradients = model, size, cut_gradients
        self.cache = growing_cache(model.config) if call.past_key_values is None else call.past_key_values
        self.kept_cache = self.cache
        self.past = int(self.cache.get_seq_length())
        self.keeps_cache = call.past_key_values is not None
        real = call.embeds.new_ones(call.embeds.shape[:2], dtype=torch.bool)
        if mask is not None:
            real = mask[:, -real.shape[1] :].bool()
        self.layout = Unpacked(begins.expand(real.shape)) if packed else LeftAligned(real, padded=mask is not None)
        if self.keeps_cache and self.layout.moves and any(self.cache.is_sliding):
            # Turned batch rows may end in padding, which would push real tokens out of the window.
            self.cache = self._recording_copy(self.cache, call.most_loops)
        if mask is not None:
            mask = torch.cat([mask[:, : -real.shape[1]], self.layout.to_chunk_rows(mask[:, -real.shape[1] :])], dim=1)
        self.call = replace(
            call,
            embeds=self.layout.to_chunk_rows(call.embeds),
            attention_mask=mask,
            position_ids=self.layout.to_chunk_rows(call.position_ids),
            past_key_values=self.cache,
            read_at=self.layout.to_chunk_rows(real & self._read_at(call.halting, real.shape[1], real.device)),
        )
        self.num_tokens = self.call.embeds.shape[1]

    def _read_at(self, halting: Decision | None, num_tokens: int, device) -> torch.Tensor:
        """(T,) bool: the tokens that a halting rule reads."""
        read_at = torch.zeros(num_tokens, dtype=torch.bool, device=device)
        if halting is None:
            return read_at
        tokens = torch.arange(num_tokens, device=device).view(1, -1, 1)
        return read_at.index_fill(0, slice_logits_to_keep(tokens, halting.positions).flatten(), True)

    def run(self, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """The (B, T, D) that the head reads, and the loops run for each token (B, T)."""
        recomputes = self.model.gradient_checkpointing and self.model.training and torch.is_grad_enabled()
        learns = torch.is_grad_enabled() and not recomputes and not self.keeps_cache
        saved = SavedEntries(self.cache) if learns else None
        outputs, visits = [], []
        with layers_not_checkpointed(self.model):
            for start in range(0, self.num_tokens, self.size):
                visited = LoopStates()  # (b, C, D)
                chunk = self._chunk(start, min(start + self.size, self.num_tokens), visited)
                if recomputes:
                    outputs.append(self._run_recomputed(chunk, visited, **kwargs))
                else:
                    with nullcontext() if saved is None else saved.kept():
                        outputs.append(self.model.run_call(chunk, **kwargs))
                visits.append(visited)
                if self.cut_gradients:
                    self._cut()
                if saved is not None:
                    saved.note(chunk.embeds.shape[1])
        hidden_states, loops_used = (
            self.layout.to_call_rows(torch.cat(parts, dim=1)) for parts in zip(*outputs, strict=True)
        )
        if self.call.observe is not None:
            self._show(visits, self.call.observe)
        if self.keeps_cache and self.layout.moves:  # packed sequences have no cache that is kept
            for slot in range(len(self.cache.layers)):
                reorder_recent(readable(self.cache, slot), self.layout.inverse)
            if self.kept_cache is not self.cache:
                self.model.sharing.open(self.kept_cache, self.call.most_loops)
                self._copy_recent(self.cache, self.kept_cache, self.num_tokens)
        return hidden_states, loops_used

    def _recording_copy(self, cache: Cache, num_loops: int) -> DynamicCache:
        """A cache with the same entries, whose sliding layers keep what leaves the window as well."""
        copy = growing_cache(self.model.config)
        self.model.sharing.open(copy, num_loops)
        copy.activate_past_recording()
        if self.past:
            self._copy_recent(cache, copy, self.past)
        return copy

    def _copy_recent(self, source: Cache, target: Cache, num_tokens: int) -> None:
        """Append the last `num_tokens` tokens of one cache to another one."""
        for slot in range(len(source.layers)):
            append(readable(target, slot), *recent_entries(readable(source, slot), num_tokens), num_tokens)

    def _chunk(self, start: int, end: int, visited: LoopStates) -> Call:
        """The call of tokens `start` .. `end` - 1, whose states (b, C, D) after every loop go into `visited`."""
        mask, read_at = self.call.attention_mask, self.call.read_at[:, start:end]
        halting = self.call.halting
        if halting is not None:
            positions = read_at.any(0).nonzero().squeeze(1)
            # A chunk without a token that the rule reads runs all loops.
            halting = replace(halting, positions=positions) if len(positions) else None

        return replace(
            self.call,
            embeds=self.call.embeds[:, start:end],
            attention_mask=None if mask is None else mask[:, : self.past + end],
            position_ids=self.call.position_ids[:, start:end],
            halting=halting,
            observe=None if self.call.observe is None else visited,
            read_at=read_at,
        )

    def _run_recomputed(self, chunk: Call, visited: LoopStates, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """`run_call`, keeping no activations but what goes in and out: the backward pass runs the chunk again.

        The cache must not be written a second time then: the chunk gets a cache of its own, and the entries of its
        tokens come out.
        """
        if chunk.generator is not None:
            raise ValueError("gradient checkpointing cannot replay a generator: leave generator out.")
        filled = [layer for layer in self.cache.layers if layer.is_initialized]
        seen = int(self.cache.get_seq_length())
        past = chain.from_iterable((layer.keys, layer.values) for layer in filled)

        def run(embeds: torch.Tensor, *past: torch.Tensor):
            cache = growing_cache(self.model.config)
            self.model.sharing.open(cache, self.call.most_loops)
            if self.cache is not self.kept_cache:
                cache.activate_past_recording()
            for layer, keys, values in zip(cache.layers, past[0::2], past[1::2], strict=False):
                append(layer, keys, values, seen)
            visited.visits.clear()
            with layers_not_checkpointed(self.model):
                outputs = self.model.run_call(replace(chunk, embeds=embeds, past_key_values=cache), **kwargs)
            slots = range(len(cache.layers))
            entries = chain.from_iterable(recent_entries(readable(cache, slot), embeds.shape[1]) for slot in slots)
            # Checkpointing passes tensors one by one: first the outputs, then a state per loop, then keys and values.
            return *outputs, *(state for _, state in visited.visits), *entries

        hidden_states, loops_used, *tensors = self.model._gradient_checkpointing_func(run, chunk.embeds, *past)
        num_states = len(visited.visits)
        states, entries = tensors[:num_states], tensors[num_states:]
        visited.visits = [(rows, state) for (rows, _), state in zip(visited.visits, states, strict=True)]
        self.model.sharing.open(self.cache, self.call.most_loops)
        for layer, keys, values in zip(self.cache.layers, entries[0::2], entries[1::2], strict=True):
            append(layer, keys, values, chunk.embeds.shape[1])
        return hidden_states, loops_used

    def _cut(self) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def _show(self, chunks: list[LoopStates], observe: Observer) -> None:
        """Show the states of all chunks at once, loop by loop.

        Batch rows halt by their own loop counts here, which are the same in every chunk.
        """
        for of_loop in zip(*(visited.visits for visited in chunks), strict=True):
            rows = of_loop[0][0]
            states = self.layout.to_call_rows(torch.cat([state for _, state in of_loop], dim=1), rows)
            observe(self.layout.row_numbers(rows), states)


@contextmanager
def layers_not_checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block the layers keep their activations and their cache, which checkpointing would take from them."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
