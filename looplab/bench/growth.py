"""`looped bench --growth`: how time and memory grow with loops, batch rows, context, and tokens trained in chunks.

    loops      a forward pass for training with 1 .. 1,000 loops: seconds, and bytes kept for the backward pass
    batch      the same with more batch rows
    context    one decoded token after so many cached ones: seconds, and bytes of the KV cache
    chunks     a forward pass for training with kv_sharing="gated", in chunks of 16 tokens, of more and more tokens

A row is one measurement. The exponent of a series is the slope of its last two points in a plot of logarithms: 1 where
twice as much costs twice as much.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looplab.instruments.timing import seconds
from modeling_looped import LoopedConfig, LoopedForCausalLM

from .contexts import filled_cache, step_at
from .pair import Workload, model_sizes

# What a series counts -> its points; and of `--quick`.
POINTS = {
    "loops": (1, 10, 100, 1000),
    "batch": (1, 4, 16, 64),
    "context": (512, 2048, 8192, 32768),
    "chunks": (128, 256, 512, 1024),
}
FEW_POINTS = {"loops": (1, 4), "batch": (1, 4), "context": (8, 32), "chunks": (32, 64)}


class LivingStorages(TorchDispatchMode):
    """Within the block, notes the memory of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made

    def living(self) -> int:
        """Bytes of those that are still there."""
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps until its backward pass; `forward` returns the loss, which holds them."""
    with LivingStorages() as storages:
        loss = forward()
    size = storages.living()
    del loss
    return size


def training_forward(model: LoopedForCausalLM, batch: int, tokens: int, loops: int) -> Callable[[], torch.Tensor]:
    """A call that computes the loss of `batch` rows of so many tokens at so many loops."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), generator=draw)
    model.train()
    return lambda: model(ids, labels=ids, num_loops=loops, use_cache=False).loss


def growth_row(of: str, count: int, width: int, work: Workload, rounds: int) -> dict:
    """One point of the series `of`: the median of `rounds` times in seconds, and bytes."""
    sizes = model_sizes(width, work) | {"num_core_layers": work.layers, "num_loops": work.loops}
    row = {"measure": "growth", "mode": of, "width": width, "count": count}
    if of == "context":
        model = LoopedForCausalLM(LoopedConfig(**sizes))
        decode = step_at(model, count, work.steps)
        decode()
        cache = filled_cache(model, count)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return row | {"seconds": median(seconds(decode) for _ in range(rounds)) / work.steps, "bytes": size}
    if of == "chunks":
        sizes |= {"kv_sharing": "gated", "prefill_chunk": 16, "norm_placement": "sandwich"}
    shape = {"batch": 1, "tokens": work.tokens, "loops": work.loops}
    shape |= {"tokens": count} if of == "chunks" else {of: count}
    forward = training_forward(LoopedForCausalLM(LoopedConfig(**sizes)), **shape)
    size = kept_bytes(forward)  # which warms up as well
    return row | {"seconds": median(seconds(forward) for _ in range(rounds)), "bytes": size} | shape


def growth_plan(
    widths: Sequence[int], work: Workload, rounds: int, points: dict[str, Sequence[int]]
) -> list[Callable[[], dict]]:
    """The measurements of this module, each a call that returns its row."""
    return [
        partial(growth_row, of, count, width, work, rounds)
        for width in widths
        for of, counts in points.items()
        for count in counts
    ]


def exponent(rows: Sequence[dict], of: str) -> float:
    """b where `of`, "seconds" or "bytes", grows as count ** b between the last two rows of a series."""
    before, last = rows[-2:]
    return math.log(last[of] / before[of]) / math.log(last["count"] / before["count"])


def series_of(rows: Sequence[dict]) -> dict[tuple[str, int], list[dict]]:
    """(what is counted, width) -> its rows, in the order of the counts."""
    series: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        if row["measure"] == "growth":
            series.setdefault((row["mode"], row["width"]), []).append(row)
    return series


def growth_lines(rows: Sequence[dict]) -> list[str]:
    """The rows of this module as text."""
    text = []
    for (of, width), points in series_of(rows).items():
        powers = ", ".join(f"{name} ~ n^{exponent(points, name):.2f}" for name in ("seconds", "bytes"))
        text.append(f"\n{of}, {width} wide: {powers}")
        text += [f"{row['count']:>8}{row['seconds'] * 1e3:>12.2f} ms{row['bytes'] / 1e6:>12.2f} MB" for row in points]
    return text


def draw_growth(rows: Sequence[dict], folder: Path) -> Path:
    """FOLDER/growth.png: time and memory of all series, in logarithms; returns its path."""
    from matplotlib.figure import Figure

    from looplab.instruments.drawing import MARKS, PALETTE, save, tidy

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, of, label, unit in zip(panels, ("seconds", "bytes"), ("milliseconds", "MB"), (1e3, 1e-6), strict=True):
        for index, ((mode, width), points) in enumerate(series_of(rows).items()):
            x, y = [row["count"] for row in points], [row[of] * unit for row in points]
            colour, mark = PALETTE[index % len(PALETTE)], MARKS[index % len(MARKS)]
            name = f"{mode}, {width} wide: n^{exponent(points, of):.2f}"
            axes.loglog(x, y, color=colour, marker=mark, markersize=4.5, label=name)
        tidy(axes, label, "loops, batch rows, or tokens")
        axes.legend(frameon=False, fontsize=7)
    return save(figure, folder / "growth.png")
