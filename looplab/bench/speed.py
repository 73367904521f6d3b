"""Rows of `looped bench`: speed of updates and of decoding, and KV bytes. A row says how fast both sides are, in units
of its `unit` per second, and the ratio of their speeds."""

from statistics import median

import torch
from transformers import CompileConfig

from looplab.instruments.flops import forward_flops
from looplab.instruments.timing import compared, cpu_seconds, interleaved
from modeling_looped import LoopedConfig, LoopedForCausalLM

from .pair import Workload, build_pair, compile_layers, decoding, kv_bytes_per_token, model_sizes, training_step


def training_row(width: int, work: Workload, rounds: int, compiled: bool, peak: float) -> dict:
    """Updates of a looped model and of Llama: tokens per second. Also GFLOP/s of the looped model, and its share of
    `peak`, in GFLOP/s."""
    looped, llama = build_pair(width, work)
    if compiled:
        compile_layers(looped)
        compile_layers(llama)
    input_ids = torch.randint(1, work.vocab, (work.batch, work.tokens), generator=torch.Generator().manual_seed(0))
    pairs = interleaved(training_step(looped, input_ids), training_step(llama, input_ids), rounds)
    row = {
        "measure": "training",
        "unit": "tokens/s",
        "mode": "compiled layers" if compiled else "eager",
        "width": width,
    }
    row |= compared(pairs, input_ids.numel())
    flops = 3 * forward_flops(looped.config, work.batch, work.tokens, work.loops)
    gflops = flops / median(ours for ours, _ in pairs) / 1e9
    return row | {"batch": work.batch, "tokens": work.tokens, "gflops": gflops, "of_peak": gflops / peak}


def hyper_row(width: int, work: Workload, rounds: int, compiled: bool) -> dict:
    """Updates of Hyperloop (arXiv 2604.21254) and of the plain loop with the same layers: tokens per second.

    Both have 1 layer, then `work.layers` layers looped 3 times, then 1 layer.
    """
    sections = {"num_prelude_layers": 1, "num_core_layers": work.layers, "num_coda_layers": 1, "num_loops": 3}
    sizes = model_sizes(width, work) | sections
    plain = LoopedForCausalLM(LoopedConfig(**sizes))
    hyper = LoopedForCausalLM(LoopedConfig(**sizes, loop_connection="hyper", loop_embedding="learned"))
    if compiled:
        compile_layers(hyper)
        compile_layers(plain)
    input_ids = torch.randint(1, work.vocab, (work.batch, work.tokens), generator=torch.Generator().manual_seed(0))
    pairs = interleaved(training_step(hyper, input_ids), training_step(plain, input_ids), rounds)
    row = {"measure": "hyper", "unit": "tokens/s", "mode": "compiled" if compiled else "eager", "width": width}
    row |= compared(pairs, input_ids.numel(), ("hyper", "plain"))
    return row | {"batch": work.batch, "tokens": work.tokens}


def decode_row(width: int, work: Workload, rounds: int, compiled: bool) -> dict:
    """Greedy decoding by a looped model and by Llama at batch 1: new tokens per second of processor time."""
    looped, llama = build_pair(width, work)
    cache = {}
    if compiled:
        torch.compiler.reset()
        step = CompileConfig(mode="default", fullgraph=True, dynamic=False)
        step._compile_all_devices = True  # a Llama's is compiled on accelerators only, unless told
        cache = {"cache_implementation": "static", "compile_config": step}
    prompt = torch.randint(1, work.vocab, (1, work.prompt), generator=torch.Generator().manual_seed(0))
    both = (decoding(model, prompt, work.new_tokens, **cache) for model in (looped, llama))
    pairs = interleaved(*both, rounds, timed=cpu_seconds)
    mode = "compiled, static cache" if compiled else "eager"
    row = {"measure": "decode", "unit": "tokens/s", "mode": mode, "width": width}
    return row | compared(pairs, work.new_tokens) | {"batch": 1, "tokens": work.new_tokens}


def kv_row(width: int, work: Workload, kv_sharing: str) -> dict:
    """Bytes per token in the KV caches of a looped model and of Llama, and their ratio; nothing is timed."""
    looped, llama = (kv_bytes_per_token(model, work.tokens) for model in build_pair(width, work, kv_sharing))
    row = {"measure": "kv_bytes", "unit": "bytes/token", "mode": kv_sharing, "width": width}
    return row | {"looped": looped, "llama": llama, "ratio": looped / llama, "tokens": work.tokens}
