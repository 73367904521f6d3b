"""Optimizers and learning-rate schedules of a recipe."""

import math
from collections.abc import Iterable

import torch

from modeling_looped import LoopedForCausalLM

from .muon import Muon
from .recipe import Optim


def build_optimizers(model: LoopedForCausalLM, optim: Optim, fused: bool = False) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters that are trained; or Muon for the matrices of the layers (Jordan et al. 2024), adapters
    among them, and AdamW for the rest.

    fused: AdamW in one kernel per group. On a CPU it saves 0.1 ms of an update and rounds otherwise.
    """
    parts = [model.model.prelude, model.model.core, model.model.coda] if optim.kind == "muon" else []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gates = [p for name, p in trained.items() if ".kv_gate." in name and optim.kv_gate_lr is not None]
    taken = {id(p) for p in gates} | {id(p) for p in model.parameters() if not p.requires_grad}
    matrices = [p for part in parts for p in part.parameters() if p.ndim == 2 and id(p) not in taken]
    taken |= {id(p) for p in matrices}
    rest = [p for p in trained.values() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {"params": gates, "weight_decay": 0.0, "lr": optim.kv_gate_lr},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), fused=fused or None))
    if matrices:
        optimizers.append(Muon(matrices, lr=optim.muon_lr, weight_decay=optim.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def lr_factor(optim: Optim, stage_step: int, progress: float) -> float:
    """Multiplier of the learning rates, `stage_step` updates into the stage and with `progress` in [0, 1] of the run.

    It is a linear warm-up times a shape: 1 (constant), 1 - progress (linear), half a cosine, or 1 with a linear end
    over the last fifth (wsd). A shape that falls ends at `final_share`.

    transformers' schedules differ: their warm-up starts at a rate of 0 and squeezes the shape into the steps after it.
    They count steps alone, while a run may be limited by its time, and they know no stages.
    """
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
        "wsd": min(1.0, 5.0 * (1.0 - progress)),
    }[optim.schedule]
    shape = optim.final_share + (1.0 - optim.final_share) * shape
    return shape * min(1.0, (stage_step + 1) / max(1, optim.warmup_steps))


def set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Multiply the learning rates that the recipe names by `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def restart(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Forget the moments of all gradients so far."""
    for optimizer in optimizers:
        optimizer.state.clear()
