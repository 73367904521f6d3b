"""`looped bench --contexts`: what each KV policy costs in decoding at long contexts and in training with chunks.

    context   one decoded token after N cached tokens, new tokens/s and KV bytes per token, for each kv_sharing and
              loop count, against a Llama of the unrolled depth; batch 1. Both have the cache of transformers
              ("dynamic"), which copies all entries in every layer call, or the one that grows by doubling ("growing")
    chunks    an update with kv_sharing="gated" at each `prefill_chunk`, tokens/s, against kv_sharing="per_loop"

Weights and cached entries are random. Models are timed in turn, as in `bench.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from looplab.instruments.timing import compared, interleaved, ratio_text
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.growing_looped import growing_cache

from .pair import Workload, build_pair, kv_bytes_per_token, model_sizes, training_step

CACHES = {"dynamic": lambda config: DynamicCache(config=config), "growing": growing_cache}


def filled_cache(model: PreTrainedModel, tokens: int, kind: str = "growing", rows: int = 1) -> DynamicCache:
    """A cache with the layers that the model's KV policy uses, each with random entries of `tokens` tokens.

    Args:
        kind: one of CACHES.
        rows: batch rows.
    """
    cache = CACHES[kind](model.config)
    cache.activate_past_recording()  # `step_at` crops after every token
    model(torch.ones(rows, 1, dtype=torch.long), **{CACHE_NAME: cache})  # the call puts in the layers of the policy
    draw = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        shape = (*layer.keys.shape[:2], tokens, layer.keys.shape[-1])
        layer.keys, layer.values = (torch.randn(shape, generator=draw) for _ in range(2))
    return cache


def step_at(
    model: PreTrainedModel, context: int, steps: int, kind: str = "growing", rows: int = 1, **call
) -> Callable[[], None]:
    """A call that decodes `steps` tokens, each after `context` cached tokens: the new entry is cropped each time.

    Args:
        rows: batch rows, see `filled_cache`.
        call: arguments of the model's forward.
    """
    model.eval()
    with torch.inference_mode():
        cache = filled_cache(model, context, kind, rows)
    token = torch.ones(rows, 1, dtype=torch.long)

    @torch.inference_mode()
    def decode() -> None:
        for _ in range(steps):
            model(token, **{CACHE_NAME: cache}, logits_to_keep=1, **call)
            cache.crop(-1)

    return decode


def context_row(
    width: int, work: Workload, rounds: int, kv_sharing: str, loops: int, context: int, kind: str = "growing"
) -> dict:
    """Decoding after `context` cached tokens at batch 1: new tokens per second of the looped model and of Llama, the
    ratio, and the KV bytes per token of both, whose caches are of the same `kind` (one of CACHES)."""
    work = replace(work, loops=loops)
    looped, llama = build_pair(width, work, kv_sharing)
    pairs = interleaved(*(step_at(model, context, work.steps, kind) for model in (looped, llama)), rounds)
    row = {"measure": "context", "unit": "tokens/s", "mode": kv_sharing, "width": width, "row_loops": loops}
    row |= compared(pairs, work.steps) | {"context": context, "cache": kind}
    bytes_of = [kv_bytes_per_token(model, 4) for model in (looped, llama)]
    return row | {"kv_bytes": bytes_of[0], "llama_kv_bytes": bytes_of[1]}


def chunk_row(width: int, work: Workload, rounds: int, chunk: int) -> dict:
    """An update of MELT's gated KV in chunks of `chunk` tokens: tokens per second, also of per_loop, and the ratio.

    The model has `work.layers` layers with sandwich norms; a batch row is 16 times `work.tokens` long.
    """
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
) -> list[Callable[[], dict]]:
    """The measurements of this module, each a call that returns its row."""
    plan = [
        partial(context_row, width, work, rounds, kv_sharing, count, context, kind)
        for width in widths
        for context in contexts
        for count in loops
        for kv_sharing in SHARINGS
        for kind in CACHES
    ]
    return plan + [partial(chunk_row, width, work, rounds, chunk) for width in widths for chunk in work.chunks]


def context_lines(rows: Sequence[dict]) -> list[str]:
    """The rows of this module as text."""
    contexts = [row for row in rows if row["measure"] == "context"]
    text = []
    if contexts:
        text.append("\ndecoding one token after a context, against a Llama of the unrolled depth")
        text.append(
            f"{'kv_sharing':<11}{'cache':<8}{'loops':>6}{'context':>9}{'width':>7}{'KV bytes':>10}{'looped':>9}"
            f"{'Llama':>9}  ratio"
        )
    for row in contexts:
        text.append(
            f"{row['mode']:<11}{row['cache']:<8}{row['row_loops']:>6}{row['context']:>9}{row['width']:>7}"
            f"{row['kv_bytes']:>10.0f}{row['looped']:>9.1f}{row['llama']:>9.1f}  {ratio_text(row)} {row['unit']}"
        )
    chunks = [row for row in rows if row["measure"] == "chunks"]
    if chunks:
        text.append("\ngated KV trained in chunks, against a KV slot per loop")
    for row in chunks:
        text.append(
            f"{row['mode']:<11}{row['tokens']:>6} tokens{row['width']:>7} wide{row['gated']:>10.0f}"
            f"{row['per_loop']:>10.0f}  {ratio_text(row)} {row['unit']}"
        )
    return text
