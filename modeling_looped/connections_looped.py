"""Loop connections: how the state enters and leaves one pass over the core.

    state    = connection.open(start, e)                  # once; `start` (B, T, D): the initial state
    x, gates = connection.read(state, e, loop)            # x (B, T, D): what the core runs on
    state    = connection.write(state, gates, out, loop)  # out = core(x), (B, T, D)
    h        = connection.close(state)                    # (B, T, D): what the coda and the readout see

What `read` found out about the state and `write` needs as well, the connection's own, goes by the name of gates.

A state is one tensor, (B, T, D) or, with S streams, (B, T, S, D): its rows come first, so that they can leave it.
Legend: B rows, T tokens, D hidden size, S streams.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


class PlainConnection(nn.Module):
    """state = core(state): nothing is added between loops (Loop, Think & Generalize, arXiv 2604.07822)."""

    def __init__(self, config):
        super().__init__()

    def open(self, start: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return start

    def read(self, state: torch.Tensor, embeds: torch.Tensor, loop: int) -> tuple[torch.Tensor, object]:
        return state, None

    def write(self, state: torch.Tensor, gates: object, output: torch.Tensor, loop: int) -> torch.Tensor:
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

    def read(self, state, embeds, loop):
        return state + embeds, None


class InjectConcatConnection(PlainConnection):
    """state = core(adapter([state, e])), a learned 2D -> D adapter (Huginn, arXiv 2502.05171)."""

    def __init__(self, config):
        super().__init__(config)
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def read(self, state, embeds, loop):
        return self.adapter(torch.cat([state, embeds], dim=-1)), None


def logit(share: float, nearest: float = 1e-4) -> float:
    """ln(p / (1 - p)) of a share, kept off 0 and 1, which one stream or one loop asks for: there it is infinite."""
    share = min(max(share, nearest), 1 - nearest)
    return math.log(share / (1 - share))


@dataclass(frozen=True)
class HyperInit:
    """What fresh gates let through. F(u) is close to u at the start, so a loop scales the streams by about
    keep + write * S * read.

    Args:
        read: (S, loops) -> share of each stream that the core reads, in (0, 1).
        write: (S, loops) -> share of the core's output that each stream gets, in (0, 2).
        keep: (S, loops) -> share of a stream that stays, in (0, 1).
        scale: initial a, the share of the streams in the logits.
    """

    read: Callable[[int, int], float]
    write: Callable[[int, int], float]
    keep: Callable[[int, int], float]
    scale: float = 0.01


HYPER_INITS = {
    # y <- y / 2 + F(y) / 2: the streams keep their size.
    "norm_preserving": HyperInit(lambda n, loops: 1 / n, lambda n, loops: 0.5, lambda n, loops: 0.5),
    # y <- (1 - 1/L) y + F(y) / L, exactly: a pretrained core in the damped Euler loop of frozen_looped.py.
    "euler": HyperInit(lambda n, loops: 1 / n, lambda n, loops: 1 / loops, lambda n, loops: 1 - 1 / loops, scale=0.0),
    # Near y <- F(y), the plain loop; still nearer, the gate would have no gradient left.
    "plain": HyperInit(lambda n, loops: 1 / n, lambda n, loops: 1.0, lambda n, loops: 1 / (1 + math.e**2)),
    # Every b is 0.
    "zero": HyperInit(lambda n, loops: 0.5, lambda n, loops: 1.0, lambda n, loops: 0.5),
}


class Gates(nn.Module):
    """Logits of token-wise gates, a W RMSNorm(flatten(streams)) + b, float32 whatever the precision around them.

    The gates of one loop that are asked for together: `biases` holds the initial b of each kind, and each kind has its
    own scalar a. W is (gates, S * D) and drawn: streams that start as copies and had equal gates would stay copies.
    """

    weight_std = 0.02

    def __init__(self, config, biases: Sequence[Sequence[float]]):
        super().__init__()
        self.sizes = [len(kind) for kind in biases]
        self.initial_bias = [value for kind in biases for value in kind]
        self.initial_scale = HYPER_INITS[config.hyper_init].scale
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(len(self.initial_bias), config.num_streams * config.hidden_size))
        self.bias = nn.Parameter(torch.empty(len(self.initial_bias)))
        self.scale = nn.Parameter(torch.empty(len(biases)))

    def initialize(self) -> None:
        """Values of a fresh model; those that were loaded stay."""
        init.normal_(self.weight, mean=0.0, std=self.weight_std)
        init.copy_(self.bias, torch.tensor(self.initial_bias))
        init.constant_(self.scale, self.initial_scale)

    def logits(self, streams: torch.Tensor) -> Sequence[torch.Tensor]:
        """(B, T, S, D) -> the (B, T, gates) logits of each kind."""
        with torch.autocast(streams.device.type, enabled=False):
            flat = streams.flatten(-2).float()
            # The norm is one factor per token: it is applied to the few logits instead of to all channels.
            mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1]
            scale = torch.cat([a.expand(size) for a, size in zip(self.scale.float(), self.sizes, strict=True)])
            logits = F.linear(flat, self.weight.float()) * torch.rsqrt(mean_square + self.eps)
            return (logits * scale + self.bias.float()).split(self.sizes, dim=-1)


class DiagonalMixing:
    """Each stream is scaled by a gate of its own, H_res of Hyperloop."""

    def biases(self, num_streams: int, keep: float) -> list[list[float]]:
        """Initial b of the gates it needs."""
        return [[logit(keep)] * num_streams]

    def __call__(self, streams: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D), (B, T, gates) -> (B, T, S, D)."""
        return logits.sigmoid().to(streams.dtype).unsqueeze(-1) * streams


