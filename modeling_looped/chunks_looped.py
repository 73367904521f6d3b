"""Chunks: a call cut into pieces of tokens, of which later ones see the KV rows that earlier ones end with.

    for chunk in chunks of `prefill_chunk` tokens, counted from a row's first real token of the call:
        run it as a call of its own, through one cache

Sequences packed into a row, where positions begin anew, are counted from their own first token: each becomes a row.

Where a token has one KV row for all loops (`last`, `mean`, `gated`), tokens of one chunk see each other in the loop
under way and earlier chunks in their final form. How long chunks are is therefore part of what the model computes:
with `prefill_chunk=1` a whole sequence is computed as decoding would compute it. Training goes through the same
chunks, with gradients through the rows of earlier ones unless they are cut, and under gradient checkpointing whole
chunks are run again. Source: MELT (arXiv 2605.07721), chunk-wise training. Legend: B rows, T tokens, C tokens of a
chunk, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import slice_logits_to_keep

from .cache_layers_looped import append, readable, recent_entries, reorder_recent
from .calls_looped import Call, Decision, LoopStates, Observer


class LeftAligned:
    """Rows turned so that their first real token comes first: chunks then end at the same tokens as without padding.

    Args:
        real: (B, T) bool of the tokens of the call.
    """

    def __init__(self, real: torch.Tensor):
        tokens = torch.arange(real.shape[1], device=real.device)
        padding = (real.int().cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1)
        self.turned = bool((padding % real.shape[1]).any())
        self.order = (tokens + padding) % real.shape[1]  # (B, T)
        self.inverse = (tokens - padding) % real.shape[1]

    def turn(self, values: torch.Tensor) -> torch.Tensor:
        """(B or 1, T, ...) to the left."""
        return self._select(values, self.order) if self.turned else values

    def back(self, values: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, ...), or of some rows (b, T, ...), to where they were."""
        return self._select(values, self.inverse if rows is None else self.inverse[rows]) if self.turned else values

    def shown(self, rows: torch.Tensor) -> torch.Tensor:
        """The numbers of what `back` returns of some rows."""
        return rows

    def _select(self, values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        values = values.expand(len(order), *values.shape[1:])
        return values[torch.arange(len(order), device=order.device).unsqueeze(1), order]


def begins_of(position_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: where a sequence begins, which as in transformers is wherever positions do not go on."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins


class Unpacked:
    """Sequences packed into rows, each as a row of its own: N rows of L tokens, a shorter one with what follows it.

    No token of a sequence sees what follows it.

    Args:
        begins: (B, T) bool, see `begins_of`.
    """

    turned = True

    def __init__(self, begins: torch.Tensor):
        self.shape = begins.shape
        first = begins.flatten().nonzero().squeeze(1)  # (N,) among all B T tokens
        tokens = torch.arange(begins.numel(), device=begins.device)
        self.sequence = begins.flatten().cumsum(0) - 1  # (B T,)
        self.place = tokens - first[self.sequence]
        longest = torch.arange(int(self.place.max()) + 1, device=begins.device)
        self.order = (first.unsqueeze(1) + longest).clamp(max=len(tokens) - 1)  # (N, L)

    def turn(self, values: torch.Tensor) -> torch.Tensor:
        """(B or 1, T, ...) -> (N, L, ...)."""
        return values.expand(*self.shape, *values.shape[2:]).flatten(0, 1)[self.order]

    def back(self, values: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(N, L, ...) -> (B, T, ...); `rows` are all of them, since all run alike."""
        return values[self.sequence, self.place].unflatten(0, self.shape)

    def shown(self, rows: torch.Tensor) -> torch.Tensor:
        """The numbers of what `back` returns."""
        return torch.arange(self.shape[0], device=rows.device)


class Chunks:
    """One call of `model`, chunk by chunk.

    Args:
        model: a LoopedModel.
        call: of more tokens than `prefill_chunk`.
        cut_gradients: no gradient goes through the rows of earlier chunks.

    Raises:
        ValueError: a prepared mask, several sequences in a row with a cache, a halting rule or
            loops per row, or labels together with a halting rule.
    """

    def __init__(self, model, call: Call, cut_gradients: bool):
        mask, size = call.attention_mask, model.config.prefill_chunk
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            raise ValueError(
                f"prefill_chunk={size} cuts this call, which needs a (batch, tokens) attention_mask or none: "
                "give the mask of real tokens instead of a prepared one, or calls of at most prefill_chunk tokens."
            )
        begins = begins_of(call.position_ids)
        packed = mask is None and bool(begins[:, 1:].any())
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
        self.cache = DynamicCache(config=model.config) if call.past_key_values is None else call.past_key_values
        self.past = int(self.cache.get_seq_length())
        self.keeps_cache = call.past_key_values is not None
        real = call.embeds.new_ones(call.embeds.shape[:2], dtype=torch.bool)
        if mask is not None:
            real = mask[:, -real.shape[1] :].bool()
        self.rows = Unpacked(begins.expand(real.shape)) if packed else LeftAligned(real)
        if mask is not None:
            mask = torch.cat([mask[:, : -real.shape[1]], self.rows.turn(mask[:, -real.shape[1] :])], dim=1)
        self.call = replace(
            call,
            embeds=self.rows.turn(call.embeds),
            attention_mask=mask,
            position_ids=self.rows.turn(call.position_ids),
            past_key_values=self.cache,
            read_at=self.rows.turn(real & self._read_at(call.halting, real.shape[1], real.device)),
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
        outputs, visits = [], []
        with layers_not_checkpointed(self.model):
            for start in range(0, self.num_tokens, self.size):
                visited = LoopStates()  # (b, C, D)
                chunk = self._chunk(start, min(start + self.size, self.num_tokens), visited)
                if recomputes:
                    outputs.append(self._run_recomputed(chunk, visited, **kwargs))
                else:
                    outputs.append(self.model.run_call(chunk, **kwargs))
                visits.append(visited)
                if self.cut_gradients:
                    self._cut()
        hidden_states, loops_used = (self.rows.back(torch.cat(parts, dim=1)) for parts in zip(*outputs, strict=True))
        if self.call.observe is not None:
            self._show(visits, self.call.observe)
        if self.keeps_cache and self.rows.turned:
            for slot in range(len(self.cache.layers)):
                reorder_recent(readable(self.cache, slot), self.rows.inverse)
        return hidden_states, loops_used

    def _chunk(self, start: int, end: int, visited: LoopStates) -> Call:
        mask, read_at = self.call.attention_mask, self.call.read_at[:, start:end]
        positions = read_at.any(0).nonzero().squeeze(1)
        halting = None  # a chunk without a token that the rule reads runs all loops
        if self.call.halting is not None and len(positions):
            halting = replace(self.call.halting, positions=positions)

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

        The cache must not be written a second time then, so the chunk gets one of its own, and its rows come out.
        """
        if chunk.generator is not None:
            raise ValueError("gradient checkpointing cannot replay a generator: leave generator out.")
        num_slots = self.model.sharing.slots.count(self.call.most_loops)
        filled = [layer for layer in self.cache.layers if layer.is_initialized]
        past = chain.from_iterable((layer.keys, layer.values) for layer in filled)

        def run(embeds: torch.Tensor, *past: torch.Tensor):
            cache = DynamicCache()
            cache.layers = [DynamicLayer() for _ in range(num_slots)]
            self.model.sharing.open(cache, self.call.most_loops)
            for layer, keys, values in zip(cache.layers, past[0::2], past[1::2], strict=False):
                append(layer, keys, values)
            visited.visits.clear()
            with layers_not_checkpointed(self.model):
                outputs = self.model.run_call(replace(chunk, embeds=embeds, past_key_values=cache), **kwargs)
            slots = range(len(cache.layers))
            rows = chain.from_iterable(recent_entries(readable(cache, slot), embeds.shape[1]) for slot in slots)
            return *outputs, *(state for _, state in visited.visits), *rows

        hidden_states, loops_used, *rest = self.model._gradient_checkpointing_func(run, chunk.embeds, *past)
        visited.visits = [(rows, state) for (rows, _), state in zip(visited.visits, rest, strict=False)]
        rest = rest[len(visited.visits) :]
        self.model.sharing.open(self.cache, self.call.most_loops)
        for layer, keys, values in zip(self.cache.layers, rest[0::2], rest[1::2], strict=True):
            append(layer, keys, values)
        return hidden_states, loops_used

    def _cut(self) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def _show(self, chunks: list[LoopStates], observe: Observer) -> None:
        """Show the states of all chunks at once. Rows leave by their own loop counts here, the same in every chunk."""
        for of_loop in zip(*(visited.visits for visited in chunks), strict=True):
            rows = of_loop[0][0]
            states = self.rows.back(torch.cat([state for _, state in of_loop], dim=1), rows)
            observe(self.rows.shown(rows), states)


@contextmanager
def layers_not_checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the block layers keep their activations, and the cache that checkpointing would take from them."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
