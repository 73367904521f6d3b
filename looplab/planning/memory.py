"""Bytes that one process of a training holds, and those that it sends per update.

    weights       float32, and under FSDP2 the part of a process beside the whole in the precision of the computation
    casts         autocast's copies of the weights in bf16, which the backward pass needs
    gradients     float32; DDP keeps a second copy in the buckets that it sends
    optimizer     AdamW two numbers per weight, Muon one
    activations   what the forward pass keeps for the backward pass
    logits        of the tokens that are learnt, and the gradient that they begin the backward pass with

Activations are counted, not estimated: a model of the recipe's configuration runs on tensors without
contents (FakeTensorMode of torch), and the sizes of what autograd saves are added up. Every further batch row, loop
and layer of the core adds as much, so that few of them tell of many.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from looplab.training.objectives import label_objective
from looplab.training.optimizers import build_optimizers
from looplab.training.recipe import Recipe
from looplab.training.trained import TRAINED
from modeling_looped import LoopedConfig, LoopedForCausalLM

SINGLE, HALF = 4, 2  # bytes of a number
CASTS = ("ToCopyBackward0", "TBackward0")  # what autocast does to a weight before a product


# Layers of the core, loops and batch rows of the calls that are counted.
CORNERS = tuple(product((1, 2), (2, 3), (1, 2)))


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps for the backward pass, in bytes.

    Args:
        layers: of the core.
        counts: (layers, loops, batch rows) of `CORNERS` -> bytes of activations.
        whole: the same where no layer is computed again; `counts` itself unless it is.
        casts: copies of weights in bf16.
    """

    layers: int
    counts: Mapping[tuple[int, int, int], int]
    whole: Mapping[tuple[int, int, int], int]
    casts: int

    def saved(self, rows: int, loops: int) -> int:
        """Bytes that autograd saves of so many batch rows and loops."""
        return beyond(self.counts, self.layers, loops, rows)

    def activations(self, rows: int, loops: int) -> int:
        """The same, and of a layer that is computed again what it keeps for a moment."""
        if self.counts is self.whole:
            return self.saved(rows, loops)
        one, two = (beyond(self.whole, layers, 3, rows) - beyond(self.whole, layers, 2, rows) for layers in (1, 2))
        return self.saved(rows, loops) + two - one


def beyond(counts: Mapping[tuple[int, int, int], int], layers: int, loops: int, rows: int) -> int:
    """The bytes at other layers, loops and batch rows than those of `CORNERS`, on the lines through them."""

    def on(line: Sequence[int], steps: int) -> int:
        first, second = line
        return first + steps * (second - first)

    by_rows = {corner[:2]: on([counts[*corner[:2], n] for n in (1, 2)], rows - 1) for corner in CORNERS}
    by_loops = [on([by_rows[n, m] for m in (2, 3)], loops - 2) for n in (1, 2)]
    return on(by_loops, layers - 1)


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, tied ones once.

    Args:
        all, trained: of the model, and those that have a gradient.
        muon: those of the trained ones that Muon updates; AdamW has the others.
        core: of the layers of the core.
        largest: of the layer that has the most.
        tensors: tensors that AdamW updates, each with a count of its updates.
    """

    all: int
    trained: int
    muon: int
    core: int
    largest: int
    tensors: int

    @property
    def optimizer(self) -> int:
        """Bytes of the state of the optimizers."""
        return SINGLE * (2 * (self.trained - self.muon) + self.muon + self.tensors)


def fake_model(recipe: Recipe, config: LoopedConfig, layers: int) -> LoopedForCausalLM:
    """The model in training with so many layers in its core, to be made within FakeTensorMode.

    Chunks, and a learned table of positions, look at numbers that tensors without contents do not have. Both are left
    out: a chunk keeps what the same tokens keep in one call, and the table keeps nothing.
    """
    fields = {"num_core_layers": layers, "prefill_chunk": None}
    if config.position_embedding == "learned":
        fields["position_embedding"] = "none"
    values = {name: value for name, value in config.to_dict().items() if name != "num_hidden_layers"}
    model = LoopedForCausalLM(LoopedConfig.from_dict(values | fields)).train()
    TRAINED[recipe.train.what](recipe.train).prepare(model)
    return model


def count_weights(recipe: Recipe, config: LoopedConfig) -> Weights:
    """The numbers of weights of a recipe's model."""
    with torch.device("meta"):
        model = LoopedForCausalLM(config)
    total = model.num_parameters()
    TRAINED[recipe.train.what](recipe.train).prepare(model)
    *adamw, last = build_optimizers(model, recipe.optim)
    by_muon = [last] if recipe.optim.kind == "muon" and isinstance(last, torch.optim.Muon) else []
    adamw = [*adamw, *([] if by_muon else [last])]
    layers = [*model.model.prelude, *model.model.core, *model.model.coda]
    return Weights(
        all=total,
        trained=model.num_parameters(only_trainable=True),
        muon=sum(p.numel() for optimizer in by_muon for group in optimizer.param_groups for p in group["params"]),
        core=sum(p.numel() for p in model.model.core.parameters()),
        largest=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        tensors=sum(len(group["params"]) for optimizer in adamw for group in optimizer.param_groups),
    )


