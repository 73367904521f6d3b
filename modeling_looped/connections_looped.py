"""Loop connections: how the state enters and leaves one pass over the core.

    state = connection.open(start, e)            # (B, T, D) once; `start` is the initial state, e the prelude's output
    x     = connection.read(state, e, loop)      # (B, T, D) what the core runs on
    state = connection.write(state, out, loop)   # out = core(x)
    h     = connection.close(state)              # (B, T, D) what the coda and the readout see

Every tensor of a state has the batch as its first dimension, so that rows can leave it. Legend: B rows, T tokens,
D hidden size.
"""

import torch
from torch import nn


class PlainConnection(nn.Module):
    """state = core(state): nothing is added between loops (Loop, Think & Generalize, arXiv 2604.07822)."""

    def __init__(self, config):
        super().__init__()

    def open(self, start: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return start

    def read(self, state: torch.Tensor, embeds: torch.Tensor, loop: int) -> torch.Tensor:
        return state

    def write(self, state: torch.Tensor, output: torch.Tensor, loop: int) -> torch.Tensor:
        return output

    def close(self, state: torch.Tensor) -> torch.Tensor:
        return state


class InjectAddConnection(PlainConnection):
    """state = core(state + e) from the second loop on; the first reads the initial state, or e where that is zero.

    With `state_init="embeddings"` the first loop reads e and later ones h + e (arXiv 2604.07822, input injection), so
    the sum is formed in every loop from a zero start, which is the same thing without a special first loop.
    """

    def __init__(self, config):
        super().__init__(config)
        self.starts_at_embeddings = config.state_init == "embeddings"

    def open(self, start: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(start) if self.starts_at_embeddings else start

    def read(self, state: torch.Tensor, embeds: torch.Tensor, loop: int) -> torch.Tensor:
        return state + embeds


class InjectConcatConnection(PlainConnection):
    """state = core(adapter([state, e])), a learned 2D -> D adapter (Huginn, arXiv 2502.05171)."""

    def __init__(self, config):
        super().__init__(config)
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def read(self, state: torch.Tensor, embeds: torch.Tensor, loop: int) -> torch.Tensor:
        return self.adapter(torch.cat([state, embeds], dim=-1))


CONNECTIONS = {
    "plain": PlainConnection,
    "inject_add": InjectAddConnection,
    "inject_concat": InjectConcatConnection,
}


class EmbeddingsStart:
    """The loop starts from the prelude's output."""

    def __init__(self, config):
        pass

    def __call__(self, embeds, position_ids, generator, training):
        return embeds


class ZerosStart(EmbeddingsStart):
    """The loop starts from zero; only a connection that injects e makes sense of it."""

    def __call__(self, embeds, position_ids, generator, training):
        return torch.zeros_like(embeds)


class NormalStart(EmbeddingsStart):
    """The loop starts from N(0, state_init_std^2) (Huginn, arXiv 2502.05171).

    While training every row and token draws its own noise. In evaluation the noise is a function of the generator's
    seed (0 without a generator) and of the token's position only: the same call twice gives the same logits, a cached
    step sees the noise of the uncached run, and a row does not depend on its batch.
    """

    block = 64  # positions drawn from one seed

    def __init__(self, config):
        self.std = config.state_init_std
        self.seed, self.table = 0, torch.empty(0, config.hidden_size)  # the noise drawn last, (positions, D)

    def __call__(self, embeds, position_ids, generator, training):
        if training:
            noise = torch.randn(embeds.shape, generator=generator, device=embeds.device, dtype=torch.float32)
        else:
            seed = 0 if generator is None else generator.initial_seed()
            noise = self._rows(int(position_ids.max()) + 1, seed).to(embeds.device)[position_ids].expand(embeds.shape)
        return (self.std * noise).to(embeds.dtype)

    def _rows(self, num_positions: int, seed: int) -> torch.Tensor:
        """At least `num_positions` rows of noise; each block has a seed of its own, so that more only append."""
        if seed != self.seed:
            self.seed, self.table = seed, self.table[:0]
        while len(self.table) < num_positions:
            block = torch.Generator().manual_seed((seed * 1_000_003 + len(self.table)) % 2**63)
            drawn = torch.randn(self.block, self.table.shape[1], generator=block)
            self.table = torch.cat([self.table, drawn])
        return self.table


STARTS = {"embeddings": EmbeddingsStart, "zeros": ZerosStart, "normal": NormalStart}
