"""`python -m looplab.planning.page` writes docs/results/plans.md: what the published models would take.

A page is a function of the recipes and of the code, so that a test writes it again and compares.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from looplab.instruments.devices import DEVICES
from looplab.runs.writing import write_whole
from looplab.shipped import find_recipe, shipped
from looplab.training.recipe import read_recipe

from .memory import WAYS
from .plan import Plan, Setup, make_plan
from .told import short

PAGE = "results/plans.md"
REPORTED = 212_000  # tokens/s of training, LoopLM-135M on one H100
LOOPLM = "lm/looped_135m"
# Recipe -> GPU and number of them.
LANGUAGE = {
    LOOPLM: ("h100", 8),
    "ouro/ouro_1_4b": ("h100", 64),
    "ouro/ouro_2_6b": ("h100", 64),
    "hyperloop/paper/transformer_16l": ("h100", 8),
    "hyperloop/paper/looped_16l": ("h100", 8),
    "hyperloop/paper/hyperloop_16l": ("h100", 8),
    "hyperloop/paper/hyperloop_18l": ("h100", 32),
    "hyperloop/paper/hyperloop_38l": ("h100", 32),
}
HOPS = {name: ("h100", 1) for name in ("paper/composition_r4", "paper/composition_l8", "paper/khop_dynamic")}
COLUMNS = (
    "recipe", "GPUs", "parameters", "loops", "GFLOP per token", "tokens", "weights", "gradients", "optimizer",
    "activations", "without recomputing", "sent", "binds", "hours", "smallest",
)  # fmt: skip


@cache
def plan_named(name: str, gpu: str, count: int) -> Plan:
    """The plan of one line."""
    return make_plan(read_recipe(find_recipe(name)), Setup(DEVICES[gpu], count))


def cells(name: str, gpu: str, count: int) -> list[str]:
    """One line of a table: what DDP and FSDP2 need where they differ."""
    plan = plan_named(name, gpu, count)
    processes = [plan.process(way, count) for way in WAYS]

    def gigabytes(values: Sequence[int]) -> str:
        shown = [f"{value / 1e9:.3g}" for value in values]
        return " / ".join(dict.fromkeys(shown))

    def of(*names: str) -> str:
        return gigabytes([sum(process.held[name] for name in names) for process in processes])

    kept = [plan.process("DDP", count, recomputed=recomputed).held for recomputed in (True, False)]
    activations = [held["activations"] + held["logits"] for held in kept]
    if not plan.recipe.gradient_checkpointing:
        activations = activations[::-1]
    found = plan.smallest()
    return [
        f"`{name}`",
        f"{count} {plan.setup.device.name}",
        f"{plan.weights.all:,}",
        f"{plan.expected_loops:.3g}",
        f"{plan.flops() / plan.tokens / 1e9:.3g}",
        short(plan.tokens * plan.updates),
        of("weights", "casts"),
        of("gradients"),
        of("optimizer"),
        gigabytes(activations[:1]),
        gigabytes(activations[1:]) if plan.recipe.gradient_checkpointing else "-",
        gigabytes([process.sent for process in processes]),
        " / ".join(dict.fromkeys(plan.binds(way) for way in WAYS)),
        f"{plan.hours:,.3g}" if plan.hours < 100 else f"{plan.hours:,.0f}",
        "none" if found is None else f"{found[0]} by {found[1]}",
    ]


def table(lines: dict[str, tuple[str, int]]) -> str:
    """A table in Markdown, with a line for each recipe."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(name, *setup) for name, setup in lines.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def reported_share() -> float:
    """Share of an H100's peak that LoopLM-135M's reported speed is, by our count of FLOPs."""
    plan = plan_named(LOOPLM, *LANGUAGE[LOOPLM])
    return REPORTED * plan.flops() / plan.tokens / DEVICES["h100"].bf16


def page() -> str:
    """The page as Markdown."""
    plan = plan_named(LOOPLM, *LANGUAGE[LOOPLM])
    tokens = replace(plan, setup=replace(plan.setup, share=1.0)).tokens_per_second
    gigaflops = plan.flops() / plan.tokens / 1e9
    return f"""# What the published models would take

```sh
looped plan ouro/ouro_1_4b --gpu h100 --count 64
```

None of this was run: `looped plan` computes it. `python -m looplab.planning.page` writes this page, and a test
compares it with the code. [plan](../guides/plan.md) says what the columns count, and
[the log](../../LOG.md#2026-11-30-what-looped-plan-counts-against-what-is-there-the-largest-rise-of-a-loss) what was
tested of them.

GB are of one GPU, and hours at 40 % of its peak in the recipe's precision. Where two numbers stand, the first is of
DDP and the second of FSDP2. *Weights* are with autocast's copies of them, *activations* with the logits. *Without
recomputing* is what activations take without the recipe's gradient checkpointing. *Sent* is what one GPU sends per
update. *Smallest* is the fewest GPUs that the training fits on.

## Language models

{table(LANGUAGE)}

- `{LOOPLM}` has the shape of LoopLM-135M: 1,024 wide, 4 prelude layers, 1 core layer x Poisson(6) loops, 2 coda
  layers. The vocabulary (49,152), the width of the MLP (2,560) and the length of a sequence (2,048) are not reported;
  with these there are {plan.weights.all:,} parameters, and {gigaflops:.2f} GFLOP per token.
- {REPORTED:,} tokens/s on one H100 were reported of it. That is {100 * reported_share():.0f} % of the peak, which is
  {tokens:,.0f} tokens/s.
- The loss of `ouro/*` reads every loop out: a token pays for four heads.
- `looped_*` and `hyperloop_*` have half the weights of a transformer with as many layer calls, and its activations:
  looping saves what is held once, and nothing of what every layer call keeps.

## Chains of hops

{table(HOPS)}

Tokens and hours count all `max_steps` and all hop counts of the data. [paper_scale](paper_scale.md) has the updates
that the paper needed, and says why such small batches do not reach this share of the peak.
"""


def main() -> None:
    """Write the page."""
    print(write_whole(Path(shipped("docs")) / PAGE, page()))


if __name__ == "__main__":
    main()
