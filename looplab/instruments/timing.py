"""The stopwatch: alternatives timed in turn in one process, ratios of pairs, and what the machine is."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import PreTrainedModel


def seconds(action: Callable[[], None]) -> float:
    """Seconds that one call of `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds(action: Callable[[], object]) -> float:
    """Seconds of processor time that one call of `action` takes, in all threads: on a busy machine, where others wait
    for the clock, what it costs."""
    start = time.process_time()
    action()
    return time.process_time() - start


def seconds_per_unit(action: Callable[[], float]) -> float:
    """Seconds that one call of `action` takes, divided by the amount of work that it returns."""
    start = time.perf_counter()
    amount = action()
    return (time.perf_counter() - start) / amount


def interleaved(
    first: Callable, second: Callable, rounds: int, warmup: int = 2, timed: Callable = seconds
) -> list[tuple[float, float]]:
    """`rounds` interleaved pairs (timed(first), timed(second)), in seconds: the two run in turn.

    Args:
        warmup: untimed pairs before, in which models compile.
        timed: `seconds` or `seconds_per_unit`.
    """
    for _ in range(warmup):
        first()
        second()
    return [(timed(first), timed(second)) for _ in range(rounds)]


def compared(
    pairs: Sequence[tuple[float, float]], amount: float, sides: tuple[str, str] = ("looped", "llama")
) -> dict:
    """Speed of both sides, in units of `amount` per second, under the names `sides`; and `ratio_of` the pairs.

    Args:
        pairs: what `interleaved` returned, seconds.
        amount: tokens, or what else one call does.
    """
    return {
        sides[0]: amount / median(ours for ours, _ in pairs),
        sides[1]: amount / median(theirs for _, theirs in pairs),
        **ratio_of(pairs),
    }


def ratio_of(pairs: Sequence[tuple[float, float]]) -> dict:
    """Speed of the first side over speed of the second, from the seconds that `interleaved` returned.

    {"ratio": median over the pairs, "ratio_min", "ratio_max", "pairs": number of pairs}
    """
    ratios = [second / first for first, second in pairs]
    return {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "pairs": len(ratios)}


def ratio_text(row: dict) -> str:
    """The ratio and its range as text, from a row with the fields of `ratio_of`."""
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f} - {row['ratio_max']:.2f})"


@contextmanager
def counted_calls(model: PreTrainedModel) -> Iterator[list[int]]:
    """Within the block, every call of a core layer adds its number of batch rows to the list."""
    calls = []
    hooks = [
        layer.register_forward_hook(lambda module, arguments, output: calls.append(len(arguments[0])))
        for layer in model.model.core
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def matmul_peak(size: int) -> float:
    """GFLOP/s of the fastest of 10 fp32 products of two (size, size) matrices: the most that this process reaches."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10)) / 1e9


def processor() -> str:
    """Name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict:
    """Processor, threads, versions and dtype that the numbers were measured with."""
    return {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }
