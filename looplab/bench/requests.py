"""`looped bench --requests`: what it saves that every request runs at its own depth. CPU time, interleaved pairs.

    requests   chains of 1 to 16 hops, one answer each, on a trained run: `generate_each` with a loop count of each (as
               many as it has hops) or a halting rule, against the smallest loop count for all that answers no worse:
               by `generate` in batches, and by `generate_each`
    exits      with --contexts: one decoded token of 16 rows at loop counts 1 to 8, two of each, against 8 loops for
               all and against the same counts in an order in which rows are gathered; random models

`ideal` is what could be saved: loops times tokens of the one side over those of the other.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from looplab.instruments.timing import compared, cpu_seconds, interleaved, ratio_text
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.tasks.registry import task_for
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_layers_looped import CACHE_NAME

from .contexts import CACHES
from .pair import Workload, model_sizes

MOST_HOPS = 16
RULE = {"rule": "kl_entropy", "kl_threshold": 0.1, "max_entropy": 1.15}
EXITS = [8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]  # loop counts of the rows, mean 4.5


def request_rows(run: Run, work: Workload, rounds: int, at_once: Sequence[int]) -> list[dict]:
    """Requests per second at their own depth and at one count for all, for so many rows at once."""
    model, tokenizer = load_run_model(run)
    model.eval()
    chains = task_for("bench", [run]).chains(run, tokenizer, work.rows_per_hop, MOST_HOPS)
    order = torch.randperm(len(chains), generator=torch.Generator().manual_seed(0)).tolist()
    chains = [chains[index] for index in order]  # hop counts are mixed
    prompts, hops, gold = (list(each) for each in zip(*chains, strict=True))
    common = {"max_new_tokens": 1, "do_sample": False}

    def each(rows: int, depths: Sequence[dict]) -> list:
        asked = [{"input_ids": ids} | depth for ids, depth in zip(prompts, depths, strict=True)]
        return model.generate_each(asked, max_rows=rows, **common)

    def batches(rows: int, loops: int) -> None:
        for start in range(0, len(prompts), rows):
            padded = tokenizer.pad(
                {"input_ids": prompts[start : start + rows]}, padding_side="left", return_tensors="pt"
            )
            model.generate(**padded, num_loops=loops, **common)

    def right(requests: list) -> float:
        return sum(request.tokens == [answer] for request, answer in zip(requests, gold, strict=True)) / len(gold)

    depths = {
        "by length": [{"num_loops": count} for count in hops],
        "by rule": [{"num_loops": 2 * MOST_HOPS, "halting": RULE}] * len(hops),
    }
    found = {mode: each(max(at_once), depth) for mode, depth in depths.items()}
    wanted = min(right(requests) for requests in found.values())
    fixed = next(
        count
        for count in range(1, 4 * MOST_HOPS)
        if right(each(max(at_once), [{"num_loops": count}] * len(hops))) >= wanted
    )
    results = []
    for rows in at_once:
        for mode, depth in depths.items():
            work_done = sum(len(ids) * request.loops for ids, request in zip(prompts, found[mode], strict=True))
            for against, other in (
                ("generate", partial(batches, rows, fixed)),
                ("generate_each", partial(each, rows, [{"num_loops": fixed}] * len(hops))),
            ):
                pairs = interleaved(partial(each, rows, depth), other, rounds, warmup=1, timed=cpu_seconds)
                row = {"measure": "requests", "unit": "requests/s of CPU time", "mode": mode, "against": against}
                row |= {"run": run.name, "rows_at_once": rows, "requests": len(hops), "fixed_loops": fixed}
                row |= {"loops": sum(request.loops for request in found[mode]) / len(hops)}
                row |= {"accuracy": right(found[mode]), "ideal": fixed * sum(map(len, prompts)) / work_done}
                results.append(row | compared(pairs, len(hops), ("own depth", "fixed")))
    return results


def exit_row(width: int, work: Workload, rounds: int, context: int, mode: str) -> dict:
    """A decoded token of 16 rows at the loop counts EXITS after `context` tokens, against `mode`: "all loops", or
    "gathered", the same counts in the opposite order."""
    sizes = model_sizes(width, work) | {"num_core_layers": work.layers, "num_loops": EXITS[0]}
    model = LoopedForCausalLM(LoopedConfig(**sizes)).eval()
    counts = torch.tensor(EXITS)
    others: dict[str, Any] = {"all loops": EXITS[0], "gathered": counts.flip(0)}

    @torch.inference_mode()
    def cached():
        cache = CACHES["growing"](model.config)
        token = torch.ones(len(EXITS), 1, dtype=torch.long)
        model(token, **{CACHE_NAME: cache})
        draw = torch.Generator().manual_seed(0)
        for layer in cache.layers:
            layer.most = context + 8
            shape = (*layer.keys.shape[:2], context, layer.keys.shape[-1])
            layer.keys, layer.values = (torch.randn(shape, generator=draw) for _ in range(2))
        cache.activate_past_recording()
        return cache, token

    cache, token = cached()

    def step(num_loops) -> Callable[[], None]:
        @torch.inference_mode()
        def decode() -> None:
            for _ in range(work.steps):
                model(token, **{CACHE_NAME: cache}, num_loops=num_loops, logits_to_keep=1)
                cache.crop(-1)

        return decode

    pairs = interleaved(step(counts), step(others[mode]), rounds, timed=cpu_seconds)
    row = {"measure": "exits", "unit": "steps/s of CPU time", "mode": mode, "width": width, "context": context}
    ideal = len(EXITS) * EXITS[0] / sum(EXITS) if mode == "all loops" else 1.0
    return row | {"ideal": ideal} | compared(pairs, work.steps, ("view", mode))


def exit_plan(widths: Sequence[int], work: Workload, rounds: int, contexts: Sequence[int]) -> list[Callable[[], dict]]:
    """The measurements of exits, each a call that returns its row."""
    modes = ("all loops", "gathered")
    return [
        partial(exit_row, width, work, rounds, context, mode)
        for width in widths
        for context in contexts
        for mode in modes
    ]


def request_lines(rows: Sequence[dict]) -> list[str]:
    """The rows of this module as text."""
    text = []
    requests = [row for row in rows if row["measure"] == "requests"]
    if requests:
        text.append("\nrequests at their own depth, against one loop count for all that answers no worse; CPU time")
        columns = f"{'depth':<11}{'at once':>8}{'loops':>7}{'right':>9}  {'against':<15}{'loops':>6}"
        text.append(f"{columns}   ratio of requests/s, ideal")
    for row in requests:
        text.append(
            f"{row['mode']:<11}{row['rows_at_once']:>8}{row['loops']:>7.1f}{100 * row['accuracy']:>7.1f} %  "
            f"{row['against']:<15}{row['fixed_loops']:>6}   {ratio_text(row)}, {row['ideal']:.2f}"
        )
    exits = [row for row in rows if row["measure"] == "exits"]
    if exits:
        text.append("\na decoded token of 16 rows at 1 to 8 loops, read as views of the cache; CPU time")
        text.append(f"{'against':<11}{'width':>7}{'context':>9}   ratio of tokens/s, ideal")
    for row in exits:
        text.append(f"{row['mode']:<11}{row['width']:>7}{row['context']:>9}   {ratio_text(row)}, {row['ideal']:.2f}")
    return text
