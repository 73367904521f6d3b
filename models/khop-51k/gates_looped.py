"""KV gates: the latent that keys and values are computed from when a token has one cached entry for all loops (MELT).

    x_t = input_layernorm(hidden_states)               (B, T, D)  what a layer runs on in loop t
    h_t = z_t * h_{t-1} + (1 - z_t) * x_t              h_0 := x_1, so that the first loop is any transformer's
    q_t = x_t W_Q;   k_t = h_t W_K;   v_t = h_t W_V    later tokens see k, v of the last loop only

    elementwise   z = sigmoid(x W + h U + b), a value per channel                      2 D^2 + D parameters per layer
    low_rank      the same with W and U of rank `kv_gate_rank`                         4 D r + D
    scalar        the same, a value per token                                          2 D + 1
    mean          h_t is the mean of x_1 .. x_t
    ema           z = 0.2
    last          z = 0

A gate belongs to one layer and is the same in every loop. The three without parameters are baselines. Source: MELT
(arXiv 2605.07721); h_0, the normalised input and the initial bias are our choices, since its text was not available:
weights 0 and bias -3 start near `last`, which changes a model trained with an entry per loop least. Legend: B batch
rows, T tokens, D hidden size, r rank.
"""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn
from transformers import initialization as init

from .initial_looped import SetsInitialValues


class KVGate(nn.Module, ABC):
    """How the latent of a layer takes up what the layer runs on, loop by loop."""

    def __init__(self, config):
        super().__init__()

    @classmethod
    def flops(cls, config) -> int:
        """Matrix-product FLOPs (2 per multiply-add) per token and layer, in every loop but the first."""
        return 0

    def forward(self, hidden_states: torch.Tensor, latent: torch.Tensor | None, loop: int) -> torch.Tensor:
        """x_t (B, T, D) and h_{t-1} (B, T, D), None in the first loop -> h_t (B, T, D); `loop` is t - 1."""
        return hidden_states if latent is None else self.mix(hidden_states, latent, loop)

    @abstractmethod
    def mix(self, hidden_states: torch.Tensor, latent: torch.Tensor, loop: int) -> torch.Tensor:
        """`forward` from the second loop on."""


@final
class LastGate(KVGate):
    """h_t = x_t: the latent forgets the loops before."""

    def mix(self, hidden_states, latent, loop):
        return hidden_states


@final
class MeanGate(KVGate):
    """h_t = (x_1 + ... + x_t) / t."""

    def mix(self, hidden_states, latent, loop):
        return torch.lerp(latent, hidden_states, 1 / (loop + 1))


@final
class EMAGate(KVGate):
    """h_t = 0.2 h_{t-1} + 0.8 x_t."""

    kept = 0.2

    def mix(self, hidden_states, latent, loop):
        return torch.lerp(hidden_states, latent, self.kept)


class LearnedGate(KVGate, SetsInitialValues):
    """h_t = z_t * h_{t-1} + (1 - z_t) * x_t, z_t = sigmoid(of_input(x_t) + of_latent(h_{t-1}))."""

    of_input: nn.Module
    of_latent: nn.Module
    initial_bias = -3.0

    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """The linears whose sum is the logit of z."""
        return self.of_input, self.of_latent  # pyright: ignore[reportReturnType]

    def initialize(self) -> None:
        """Whatever the input, z is about 0.05."""
        for linear in self.ends():
            init.zeros_(linear.weight)
            if linear.bias is not None:
                init.constant_(linear.bias, self.initial_bias)

    def mix(self, hidden_states, latent, loop):
        # lerp is exact at both ends: z = 0 is the model with an entry per loop, z = 1 its first loop, bit for bit.
        z = torch.sigmoid(self.of_input(hidden_states) + self.of_latent(latent))
        return torch.lerp(hidden_states, latent, z.to(hidden_states.dtype).expand_as(latent))


@final
class ElementwiseGate(LearnedGate):
    @classmethod
    def flops(cls, config) -> int:
        return 4 * config.hidden_size**2

    def __init__(self, config):
        super().__init__(config)
        self.of_input = nn.Linear(config.hidden_size, config.hidden_size)
        self.of_latent = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


@final
class ScalarGate(LearnedGate):
    @classmethod
    def flops(cls, config) -> int:
        return 4 * config.hidden_size

    def __init__(self, config):
        super().__init__(config)
        self.of_input = nn.Linear(config.hidden_size, 1)
        self.of_latent = nn.Linear(config.hidden_size, 1, bias=False)


@final
class LowRankGate(LearnedGate):
    @classmethod
    def flops(cls, config) -> int:
        return 8 * config.hidden_size * config.kv_gate_rank

    def __init__(self, config):
        super().__init__(config)
        size, rank = config.hidden_size, config.kv_gate_rank
        self.of_input = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size))
        self.of_latent = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False))

    def ends(self):
        assert isinstance(self.of_input, nn.Sequential)
        assert isinstance(self.of_latent, nn.Sequential)
        return self.of_input[-1], self.of_latent[-1]


KV_GATES: dict[str, type[KVGate]] = {
    "elementwise": ElementwiseGate,
    "low_rank": LowRankGate,
    "scalar": ScalarGate,
    "mean": MeanGate,
    "ema": EMAGate,
    "last": LastGate,
}
