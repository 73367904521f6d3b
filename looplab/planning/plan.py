"""`looped plan`: parameters, FLOPs, memory, traffic and hours of a recipe on so many accelerators, and what binds.

    hours     FLOPs of all updates / (accelerators x share of the peak x peak)
    memory    what one process holds where its part of a micro-batch runs the deepest loop count of the recipe
    traffic   bytes that one process sends per update, at the speed of the link within a machine, or of the network

What binds: the memory, where the training does not fit; else the traffic, where sending takes longer than computing,
although both run at the same time; else the computing. `LARGEST_SHARE` of the memory counts as what there is: the rest
is for the libraries of the accelerator, and for what its allocator cannot give out.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from looplab.instruments.devices import DEVICES, Device
from looplab.instruments.flops import training_flops
from looplab.runs.models import blaming
from looplab.tasks.data import RowShape
from looplab.training.recipe import Recipe
from modeling_looped import LoopedConfig

from .memory import HALF, SINGLE, WAYS, Kept, Process, Weights, Work, count_kept, count_weights

LARGEST_SHARE = 0.92  # of the memory
IN_A_MACHINE = 8  # accelerators that a link connects; more of them speak over the network
NETWORK = 50e9  # bytes/s that one accelerator sends into the network: 400 Gbit/s each


@dataclass(frozen=True)
class Setup:
    """What a recipe would be trained on.

    Args:
        device: the accelerator, with its own memory in bytes and peaks in FLOP/s.
        count: accelerators.
        share: of the peak that is reached, 0 .. 1.
        network: bytes/s of one accelerator.
    """

    device: Device
    count: int
    share: float = 0.4
    network: float = NETWORK

    def link(self, count: int) -> float:
        """Bytes/s that one of `count` accelerators sends."""
        return self.device.link if count <= IN_A_MACHINE else min(self.device.link, self.network)


def device_of(name: str, memory: float | None = None, peak: float | None = None) -> Device:
    """The accelerator of a name in `DEVICES`, with another memory (GB) or peak (TFLOP/s, in any precision) if given.

    Raises:
        ValueError: the name is not known, and memory or peak lacks.
    """
    known = DEVICES.get(name.lower())
    if known is None and (memory is None or peak is None):
        raise ValueError(
            f"--gpu {name} is not known: say its --memory in GB and its --peak in TFLOP/s, or name one of "
            f"{', '.join(sorted(DEVICES))}."
        )
    device = known or Device(name, 0, 0.0, 0.0, NETWORK)
    if memory is not None:
        device = replace(device, memory=round(memory * 1e9))
    return device if peak is None else replace(device, bf16=peak * 1e12, fp32=peak * 1e12)


def model_config(recipe: Recipe, shape: RowShape) -> LoopedConfig:
    """The configuration of the model that a recipe trains.

    Raises:
        ValueError: the vocabulary is not known without the data, or the folder `init_from` has no configuration.
    """
    if recipe.init_from is not None:
        with blaming(recipe.init_from, "name another folder in init_from."):
            return LoopedConfig.from_pretrained(Path(recipe.init_from), **recipe.model)
    if shape.vocabulary is None and "vocab_size" not in recipe.model:
        raise ValueError("the vocabulary is known with the data only: say --model.vocab_size N.")
    return LoopedConfig(**({"vocab_size": shape.vocabulary} | recipe.model))


@dataclass(frozen=True)
class Plan:
    """What the training of a recipe would take; `make_plan` makes it, `told.py` tells it."""

    recipe: Recipe
    setup: Setup
    config: LoopedConfig
    weights: Weights
    shape: RowShape
    loops: dict[int, float]  # loop count -> share of the updates
    kept: dict[bool, Kept]  # with gradient checkpointing or not -> what a forward pass keeps

    def flops(self, loops: dict[int, float] | None = None) -> float:
        """Mean FLOPs of an update, at the loop counts of the recipe or at others with their shares."""
        logits, grad_loops = self.shape.logits or None, self.recipe.num_grad_loops
        return sum(
            share * part * training_flops(self.config, self.recipe.batch_size, tokens, count, logits, grad_loops)
            for tokens, share in self.shape.tokens.items()
            for count, part in (loops or self.loops).items()
        )

    @property
    def tokens(self) -> float:
        """Mean tokens of an update."""
        return self.recipe.batch_size * sum(tokens * share for tokens, share in self.shape.tokens.items())

    @property
    def expected_loops(self) -> float:
        """Mean loop count of an update."""
        return sum(count * share for count, share in self.loops.items())

    @property
    def peak(self) -> float:
        """FLOP/s of one accelerator at most, in the precision of the recipe."""
        return {"bf16": self.setup.device.bf16, "fp32": self.setup.device.fp32}[self.recipe.precision]

    @property
    def updates(self) -> float:
        """Updates of the whole run; where only time limits it, those that the time is enough for."""
        if self.recipe.max_steps is not None:
            return self.recipe.max_steps
        return self.recipe.max_seconds / self.compute_seconds(self.setup.count)

    @property
    def hours(self) -> float:
        """Of the whole run on `setup.count` accelerators, where computing binds."""
        return self.updates * self.compute_seconds(self.setup.count) / 3600

    @property
    def tokens_per_second(self) -> float:
        """Of one accelerator."""
        return self.tokens / self.compute_seconds(1)

    def compute_seconds(self, count: int) -> float:
        """Seconds of an update on so many accelerators."""
        return self.flops() / (count * self.setup.share * self.peak)

    def rows(self, count: int) -> int:
        """Batch rows of a micro-batch of one of `count` accelerators. ValueError if a batch does not divide so."""
        parts = count * self.recipe.accumulation_steps
        if self.recipe.batch_size % parts:
            raise ValueError(
                f"batch_size {self.recipe.batch_size} does not divide into {count} processes x "
                f"{self.recipe.accumulation_steps} accumulation_steps: change one of them, or --count."
            )
        return self.recipe.batch_size // parts

    def logits_bytes(self) -> int:
        """Bytes that the logits of a batch row have at most, beside what is kept of them."""
        positions = self.shape.logits or max(self.shape.tokens)
        half = HALF if self.recipe.precision == "bf16" else 0
        return positions * self.config.vocab_size * (half + SINGLE)

    def process(self, way: str, count: int, recomputed: bool | None = None) -> Process:
        """What one of `count` processes holds and sends by one of `WAYS`; `recomputed` is a key of `kept`."""
        kept = self.kept[self.recipe.gradient_checkpointing if recomputed is None else recomputed]
        deepest = self.recipe.num_grad_loops or max(self.loops)
        mean = sum(min(loops, deepest) * share for loops, share in self.loops.items())
        work = Work(self.rows(count), min(max(self.loops), deepest), mean, self.logits_bytes())
        return WAYS[way](self.recipe, self.weights, kept, work, count)

    def fits(self, process: Process) -> bool:
        """Whether it fits into the memory of one accelerator."""
        return process.total <= LARGEST_SHARE * self.setup.device.memory

    def binds(self, way: str) -> str:
        """What limits the training by a way: "memory", "traffic" or "computing"."""
        count = self.setup.count
        process = self.process(way, count)
        if not self.fits(process):
            return "memory"
        return "traffic" if self.send_seconds(process, count) > self.compute_seconds(count) else "computing"

    def send_seconds(self, process: Process, count: int) -> float:
        """Seconds that one of `count` processes sends per update."""
        return process.sent / self.setup.link(count)

    def counts(self) -> list[int]:
        """Numbers of accelerators that a batch divides into, ascending."""
        rows, steps = self.recipe.batch_size, self.recipe.accumulation_steps
        return [count for count in range(1, rows // steps + 1) if rows % (count * steps) == 0]

    def smallest(self) -> tuple[int, str] | None:
        """The fewest accelerators that the training fits on, and the way, the first of `WAYS` that does; or None."""
        for count in self.counts():
            for way in WAYS:
                if self.fits(self.process(way, count)):
                    return count, way
        return None


def make_plan(recipe: Recipe, setup: Setup, tokens: int | None = None) -> Plan:
    """What the training of a recipe on `setup` would take. Nothing is trained, and no data are read.

    Args:
        tokens: of a batch row, if the recipe does not say.

    Raises:
        ValueError: the recipe does not say how long a row is, or what the vocabulary is; the batch does not divide.
    """
    shape = recipe.data.shape()
    if tokens is not None:
        shape = replace(shape, tokens={tokens: 1.0})
    if shape.tokens is None:
        raise ValueError("how long rows are is known with the data only: say --tokens N, the mean.")
    config, depth = model_config(recipe, shape), recipe.depth.sampler(recipe.seed)
    weights, longest = count_weights(recipe, config), max(shape.tokens)
    kept = count_kept(recipe, config, longest, shape.logits)
    loops = dict(zip(depth.depths.tolist(), depth.probabilities.tolist(), strict=True))
    plan = Plan(recipe, setup, config, weights, shape, loops, kept)
    plan.rows(setup.count)
    return plan