@contextmanager
def saved(model: LoopedForCausalLM) -> Iterator[dict[str, int]]:
    """Within the block, adds up the bytes that autograd saves: {"activations": .., "casts": ..}, each memory once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages, total = {}, {"activations": 0, "casts": 0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in storages:
            storages[storage._cdata] = storage  # held, so that its number is not given again
            total["casts" if is_cast(tensor) else "activations"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def is_cast(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a weight in another precision, transposed or not."""
    step = tensor.grad_fn
    while step is not None and step.name() in CASTS:
        step = step.next_functions[0][0]
    return tensor.grad_fn is not None and step is not None and "AccumulateGrad" in step.name()


def forward(recipe: Recipe, model: LoopedForCausalLM, rows: int, tokens: int, loops: int, logits: int) -> dict:
    """Run the objective of a recipe on a batch, differentiated through all loops, and return what `saved` counts.

    Args:
        logits: positions of a batch row that are learnt, counted from its end; 0 for all.
    """
    whole = replace(recipe, compile=False, num_grad_loops=None)
    objective = label_objective(whole, model.config, logits)
    labels = torch.zeros(rows, logits or tokens, dtype=torch.long)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16")
    with saved(model) as total, precision, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch speaks of kernels that these tensors do not run
        # Embedded here, since token ids without contents cannot be checked.
        embeds = model.get_input_embeddings()(torch.zeros(rows, tokens, dtype=torch.long))
        loss = objective(model, {"inputs_embeds": embeds}, labels, loops, 0.0)
        del loss
    return total


def count_kept(recipe: Recipe, config: LoopedConfig, tokens: int, logits: int) -> dict[bool, Kept]:
    """With gradient checkpointing or not -> what a forward pass of a recipe keeps, on rows of `tokens` tokens."""
    counts: dict[bool, dict] = {False: {}, True: {}}
    casts = {}
    with FakeTensorMode():
        models = {layers: fake_model(recipe, config, layers) for layers in (1, 2)}
        for recomputed, counted in counts.items():
            if recomputed:
                for model in models.values():
                    model.activation_checkpointing_enable()
            for layers, loops, rows in CORNERS:
                found = forward(recipe, models[layers], rows, tokens, loops, logits)
                counted[layers, loops, rows] = found["activations"]
                casts.setdefault((layers, loops, rows), found["casts"])
    size = beyond(casts, config.num_core_layers, 2, 1)
    return {again: Kept(config.num_core_layers, counted, counts[False], size) for again, counted in counts.items()}


@dataclass(frozen=True)
class Process:
    """What one of `count` processes holds and sends, in bytes.

    Args:
        held: what -> bytes, see the module docstring.
        sent: per update.
    """

    held: dict[str, int]
    sent: int

    @property
    def total(self) -> int:
        """Bytes that are held."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Work:
    """What one process computes in a micro-batch.

    Args:
        rows: batch rows.
        loops: the most loops of which activations are kept.
        mean_loops: loops that are differentiated, on average.
        logits: bytes of a batch row, beside what is kept of them.
    """

    rows: int
    loops: int
    mean_loops: float
    logits: int


def data_parallel(recipe: Recipe, weights: Weights, kept: Kept, work: Work, count: int) -> Process:
    """DDP: every process has everything, and one ring adds up the gradients once per update."""
    buckets = SINGLE * weights.trained if count > 1 else 0
    held = {
        "weights": SINGLE * weights.all,
        "casts": kept.casts,
        "gradients": SINGLE * weights.trained + buckets,
        "optimizer": weights.optimizer,
        "activations": kept.activations(work.rows, work.loops),
        "logits": work.rows * work.logits,
    }
    return Process(held, round(2 * SINGLE * weights.trained * (count - 1) / count))


def sharded(recipe: Recipe, weights: Weights, kept: Kept, work: Work, count: int) -> Process:
    """FSDP2 by recipes/accelerate/fsdp2.yaml: weights, gradients and optimizer are divided.

    Every micro-batch gathers the weights in its forward pass, and those of the core once more in the backward pass of
    every loop but the last, since FSDP2 frees a layer after each backward pass through it. In bf16 weights and
    gradients travel as bf16. Gradients are whole until the last micro-batch.
    """
    width = HALF if recipe.precision == "bf16" else SINGLE
    whole = width * (weights.trained if recipe.accumulation_steps > 1 else 2 * weights.largest)
    held = {
        "weights": -(-SINGLE * weights.all // count) + width * weights.all,
        "casts": 0,
        "gradients": -(-SINGLE * weights.trained // count) + whole,
        "optimizer": -(-weights.optimizer // count),
        "activations": kept.activations(work.rows, work.loops),
        "logits": work.rows * work.logits,
    }
    gathered = recipe.accumulation_steps * (weights.all + (work.mean_loops - 1) * weights.core)
    sent = width * (gathered + weights.trained) + MUON_GATHERS * weights.muon
    return Process(held, round(sent * (count - 1) / count))


MUON_GATHERS = HALF  # bytes of a weight that Muon gathers to orthogonalize whole matrices, see muon.py
WAYS = {"DDP": data_parallel, "FSDP2": sharded}
