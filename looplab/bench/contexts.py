"""Benchmark of KV memories: decoding at long contexts, and training in chunks.

    context   one decoding step after so many cached tokens (random rows), tokens/s, and KV bytes per token, for each
              kv_sharing and loop count, against a Llama as deep as the loops unrolled; batch 1, dynamic caches
    chunks    training step of kv_sharing="gated" at each chunk length, tokens/s, against a row per loop

Weights are random; rows and pairs are those of `bench.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from looplab.instruments.timing import compared, interleaved, ratio_text
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.cache_looped import SHARINGS

from .pair import Workload, build_pair, kv_bytes_per_token, model_sizes, training_step


def filled_cache(model: PreTrainedModel, tokens: int) -> DynamicCache:
    """The model's own cache, every slot of it filled with random rows of `tokens` tokens."""
    cache = DynamicCache(config=model.config)
    model(torch.ones(1, 1, dtype=torch.long), **{CACHE_NAME: cache})  # puts the layers of its policy in
    draw = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        shape = (*layer.keys.shape[:2], tokens, layer.keys.shape[-1])
        layer.keys, layer.values = (torch.randn(shape, generator=draw) for _ in range(2))
    return cache


def step_at(model: PreTrainedModel, context: int, steps: int) -> Callable[[], None]:
    """Decode `steps` tokens, each after `context` cached ones: what a step adds is cropped again."""
    model.eval()
    with torch.inference_mode():
        cache = filled_cache(model, context)
    token = torch.ones(1, 1, dtype=torch.long)

    @torch.inference_mode()
    def decode() -> None:
        for _ in range(steps):
            model(token, **{CACHE_NAME: cache}, logits_to_keep=1)
            cache.crop(-1)

    return decode


def context_row(width: int, work: Workload, rounds: int, kv_sharing: str, loops: int, context: int) -> dict:
    work = replace(work, loops=loops)
    looped, llama = build_pair(width, work, kv_sharing)
    pairs = interleaved(*(step_at(model, context, work.steps) for model in (looped, llama)), rounds)
    row = {"measure": "context", "unit": "tokens/s", "mode": kv_sharing, "width": width, "row_loops": loops}
    row |= compared(pairs, work.steps) | {"context": context}
    bytes_of = [kv_bytes_per_token(model, 4) for model in (looped, llama)]
    return row | {"kv_bytes": bytes_of[0], "llama_kv_bytes": bytes_of[1]}


def chunk_row(width: int, work: Workload, rounds: int, chunk: int) -> dict:
    """`work.layers` x `work.loops` sandwich layers on rows of 16 `work.tokens` tokens."""
    tokens, rows = 16 * work.tokens, max(1, work.batch // 8)
    sizes = model_sizes(width, work) | {"num_core_layers": work.layers, "num_loops": work.loops}
    sizes |= {"norm_placement": "sandwich", "norm_between_loops": True}
    gated = LoopedForCausalLM(LoopedConfig(**sizes, kv_sharing="gated", prefill_chunk=chunk))
    per_loop = LoopedForCausalLM(LoopedConfig(**sizes))
    input_ids = torch.randint(1, work.vocab, (rows, tokens), generator=torch.Generator().manual_seed(0))
    pairs = interleaved(training_step(gated, input_ids), training_step(per_loop, input_ids), rounds, warmup=1)
    row = {"measure": "chunks", "unit": "tokens/s", "mode": f"chunk {chunk}", "width": width}
    return row | compared(pairs, input_ids.numel(), ("gated", "per_loop")) | {"batch": rows, "tokens": tokens}


def memory_plan(
    widths: Sequence[int], work: Workload, rounds: int, contexts: Sequence[int], loops: Sequence[int]
) -> list[Callable[[], list[dict]]]:
    """Measurements for `bench.bench`."""
    plan = [
        lambda w=w, s=s, r=r, c=c: [context_row(w, work, rounds, s, r, c)]
        for w in widths
        for c in contexts
        for r in loops
        for s in SHARINGS
    ]
    return plan + [lambda w=w, c=c: [chunk_row(w, work, rounds, c)] for w in widths for c in work.chunks]


def context_lines(rows: Sequence[dict]) -> list[str]:
    """The rows of this module as text."""
    contexts = [row for row in rows if row["measure"] == "context"]
    text = []
    if contexts:
        text += ["\ndecoding one token after a context, against a Llama as deep as the loops unrolled"]
        text += [
            f"{'kv_sharing':<11}{'loops':>6}{'context':>9}{'width':>7}{'KV bytes':>10}{'looped':>9}{'Llama':>9}  ratio"
        ]
    for row in contexts:
        text.append(
            f"{row['mode']:<11}{row['row_loops']:>6}{row['context']:>9}{row['width']:>7}{row['kv_bytes']:>10.0f}"
            f"{row['looped']:>9.1f}{row['llama']:>9.1f}  {ratio_text(row)} {row['unit']}"
        )
    chunks = [row for row in rows if row["measure"] == "chunks"]
    if chunks:
        text.append("\ngated KV trained in chunks, against a KV row per loop")
    for row in chunks:
        text.append(
            f"{row['mode']:<11}{row['tokens']:>6} tokens{row['width']:>7} wide{row['gated']:>10.0f}"
            f"{row['per_loop']:>10.0f}  {ratio_text(row)} {row['unit']}"
        )
    return text
