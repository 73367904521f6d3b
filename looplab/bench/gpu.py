"""`benchmarks/gpu.sh`: what a looped model does on one GPU, in at most ten minutes; one table.

    training   updates of a model of 135 million parameters in bfloat16, layers compiled, tokens/s
    decode     greedy `generate`, new tokens/s of all batch rows, at every batch size and loop count
    compiled   the same with a static cache, whose step transformers compiles, at batch 1
    halting    a loop count for every batch row, uniform from 1 to 8, against all loops and against its mean

The reference is what was reported of training LoopLM-135M on one H100. Weights and tokens are random.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from looplab.instruments.timing import machine
from looplab.runs.writing import write_whole
from modeling_looped import LoopedConfig, LoopedForCausalLM

from .pair import compile_layers

REFERENCE = 212_000  # tokens/s of training, LoopLM-135M on one H100
UNMEASURED = None  # of a row for which no time was left


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, which are SmolLM2-135M's, and of the work."""

    vocab: int = 49152
    width: int = 576
    mlp: int = 1536
    heads: int = 9
    kv_heads: int = 3
    layers: int = 30
    loops: int = 4
    batch: int = 8  # batch rows of an update
    tokens: int = 1024  # length of a batch row
    prompt: int = 64
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 16, 64)
    depths: tuple[int, ...] = (1, 4, 8)
    repeats: int = 5
    minutes: float = 9.5


TINY = Sizes(
    vocab=64, width=32, mlp=48, heads=2, kv_heads=1, layers=1, loops=2, batch=2, tokens=8, prompt=4, new_tokens=3,
    batches=(1, 2), depths=(1, 2), repeats=1,
)  # fmt: skip


def build(sizes: Sizes, device: torch.device) -> LoopedForCausalLM:
    """The model, with random weights in float32."""
    config = LoopedConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_core_layers=sizes.layers,
        num_loops=sizes.loops,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LoopedForCausalLM(config).to(device)


def per_second(action: Callable[[], None], amount: int, repeats: int, device: torch.device) -> float:
    """`amount` per second of one call of `action`: the median of `repeats`, after one that is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return amount / sorted(seconds[1:])[repeats // 2]


def training(sizes: Sizes, device: torch.device) -> float:
    """Tokens per second of an update: forward, backward, fused AdamW; matrix products in bfloat16."""
    model = build(sizes, device).train()
    if device.type != "cpu":
        compile_layers(model)
    ids = torch.randint(1, sizes.vocab, (sizes.batch, sizes.tokens), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def update() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return per_second(update, ids.numel(), sizes.repeats, device)


def decoding(model: LoopedForCausalLM, sizes: Sizes, batch: int, num_loops: int | torch.Tensor, **settings) -> float:
    """New tokens per second of greedy `generate`, of all batch rows together."""
    ids = torch.randint(1, sizes.vocab, (batch, sizes.prompt), device=model.device)
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": sizes.new_tokens}
    generate = partial(model.generate, ids, num_loops=num_loops, **call, **settings)
    return per_second(generate, batch * sizes.new_tokens, sizes.repeats, model.device)


def measurements(sizes: Sizes, device: torch.device) -> Iterator[tuple[dict, Callable[[], float]]]:
    """Every row without its number, and the call that measures it."""
    row = {"measure": "training", "batch": sizes.batch, "loops": str(sizes.loops)}
    yield row | {"reference": REFERENCE}, partial(training, sizes, device)
    model = build(sizes, device).eval().to(torch.bfloat16)
    for batch in sizes.batches:
        for loops in sizes.depths:
            row = {"measure": "decode", "batch": batch, "loops": str(loops)}
            yield row, partial(decoding, model, sizes, batch, loops)
    batch, most = sizes.batches[-2], sizes.depths[-1]
    uniform = torch.arange(batch, device=device) % most + 1
    mean = round(float(uniform.float().mean()))
    for name, loops in ((f"1 - {most}", uniform), (f"all {most}", most), (f"mean {mean}", mean)):
        yield {"measure": "halting", "batch": batch, "loops": name}, partial(decoding, model, sizes, batch, loops)
    for loops in sizes.depths[:2]:  # last: compiling takes longest
        call = partial(decoding, model, sizes, 1, loops, cache_implementation="static")
        yield {"measure": "compiled", "batch": 1, "loops": str(loops)}, call


def measure(sizes: Sizes, device: torch.device) -> list[dict]:
    """The rows; after `minutes` those that are left have no number."""
    end = time.monotonic() + 60 * sizes.minutes
    return [
        row | {"tokens_per_second": call() if time.monotonic() < end else UNMEASURED}
        for row, call in measurements(sizes, device)
    ]


def table(rows: list[dict], name: str) -> str:
    """The rows as text."""
    lines = [
        f"{name}; bfloat16; tokens per second",
        f"{'':<10}{'batch':>6}{'loops':>9}{'tokens/s':>12}{'reference':>11}",
    ]
    for row in rows:
        speed = "-" if row["tokens_per_second"] is UNMEASURED else f"{row['tokens_per_second']:,.0f}"
        reference = f"{row['reference']:,}" if "reference" in row else ""
        lines.append(f"{row['measure']:<10}{row['batch']:>6}{row['loops']:>9}{speed:>12}{reference:>11}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="what a looped model does on one GPU, in at most ten minutes")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU; the numbers mean nothing")
    parser.add_argument("--output", default="runs/gpu", metavar="FOLDER", help="of gpu.jsonl")
    asked = parser.parse_args(arguments)
    device = torch.device("cpu") if asked.tiny else torch.accelerator.current_accelerator()
    if device is None:
        parser.error("torch finds no accelerator on this machine: run it where there is one, or give --tiny.")
    name = "CPU" if asked.tiny else f"{device.type} {torch.cuda.get_device_name() if device.type == 'cuda' else ''}"
    rows = measure(TINY if asked.tiny else Sizes(), device)
    facts = machine() | {"device": name.strip()}
    write_whole(Path(asked.output) / "gpu.jsonl", "".join(json.dumps(facts | row) + "\n" for row in rows))
    print(table(rows, name.strip()))


if __name__ == "__main__":
    main()
