"""Muon (Jordan et al. 2024) with the matrices of one shape orthogonalized together.

    torch.optim.Muon     per matrix   5 x (gram, its polynomial, product)
    Muon, here           per shape    the same products of a stack of matrices, tall ones transposed

Numbers, state and checkpoints are those of torch.optim.Muon: bit for bit on a CPU, for matrices of 32 x 32 and more.
Under FSDP2 every rank gathers the matrices in bfloat16, orthogonalizes them whole, and keeps its share. Among W ranks
it receives 2 (W - 1) / W bytes per element of a matrix, where torch.optim.Muon, which multiplies the shards, receives
22 at 8 ranks; FSDP2 itself moves 8 (W - 1) / W.
"""

import math
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


class Muon(torch.optim.Muon):
    """As torch.optim.Muon, faster where matrices share a shape.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate; that of a tall matrix (M, N) is sqrt(M / N) times as high.
        weight_decay: share of the learning rate by which a matrix shrinks in every update.
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.update(parameters, group)
        return loss

    def update(self, parameters: list[torch.nn.Parameter], group: dict) -> None:
        """Update the parameters of a group that have a gradient."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        whole = [gathered(update) for update in updates]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        updates = orthogonalized(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for parameter, update in zip(parameters, updates, strict=True):
            rows, columns = parameter.shape
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            parameter.add_(divided_as(parameter, update), alpha=-rate)


def gathered(update: torch.Tensor) -> torch.Tensor:
    """The whole of an update (M, N) that may be divided: in bfloat16, as it is orthogonalized."""
    return update.to(torch.bfloat16).full_tensor() if isinstance(update, DTensor) else update


def divided_as(parameter: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The update (M, N), which all ranks have whole, as `parameter` is divided among them."""
    if not isinstance(parameter, DTensor):
        return update
    return distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)


def orthogonalized(
    matrices: list[torch.Tensor], coefficients: tuple[float, float, float], steps: int, eps: float
) -> list[torch.Tensor]:
    """The Newton-Schulz iteration of torch.optim.Muon on many matrices: in bfloat16, one of each."""
    a, b, c = coefficients
    scaled = [matrix.to(torch.bfloat16, copy=True) for matrix in matrices]
    norms = torch._foreach_norm(scaled)
    torch._foreach_clamp_min_(norms, eps)
    torch._foreach_div_(scaled, norms)
    alike: dict[tuple, list[int]] = {}
    for index, matrix in enumerate(scaled):
        alike.setdefault((*sorted(matrix.shape), matrix.device), []).append(index)
    for indices in alike.values():
        x = torch.stack([transposed_if_tall(scaled[index]) for index in indices])  # (n, M <= N, N)
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for index, matrix in zip(indices, x, strict=True):
            scaled[index] = matrix.mT if scaled[index].shape != matrix.shape else matrix
    return scaled


def transposed_if_tall(matrix: torch.Tensor) -> torch.Tensor:
    """(M, N) -> itself, or (N, M) where M > N."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
