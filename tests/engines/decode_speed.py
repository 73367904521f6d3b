"""Tokens per second of one looped model in llama.cpp, mlx-lm and transformers, by turns in one process and thread.

`make bench-engines` starts it. In every round each engine writes the same number of tokens after the same prompt,
greedily, at batch 1. Speeds are by the CPU time of the process, so that other work of the machine counts less. A ratio
is to transformers eager in the same round: the median of the rounds, and their range.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import llama_cpp
import mlx.core as mx
import mlx_lm
import torch
from mlx_lm.generate import generate_step

from data_builders.tokenizers import hop_tokenizer
from looplab.bench.pair import Workload, model_sizes
from looplab.export.exporting import export
from looplab.instruments.timing import machine
from modeling_looped import LoopedConfig, LoopedForCausalLM

EAGER = "transformers eager"
Decode = Callable[[], list[int]]


def in_transformers(model: LoopedForCausalLM, ids: torch.Tensor, new_tokens: int, **cache) -> Decode:
    settings = {"max_new_tokens": new_tokens, "do_sample": False, **cache}

    def decode() -> list[int]:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()

    return decode


def in_llama_cpp(path: Path, ids: list[int], new_tokens: int) -> Decode:
    f32 = llama_cpp.GGML_TYPE_F32
    threads = {"n_threads": 1, "n_threads_batch": 1}
    llama = llama_cpp.Llama(str(path), n_ctx=256, type_k=f32, type_v=f32, flash_attn=False, verbose=False, **threads)

    def decode() -> list[int]:
        llama.reset()
        return [token for _, token in zip(range(new_tokens), llama.generate(ids, temp=0.0), strict=False)]

    return decode


def in_mlx(path: Path, ids: list[int], new_tokens: int) -> Decode:
    model, _ = mlx_lm.load(str(path))

    def decode() -> list[int]:
        return [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=new_tokens)]

    return decode


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--loops", type=int, default=8)
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=7)
    asked = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = model_sizes(asked.width, Workload()) | {"initializer_range": 0.05}
    model = LoopedForCausalLM(LoopedConfig(**sizes, num_core_layers=asked.layers, num_loops=asked.loops)).eval()
    prompt = torch.randint(1, model.config.vocab_size, (1, 16))
    ids = prompt[0].tolist()
    tokenizer = hop_tokenizer(40, 7)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, dynamic=False)
    with tempfile.TemporaryDirectory() as folder:
        f32 = export(model, tokenizer, Path(folder, "f32.gguf"), "gguf").path
        q8_0 = export(model, tokenizer, Path(folder, "q8_0.gguf"), "gguf", "q8_0").path
        mlx = export(model, tokenizer, Path(folder, "mlx"), "mlx").path
        engines = {
            EAGER: in_transformers(model, prompt, asked.new_tokens),
            "transformers compiled, static cache": in_transformers(
                compiled, prompt, asked.new_tokens, cache_implementation="static"
            ),
            "llama.cpp f32": in_llama_cpp(f32, ids, asked.new_tokens),
            "llama.cpp q8_0": in_llama_cpp(q8_0, ids, asked.new_tokens),
            "mlx-lm f32": in_mlx(mlx, ids, asked.new_tokens),
        }
        said = {name: decode() for name, decode in engines.items()}  # compiles, too
    seconds = {name: [] for name in engines}
    for _ in range(asked.rounds):
        for name, decode in engines.items():
            start = time.process_time()
            decode()
            seconds[name].append(time.process_time() - start)
    facts = machine()
    print(
        f"{facts['machine']}, torch {facts['torch']}, transformers {facts['transformers']}, llama-cpp-python "
        f"{llama_cpp.__version__}, mlx-lm {mlx_lm.__version__}; {asked.width} wide, {asked.layers} layers x "
        f"{asked.loops} loops, {asked.new_tokens} tokens after {len(ids)}, {asked.rounds} rounds"
    )
    print("| engine | tokens/s of CPU time | times transformers eager | same tokens |\n|---|---|---|---|")
    for name, spent in seconds.items():
        ratios = [eager / own for eager, own in zip(seconds[EAGER], spent, strict=True)]
        same = sum(a == b for a, b in zip(said[name], said[EAGER], strict=True))
        print(
            f"| {name} | {asked.new_tokens / median(spent):.0f} | {median(ratios):.2f} ({min(ratios):.2f} - "
            f"{max(ratios):.2f}) | {same} of {asked.new_tokens} |"
        )


if __name__ == "__main__":
    main()