class IdentityMixing:
    """Streams are kept whole; it needs no gates."""

    def biases(self, num_streams: int, keep: float) -> list[list[float]]:
        return []

    def __call__(self, streams: torch.Tensor) -> torch.Tensor:
        return streams


class SinkhornMixing:
    """Streams are mixed by a doubly stochastic matrix: exp(logits), its rows and columns scaled to sum to 1 in turn
    (mHC, arXiv 2512.24880). It starts near the identity."""

    iterations = 20
    diagonal = 4.0

    def biases(self, num_streams: int, keep: float) -> list[list[float]]:
        return [[self.diagonal * (row == column) for row in range(num_streams) for column in range(num_streams)]]

    def __call__(self, streams: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logs = logits.unflatten(-1, (streams.shape[-2], streams.shape[-2]))
        for _ in range(self.iterations):
            logs = logs.log_softmax(-1).log_softmax(-2)
        return logs.exp().to(streams.dtype) @ streams


MIXINGS = {"diagonal": DiagonalMixing, "identity": IdentityMixing, "sinkhorn": SinkhornMixing}


class HyperGates(Gates):
    """All gates of a loop, and what they let the core read: x = H_pre y (Hyperloop, arXiv 2604.21254).

    They are a W RMSNorm(flatten(y)) + b of the same streams y: one pass over them gives all.
    """

    def __init__(self, config, loop: int):
        start, streams, loops = HYPER_INITS[config.hyper_init], config.num_streams, loops_of_start(config)
        reading = [logit(start.read(streams, loops))] * streams
        writing = [logit(start.write(streams, loops) / 2)] * streams
        mixing = MIXINGS[config.hyper_mixing]().biases(streams, start.keep(streams, loops))
        super().__init__(config, [reading, writing, *mixing])

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """(B, T, S, D) -> x (B, T, D), and the logits (B, T, gates) of writing and mixing."""
        reading, *gates = self.logits(state)
        return (reading.sigmoid().to(state.dtype).unsqueeze(-1) * state).sum(-2), gates


class HyperWrite(nn.Module):
    """y' = H_res y + H_post output, H_post = 2 sigmoid(its logits) and H_res as the mixing has it."""

    def __init__(self, config):
        super().__init__()
        self.mixing = MIXINGS[config.hyper_mixing]()

    def forward(self, state: torch.Tensor, gates: Sequence[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D), the logits that `HyperGates` gives, (B, T, D) -> (B, T, S, D)."""
        writing, *mixing = gates
        shares = (2 * writing.sigmoid()).to(state.dtype)
        return torch.addcmul(self.mixing(state, *mixing), shares.unsqueeze(-1), output.to(state.dtype).unsqueeze(-2))


def loops_of_start(config) -> int:
    """L of the "euler" start."""
    return config.num_loops if config.max_num_loops is None else config.max_num_loops


class Scalars(nn.Module):
    """Learned scalars that start at given values, as one vector: a matrix would be decayed towards zero."""

    def __init__(self, values: Sequence[float]):
        super().__init__()
        self.initial_weights = list(values)
        self.weights = nn.Parameter(torch.empty(len(values)))

    def initialize(self) -> None:
        """Values of a fresh model; those that were loaded stay."""
        init.copy_(self.weights, torch.tensor(self.initial_weights))


class StaticRead(Scalars):
    """x = alpha y, one scalar per stream; loop i starts with stream i mod S alone (arXiv 2604.21106)."""

    def __init__(self, config, loop: int):
        super().__init__([float(stream == loop % config.num_streams) for stream in range(config.num_streams)])

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D) -> (B, T, D)."""
        return (self.weights.to(state.dtype).unsqueeze(-1) * state).sum(-2)


class StaticWrite(Scalars):
    """y' = M y + beta output, with M (S, S) starting at the identity and beta (S,) at ones (arXiv 2604.21106)."""

    def __init__(self, config, loop: int):
        streams = range(config.num_streams)
        super().__init__([float(row == column) for row in streams for column in streams] + [1.0 for _ in streams])

    def forward(self, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D), (B, T, D) -> (B, T, S, D)."""
        streams = state.shape[-2]
        mixing, writing = self.weights.to(state.dtype).split([streams * streams, streams])
        mixed = mixing.view(streams, streams) @ state
        return torch.addcmul(mixed, writing.unsqueeze(-1), output.to(state.dtype).unsqueeze(-2))


def own_gates(loop: int) -> int:
    """Which of the gates that are held belong to a loop: its own."""
    return loop


def gates_of_all(loop: int) -> int:
    """The same in every loop."""
    return 0


GATES_OF_LOOP = {"per_loop": own_gates, "shared": gates_of_all}  # named functions: a model that holds one is pickled


class HyperConnection(PlainConnection):
    """S streams between loops, that start as copies and end as their mean (Hyperloop, arXiv 2604.21254).

        x  = H_pre y                                          what the core runs on
        y' = H_res y + H_post (core(x) + e)                   e: the loop's embedding

    Each loop has its own gates (`hyper_gates="per_loop"`), or all loops the same.
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_streams = config.num_streams
        self.index = GATES_OF_LOOP[config.hyper_gates]
        self.held = config.max_num_loops if config.hyper_gates == "per_loop" else 1
        self.make(config)

    def make(self, config) -> None:
        self.gates = nn.ModuleList([HyperGates(config, loop) for loop in range(self.held)])
        self.writing = HyperWrite(config)

    def open(self, start: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return start.unsqueeze(-2).expand(-1, -1, self.num_streams, -1)

    def read(self, state, embeds, loop):
        return self.gates[self.index(loop)](state)

    def write(self, state, gates, output, loop):
        return self.writing(state, gates, output)

    def close(self, state: torch.Tensor) -> torch.Tensor:
        return state.mean(-2)


class StaticHyperConnection(HyperConnection):
    """Without gates; the streams are summed at the end (arXiv 2604.21106, which also normalises the core's output in
    each loop: `norm_between_loops`)."""

    def make(self, config) -> None:
        self.reads = nn.ModuleList([StaticRead(config, loop) for loop in range(self.held)])
        self.writes = nn.ModuleList([StaticWrite(config, loop) for loop in range(self.held)])

    def read(self, state, embeds, loop):
        return self.reads[self.index(loop)](state), None

    def write(self, state, gates, output, loop):
        return self.writes[self.index(loop)](state, output)

    def close(self, state: torch.Tensor) -> torch.Tensor:
        return state.sum(-2)


def make_hyper_connection(config) -> HyperConnection:
    return StaticHyperConnection(config) if config.hyper_mixing == "static" else HyperConnection(config)


CONNECTIONS = {
    "plain": PlainConnection,
    "inject_add": InjectAddConnection,
    "inject_concat": InjectConcatConnection,
    "hyper": make_hyper_connection,
}


class NoLoopEmbedding:
    """The core's output as it is."""

    def __init__(self, config):
        pass

    def __call__(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        return output


class LoopVectors(nn.ParameterList):
    """A vector (D,) for each loop: vectors, not a matrix, since they are not to be decayed.

    A list with a forward: what brings offloaded or sharded parameters to their device does so around the forward of
    the module that holds them.
    """

    __call__ = nn.Module.__call__

    def initialize(self) -> None:
        """Values of a fresh model; those that were loaded stay."""
        for vector in self:
            init.zeros_(vector)

    def forward(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        """(B, T, D) -> (B, T, D) with the loop's vector added."""
        return output + self[loop].to(output.dtype)


class LearnedLoopEmbedding(nn.Module):
    """A vector for each of `max_num_loops` loops, added to the core's output (2604.21254, e_l); zero at the start."""

    def __init__(self, config):
        super().__init__()
        self.vectors = LoopVectors(torch.zeros(config.hidden_size) for _ in range(config.max_num_loops))

    def forward(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.vectors(output, loop)


class SinusoidalLoopEmbedding(nn.Module):
    """Waves of the loop's number, each channel with a learned height that starts at zero: any loop has one."""

    def __init__(self, config):
        super().__init__()
        self.height = nn.Parameter(torch.zeros(config.hidden_size))

    def initialize(self) -> None:
        init.zeros_(self.height)

    def forward(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        # In float32 whatever the default dtype of the moment.
        channels = torch.arange(len(self.height), device=output.device, dtype=torch.float32)
        angles = loop * 10_000.0 ** (-(channels // 2 * 2) / len(self.height))
        waves = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
        return output + (self.height * waves).to(output.dtype)


LOOP_EMBEDDINGS = {"none": NoLoopEmbedding, "learned": LearnedLoopEmbedding, "sinusoidal": SinusoidalLoopEmbedding}
INITIALIZED = (Gates, Scalars, LoopVectors, SinusoidalLoopEmbedding)


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
        self.std, self.hidden_size = config.state_init_std, config.hidden_size
        self.drawn = (0, self._empty())  # seed and noise drawn last; replaced as one, since threads share it

    def __call__(self, embeds, position_ids, generator, training):
        if training:
            noise = torch.randn(embeds.shape, generator=generator, device=embeds.device, dtype=torch.float32)
        else:
            seed = 0 if generator is None else generator.initial_seed()
            noise = self._noise(int(position_ids.max()) + 1, seed).to(embeds.device)[position_ids].expand(embeds.shape)
        return (self.std * noise).to(embeds.dtype)

    def _noise(self, num_positions: int, seed: int) -> torch.Tensor:
        """At least `num_positions` rows, (positions, D); each block has its own seed, so that more only append."""
        drawn_seed, table = self.drawn
        table = table if seed == drawn_seed else self._empty()
        while len(table) < num_positions:
            block = torch.Generator("cpu").manual_seed((seed * 1_000_003 + len(table)) % 2**63)
            rows = torch.randn(self.block, self.hidden_size, generator=block, device="cpu", dtype=torch.float32)
            table = torch.cat([table, rows])
        self.drawn = (seed, table)
        return table

    def _empty(self) -> torch.Tensor:
        # On the CPU and in float32 whatever the defaults of the moment, such as those a model is loaded under.
        return torch.empty(0, self.hidden_size, device="cpu", dtype=torch.float32)


STARTS = {"embeddings": EmbeddingsStart, "zeros": ZerosStart, "normal": NormalStart}
