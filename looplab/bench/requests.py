"""`looped bench --requests`: what it saves that every request runs at its own depth. CPU time, interleaved pairs.

    requests   chains of 1 to 16 hops, one answer each, on a trained run: `generate_each` with a loop count of each (as
               many as it has hops) or a halting rule, against the smallest loop count for all that answers no worse:
               by `generate` in batches, and by `generate_each`
    exits      with --contexts: one decoded token of 16 rows at loop counts 1 to 8, two of each, against 8 loops for
               all, on random models. The counts are known, the deepest first; or a rule finds them after each loop,
               other ones for every token. Rules read nothing, the state, or the head, as `FixedRule`, `LatentRule`
               and `KLEntropyRule` do

`ideal` is what could be saved: loops times tokens of the one side over those of the other.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch

from looplab.instruments.timing import compared, cpu_seconds, interleaved, ratio_text
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.tasks.registry import task_for
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.halting_looped import FixedRule, KLEntropyRule, LatentRule, Rule

from .contexts import step_at
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


@final
class DrawnExits(Rule):
    """Reads what another rule reads, and halts batch rows at the loop counts EXITS, in a new order for every token."""

    def __init__(self, reads: Rule):
        self.reads, self.draw = reads, random.Random(0)

    def step(self, memory, state, readout):
        if len(state) == len(EXITS):  # the first loop of a token
            self.left = self.draw.sample(EXITS, len(EXITS))
        memory, _ = self.reads.step(memory, state, readout)
        self.left = [count - 1 for count in self.left]
        done = torch.tensor(self.left) == 0
        self.left = [count for count in self.left if count]
        return memory, done.unsqueeze(1)


EXIT_CALLS: dict[str, Callable[[], dict]] = {
    "known": lambda: {"num_loops": torch.tensor(EXITS)},
    "unread": lambda: {"halting": DrawnExits(FixedRule())},
    "latent": lambda: {"halting": DrawnExits(LatentRule())},
    "kl_entropy": lambda: {"halting": DrawnExits(KLEntropyRule())},
}


def exit_row(width: int, work: Workload, rounds: int, context: int, mode: str) -> dict:
    """A decoded token of 16 rows at the loop counts EXITS after `context` tokens, against as many loops for all.

    mode: one of EXIT_CALLS.
    """
    sizes = model_sizes(width, work) | {"num_core_layers": work.layers, "num_loops": EXITS[0]}
    model = LoopedForCausalLM(LoopedConfig(**sizes))
    sides = (step_at(model, context, work.steps, rows=len(EXITS), **call) for call in (EXIT_CALLS[mode](), {}))
    pairs = interleaved(*sides, rounds, timed=cpu_seconds)
    row = {"measure": "exits", "unit": "steps/s of CPU time", "mode": mode, "width": width, "context": context}
    ideal = len(EXITS) * EXITS[0] / sum(EXITS)
    return row | {"ideal": ideal} | compared(pairs, work.steps, ("exits", "all loops"))


def exit_plan(widths: Sequence[int], work: Workload, rounds: int, contexts: Sequence[int]) -> list[Callable[[], dict]]:
    """The measurements of exits, each a call that returns its row."""
    return [
        partial(exit_row, width, work, rounds, context, mode)
        for width in widths
        for context in contexts
        for mode in EXIT_CALLS
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
        text.append("\na decoded token of 16 rows at 1 to 8 loops, against 8 loops for all; CPU time")
        text.append(f"{'counts':<11}{'width':>7}{'context':>9}   ratio of tokens/s, ideal")
    for row in exits:
        text.append(f"{row['mode']:<11}{row['width']:>7}{row['context']:>9}   {ratio_text(row)}, {row['ideal']:.2f}")
    return text
