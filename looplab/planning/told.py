"""A `Plan` as text."""

from collections.abc import Sequence

from .memory import WAYS
from .plan import Plan


def told(plan: Plan) -> str:
    """The plan as `looped plan` prints it."""
    recipe, setup, count = plan.recipe, plan.setup, plan.setup.count
    device, precision = setup.device, recipe.precision
    lines = [
        f"{recipe.name} on {count} x {device.name} ({device.memory / 1e9:.0f} GB, {plan.peak / 1e12:.0f} TFLOP/s in "
        f"{precision}), {100 * setup.share:.0f} % of the peak",
        "",
        f"parameters         {plan.weights.all:,}" + trained_of(plan),
        f"loops              {depth_of(plan)}",
        f"FLOPs per token    {per_token(plan)}",
        f"tokens             {plan.tokens:,.0f} per update x {plan.updates:,.0f} updates = "
        f"{short(plan.tokens * plan.updates)}",
        f"batch              {recipe.batch_size:,} rows = {count} x {recipe.accumulation_steps} micro-batches x "
        f"{plan.rows(count):,}",
        "",
    ]
    processes = {way: plan.process(way, count) for way in WAYS}
    width = 19
    lines.append(f"{'GB of one of them':<{width}}" + "".join(f"{way:>10}" for way in WAYS))
    for what in next(iter(processes.values())).held:
        lines.append(row(what, [process.held[what] / 1e9 for process in processes.values()]))
    lines.append(row("together", [process.total / 1e9 for process in processes.values()]))
    other = not recipe.gradient_checkpointing
    others = [plan.process(way, count, recomputed=other) for way in WAYS]
    word = "with" if other else "without"
    lines.append(row(f"{word} recomputing", [process.total / 1e9 for process in others]))
    lines += [
        row("sent per update", [process.sent / 1e9 for process in processes.values()]),
        row("  seconds of it", [plan.send_seconds(process, count) for process in processes.values()]),
        f"{'binds':<{width}}" + "".join(f"{plan.binds(way):>10}" for way in WAYS),
        "",
        f"hours              {plan.hours:,.1f}; {plan.compute_seconds(count):,.2f} seconds per update, "
        f"{plan.tokens_per_second:,.0f} tokens/s each",
        f"smallest           {suggested(plan)}",
    ]
    return "\n".join(lines)


def row(what: str, values: Sequence[float]) -> str:
    """A line of the table."""
    return f"{what:<19}" + "".join(f"{value:>10,.2f}" for value in values)


def trained_of(plan: Plan) -> str:
    """How many weights are trained, where it is not all."""
    return "" if plan.weights.trained == plan.weights.all else f", of which {plan.weights.trained:,} are trained"


def depth_of(plan: Plan) -> str:
    """The loop counts of the training."""
    fewest, most = min(plan.loops), max(plan.loops)
    return f"{most}" if fewest == most else f"{fewest} to {most}, {plan.expected_loops:.2f} on average"


def per_token(plan: Plan) -> str:
    """FLOPs of a token in training, at a few loop counts and on average."""
    fewest, most = min(plan.loops), max(plan.loops)
    parts = [f"{plan.flops({loops: 1.0}) / plan.tokens / 1e9:,.3f} G at {loops}" for loops in sorted({fewest, most})]
    return f"{plan.flops() / plan.tokens / 1e9:,.3f} G" + (f"; {', '.join(parts)}" if len(parts) > 1 else "")


def suggested(plan: Plan) -> str:
    """The fewest accelerators that are enough."""
    found = plan.smallest()
    if found is None:
        return "none: raise accumulation_steps, or set gradient_checkpointing"
    count, way = found
    return f"{count} x {plan.setup.device.name} by {way}"


def short(number: float) -> str:
    """A large number with three digits: 3.00 T."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"
