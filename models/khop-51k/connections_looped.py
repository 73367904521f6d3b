"""Loop connections: how the state enters and leaves one loop of the core.

    state    = connection.open(start, e)                  # once; `start` (B, T, D): the initial state
    x, carry = connection.read(state, e, loop)            # x (B, T, D): what the core runs on
    state    = connection.write(state, carry, out, loop)  # out = core(x), (B, T, D)
    h        = connection.close(state)                    # (B, T, D): what the coda and the readout see

`carry` is whatever `read` computed and `write` needs again. Nobody else looks inside; connections that carry nothing
return None.

A state is one tensor, (B, T, D) or, with S streams, (B, T, S, D). Batch rows come first, so that those that halt can
leave by indexing. Legend: B batch rows, T tokens, D hidden size, S streams, V vocabulary. Loops are counted from 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .initial_looped import SetsInitialValues


class Connection(nn.Module, ABC):
    """A loop connection. Unless a subclass says otherwise, the state is the core's output.

    Attributes:
        reads_embeds: every loop reads the prelude's output; otherwise only the initial state may bring in the input.
        closes_with_norm: the state after a loop is the core's output, which `norm_between_loops` has normalised: where
            nothing comes after the last loop, it needs no final norm.
        counts_loops: what a loop does depends on how many loops there are: the state after k of K loops is not the
            state that k loops end in.
        tells_loops: what a loop does depends on its number.
    """

    reads_embeds: ClassVar[bool] = False
    closes_with_norm: ClassVar[bool] = True
    counts_loops: ClassVar[bool] = False
    tells_loops: ClassVar[bool] = False

    def __init__(self, config):
        super().__init__()

    @classmethod
    def of(cls, config) -> "type[Connection]":
        """The class to make for a configuration: this one, unless other fields choose among several."""
        return cls

    @classmethod
    @abstractmethod
    def flops(cls, config, loops: range) -> int:
        """Matrix-product FLOPs (2 per multiply-add) of these loops, per token."""

    @classmethod
    def has_parameters_per_loop(cls, config) -> bool:
        """Whether every loop has parameters of its own, of which `max_num_loops` are held."""
        return False

    def bind(self, readout: Callable, embed: Callable) -> None:
        """Give it the language model that it is part of, once.

        Args:
            readout: norm and head, a state (B, T, D) -> logits (B, T, V).
            embed: tokens (...) -> their embeddings (..., D), as the prelude reads them but without positions.
        """

    def at(self, num_loops: int | torch.Tensor) -> "Connection | DampedAt":
        """What reads and writes for batch rows of `num_loops` loops, an int or (b,): this, unless it counts loops."""
        return self

    def open(self, start: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """The initial state and the prelude's output, (B, T, D) each -> the state, (B, T, D) or (B, T, S, D)."""
        return start

    @abstractmethod
    def read(self, state: torch.Tensor, embeds: torch.Tensor, loop: int) -> tuple[torch.Tensor, Any]:
        """The state and the prelude's output (B, T, D) -> what the core runs on, (B, T, D), and `carry`."""

    def write(self, state: torch.Tensor, carry: Any, output: torch.Tensor, loop: int) -> torch.Tensor:
        """The state before the loop, `carry` and the core's output (B, T, D) -> the state after it, a new tensor."""
        return output

    def close(self, state: torch.Tensor) -> torch.Tensor:
        """The state -> what the coda and the readout see, (B, T, D)."""
        return state


@final
class PlainConnection(Connection):
    """state = core(state): nothing is added between loops (Loop, Think & Generalize, arXiv 2604.07822)."""

    @classmethod
    def flops(cls, config, loops) -> int:
        return 0

    def read(self, state, embeds, loop):
        return state, None


@final
class InjectAddConnection(Connection):
    """state = core(state + e) from the second loop on; the first reads the initial state, or e where that is zero.

    With `state_init="embeddings"` the first loop reads e and later ones h + e (arXiv 2604.07822, input injection), so
    the sum is formed in every loop from a zero start, which is the same thing without a special first loop.
    """

    reads_embeds = True

    def __init__(self, config):
        super().__init__(config)
        self.starts_at_embeddings = config.state_init == "embeddings"

    @classmethod
    def flops(cls, config, loops) -> int:
        return 0

    def open(self, start, embeds):
        return torch.zeros_like(start) if self.starts_at_embeddings else start

    def read(self, state, embeds, loop):
        return state + embeds, None


@final
class InjectConcatConnection(Connection):
    """state = core(adapter([state, e])), a learned 2D -> D adapter (Huginn, arXiv 2502.05171)."""

    reads_embeds = True

    def __init__(self, config):
        super().__init__(config)
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    @classmethod
    def flops(cls, config, loops) -> int:
        return len(loops) * 4 * config.hidden_size**2

    def read(self, state, embeds, loop):
        return self.adapter(torch.cat([state, embeds], dim=-1)), None


def logit(share: float, nearest: float = 1e-4) -> float:
    """ln(p / (1 - p)) of a share p. One stream or one loop asks for 0 or 1, where it is infinite: p stays `nearest`
    away from them."""
    share = min(max(share, nearest), 1 - nearest)
    return math.log(share / (1 - share))


@dataclass(frozen=True)
class HyperInit:
    """What fresh stream gates let through, of S streams and so many loops.

    At the start F(u), the core's output, is close to u: a loop scales the streams by about keep + write * S * read.

    Args:
        read: (S, loops) -> share of each stream that the core reads, in (0, 1).
        write: (S, loops) -> share of the core's output that each stream gets, in (0, 2).
        keep: (S, loops) -> share of a stream that stays, in (0, 1).
        scale: initial a, the weight of the streams in the logits.
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


class Gates(nn.Module, SetsInitialValues):
    """Logits of all stream gates of one loop, in one matrix product: a W RMSNorm(flatten(y)) + b of the streams y.

    They are computed in float32, whatever the precision around them. W, (gates, S * D), is random on purpose: streams
    start as copies, and with equal gates they would stay copies.

    Args:
        biases: of each kind of gate, the initial biases of its gates; every kind has one scale a.
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
        init.normal_(self.weight, mean=0.0, std=self.weight_std)
        init.copy_(self.bias, torch.tensor(self.initial_bias))
        init.constant_(self.scale, self.initial_scale)

    def logits(self, streams: torch.Tensor) -> Sequence[torch.Tensor]:
        """(B, T, S, D) -> the logits (B, T, gates) of each kind."""
        with torch.autocast(streams.device.type, enabled=False):
            flat = streams.flatten(-2).float()
            # The norm is one factor per token: it is applied to the few logits instead of to all channels.
            mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square() / flat.shape[-1]
            scale = torch.cat([a.expand(size) for a, size in zip(self.scale.float(), self.sizes, strict=True)])
            logits = F.linear(flat, self.weight.float()) * torch.rsqrt(mean_square + self.eps)
            return (logits * scale + self.bias.float()).split(self.sizes, dim=-1)


class Mixing(ABC):
    """H_res y, how a loop keeps the streams y, by stream gates."""

    @abstractmethod
    def biases(self, num_streams: int, keep: float) -> list[list[float]]:
        """Initial biases of the gates of H_res, by kind; `keep` is the share of a stream that stays, in (0, 1)."""

    def products(self, num_streams: int) -> int:
        """Multiply-adds per channel of the matrix product H_res y."""
        return 0

    @abstractmethod
    def __call__(self, streams: torch.Tensor, *logits: torch.Tensor) -> torch.Tensor:
        """The streams (B, T, S, D) and the logits (B, T, gates) of each kind of gate -> (B, T, S, D)."""


@final
class DiagonalMixing(Mixing):
    """H_res = diag(sigmoid(logits)): each stream is scaled by a gate of its own (Hyperloop, arXiv 2604.21254)."""

    def biases(self, num_streams, keep):
        return [[logit(keep)] * num_streams]

    def __call__(self, streams, logits):
        h_res = logits.sigmoid().to(streams.dtype)  # (B, T, S)
        return h_res.unsqueeze(-1) * streams


@final
class IdentityMixing(Mixing):
    """H_res = I: streams are kept whole, without gates."""

    def biases(self, num_streams, keep):
        return []

    def __call__(self, streams):
        return streams


@final
class SinkhornMixing(Mixing):
    """H_res is a doubly stochastic matrix: exp(logits), its rows and columns scaled to sum to 1 in turn (mHC, arXiv
    2512.24880). It starts near the identity."""

    iterations = 20
    diagonal = 4.0

    def biases(self, num_streams, keep):
        return [[self.diagonal * (row == column) for row in range(num_streams) for column in range(num_streams)]]

    def products(self, num_streams):
        return num_streams**2

    def __call__(self, streams, logits):
        logs = logits.unflatten(-1, (streams.shape[-2], streams.shape[-2]))
        for _ in range(self.iterations):
            logs = logs.log_softmax(-1).log_softmax(-2)
        h_res = logs.exp().to(streams.dtype)  # (B, T, S, S)
        return h_res @ streams


MIXINGS: dict[str, type[Mixing]] = {
    "diagonal": DiagonalMixing,
    "identity": IdentityMixing,
    "sinkhorn": SinkhornMixing,
}


@final
class HyperGates(Gates):
    """All stream gates of a loop, and what they let the core read: x = H_pre y (Hyperloop, arXiv 2604.21254).

        h_pre = sigmoid(logits)              (S,) per token, a row vector H_pre

    The logits of H_post and H_res come from the same streams y: one look at the streams gives all gates.
    """

    def __init__(self, config, loop: int):
        start, streams, loops = HYPER_INITS[config.hyper_init], config.num_streams, loops_of_start(config)
        pre = [logit(start.read(streams, loops))] * streams
        post = [logit(start.write(streams, loops) / 2)] * streams
        res = MIXINGS[config.hyper_mixing]().biases(streams, start.keep(streams, loops))
        super().__init__(config, [pre, post, *res])

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """(B, T, S, D) -> x (B, T, D), and the logits (B, T, gates) of H_post and, by kind, of H_res."""
        pre, *post_and_res = self.logits(state)
        h_pre = pre.sigmoid().to(state.dtype)  # (B, T, S)
        return (h_pre.unsqueeze(-1) * state).sum(-2), post_and_res


@final
class HyperWrite(nn.Module):
    """y' = H_res y + H_post output (Hyperloop, arXiv 2604.21254).

    h_post = 2 sigmoid(logits)           (S,) per token, a column vector H_post
    H_res                                by `hyper_mixing`
    """

    def __init__(self, config):
        super().__init__()
        self.mixing = MIXINGS[config.hyper_mixing]()

    def forward(self, state: torch.Tensor, logits: Sequence[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D), the logits that `HyperGates` gives, (B, T, D) -> (B, T, S, D)."""
        post, *res = logits
        h_post = (2 * post.sigmoid()).to(state.dtype)  # (B, T, S)
        return torch.addcmul(self.mixing(state, *res), h_post.unsqueeze(-1), output.to(state.dtype).unsqueeze(-2))


def loops_of_start(config) -> int:
    """L of the "euler" start."""
    return config.num_loops if config.max_num_loops is None else config.max_num_loops


class Scalars(nn.Module, SetsInitialValues):
    """Learned scalars that start at given values, as one vector: a matrix would be decayed towards zero."""

    def __init__(self, values: Sequence[float]):
        super().__init__()
        self.initial_weights = list(values)
        self.weights = nn.Parameter(torch.empty(len(values)))

    def initialize(self) -> None:
        init.copy_(self.weights, torch.tensor(self.initial_weights))


@final
class StaticRead(Scalars):
    """x = H_pre y, one scalar per stream; loop i starts with stream i mod S alone (arXiv 2604.21106, alpha)."""

    def __init__(self, config, loop: int):
        super().__init__([float(stream == loop % config.num_streams) for stream in range(config.num_streams)])

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D) -> (B, T, D)."""
        h_pre = self.weights.to(state.dtype)  # (S,)
        return (h_pre.unsqueeze(-1) * state).sum(-2)


@final
class StaticWrite(Scalars):
    """y' = H_res y + H_post output; H_res (S, S) starts at the identity, H_post (S,) at ones (arXiv 2604.21106, M and
    beta)."""

    def __init__(self, config, loop: int):
        streams = range(config.num_streams)
        super().__init__([float(row == column) for row in streams for column in streams] + [1.0 for _ in streams])

    def forward(self, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D), (B, T, D) -> (B, T, S, D)."""
        streams = state.shape[-2]
        h_res, h_post = self.weights.to(state.dtype).split([streams * streams, streams])
        mixed = h_res.view(streams, streams) @ state
        return torch.addcmul(mixed, h_post.unsqueeze(-1), output.to(state.dtype).unsqueeze(-2))


def own_gates(loop: int) -> int:
    """Which of the gates that are held belong to a loop: its own."""
    return loop


def gates_of_all(loop: int) -> int:
    """The same in every loop."""
    return 0


GATES_OF_LOOP = {"per_loop": own_gates, "shared": gates_of_all}  # named functions: a model that holds one is pickled


class HyperConnection(Connection):
    """S streams y between loops, which start as copies (Hyperloop, arXiv 2604.21254).

        x  = H_pre y                                          what the core runs on
        y' = H_res y + H_post (core(x) + e)                   e: the loop's embedding

    Every loop has its own H_pre, H_post and H_res (`hyper_gates="per_loop"`), or all loops have the same.
    """

    closes_with_norm = False

    def __init__(self, config):
        super().__init__(config)
        self.num_streams = config.num_streams
        self.index = GATES_OF_LOOP[config.hyper_gates]

    @classmethod
    def of(cls, config):
        return HYPER_CONNECTIONS[config.hyper_mixing]

    @classmethod
    def has_parameters_per_loop(cls, config) -> bool:
        return config.hyper_gates == "per_loop"

    @classmethod
    def loops_held(cls, config) -> range:
        """The loops whose parameters are held."""
        return range(config.max_num_loops if cls.has_parameters_per_loop(config) else 1)

    def open(self, start, embeds):
        return start.unsqueeze(-2).expand(-1, -1, self.num_streams, -1)


@final
class GatedHyperConnection(HyperConnection):
    """H_pre, H_post and H_res are gates that look at the streams; the streams end as their mean."""

    def __init__(self, config):
        super().__init__(config)
        self.gates = nn.ModuleList([HyperGates(config, loop) for loop in self.loops_held(config)])
        self.writing = HyperWrite(config)

    @classmethod
    def flops(cls, config, loops) -> int:
        streams, mixing = config.num_streams, MIXINGS[config.hyper_mixing]()
        gates = 2 * streams + sum(len(kind) for kind in mixing.biases(streams, keep=0.5))
        return len(loops) * 2 * config.hidden_size * (streams * gates + mixing.products(streams))

    def read(self, state, embeds, loop):
        return self.gates[self.index(loop)](state)

    def write(self, state, carry, output, loop):
        return self.writing(state, carry, output)

    def close(self, state):
        return state.mean(-2)


@final
class StaticHyperConnection(HyperConnection):
    """H_pre, H_post and H_res are learned scalars; the streams are summed at the end (arXiv 2604.21106, which also
    normalises the core's output in each loop: `norm_between_loops`)."""

    def __init__(self, config):
        super().__init__(config)
        self.reads = nn.ModuleList([StaticRead(config, loop) for loop in self.loops_held(config)])
        self.writes = nn.ModuleList([StaticWrite(config, loop) for loop in self.loops_held(config)])

    @classmethod
    def flops(cls, config, loops) -> int:
        return len(loops) * 2 * config.num_streams**2 * config.hidden_size

    def read(self, state, embeds, loop):
        return self.reads[self.index(loop)](state), None

    def write(self, state, carry, output, loop):
        return self.writes[self.index(loop)](state, output)

    def close(self, state):
        return state.sum(-2)


@final
class DampedSteps(Scalars):
    """What `DampedConnection` does to the state; its two weights are beta and T."""

    def __init__(self, config):
        super().__init__([config.damped_beta, config.damped_horizon])

    def forward(
        self, state: torch.Tensor, output: torch.Tensor, loop: int, num_loops: int | torch.Tensor
    ) -> torch.Tensor:
        """(B, T, 3, D), the core's output (B, T, D) in a loop of so many, an int or (B,) -> (B, T, 3, D)."""
        # In float32 at least: a share such as 1/3 is no number of bf16.
        precise = torch.promote_types(state.dtype, torch.float32)
        beta, horizon = self.weights.to(precise)
        if isinstance(num_loops, torch.Tensor):
            num_loops = num_loops.to(state.device, precise).view(-1, 1, 1)
        x, natural, _ = state.to(precise).unbind(-2)
        output = output.to(precise)
        natural = output if loop == 0 else natural
        # From x the one step, and all steps that are left, along the same slope.
        step, rest = horizon * (1 / num_loops), horizon * ((num_loops - loop) / num_loops)
        end = torch.lerp(torch.lerp(x, output, rest), natural, beta)
        return torch.stack([torch.lerp(x, output, step), natural, end], dim=-2).to(state.dtype)


@final
class DampedConnection(Connection):
    """The loop refines the one step that the core is into K smaller ones (arXiv 2605.23872).

        y     = core(x_0)                                  the core's own output, of the first loop
        x_k+1 = x_k + T / K (core(x_k) - x_k)
        state = beta y + (1 - beta) x_K

    At one loop this is the plain loop, and at K loops the blend of `frozen_looped.py`, for the two scalars' initial
    values `damped_beta` = 0.5 and `damped_horizon` = 1; both are trained. What is read after k < K loops, by a halting
    rule for one, goes the rest of the way along the last slope: after the first loop that is y.

    The three streams of a state are x_k, y and what is read, so that batch rows may leave after any loop.
    """

    closes_with_norm = False
    counts_loops = tells_loops = True

    def __init__(self, config):
        super().__init__(config)
        self.steps = DampedSteps(config)

    @classmethod
    def flops(cls, config, loops) -> int:
        return 0

    def at(self, num_loops):
        return DampedAt(self, num_loops)

    def open(self, start, embeds):
        return start.unsqueeze(-2).expand(-1, -1, 3, -1)

    def read(self, state, embeds, loop):
        return state[..., 0, :], None

    def close(self, state):
        return state[..., 2, :]


@final
class DampedAt:
    """`DampedConnection` for batch rows that run `num_loops` loops, an int or (b,). The verbs are a connection's."""

    def __init__(self, connection: DampedConnection, num_loops: int | torch.Tensor):
        self.read, self.steps, self.num_loops = connection.read, connection.steps, num_loops

    def write(self, state, carry, output, loop):
        """As `Connection.write`, with steps that are as long as each row's loop count wants."""
        return self.steps(state, output, loop, self.num_loops)


class DiscreteChannel(ABC):
    """Which token embedding stands for what the head reads from a state."""

    products: ClassVar[int]  # of (B * T, D) with (D, V) matrices

    @abstractmethod
    def __call__(self, logits: torch.Tensor, embed: Callable) -> torch.Tensor:
        """Logits (B, T, V) and `embed` of `Connection.bind` -> (B, T, D)."""


@final
class ExpectedEmbedding(DiscreteChannel):
    """The embedding that is expected of a token drawn by softmax(logits). A gradient goes through the head."""

    products = 2

    def __call__(self, logits, embed):
        table = embed(torch.arange(logits.shape[-1], device=logits.device))  # (V, D)
        return logits.float().softmax(-1).to(table) @ table


@final
class LikeliestEmbedding(DiscreteChannel):
    """The embedding of the likeliest token. No gradient goes through the choice."""

    products = 1

    def __call__(self, logits, embed):
        return embed(logits.argmax(-1))


DISCRETE_CHANNELS: dict[str, type[DiscreteChannel]] = {"expected": ExpectedEmbedding, "likeliest": LikeliestEmbedding}


@final
class DiscoMix(Scalars):
    """a h + b d of the state h and the discrete channel d; the two weights are a and b."""

    def __init__(self, config):
        super().__init__([1 - config.disco_weight, config.disco_weight])

    def forward(self, state: torch.Tensor, discrete: torch.Tensor) -> torch.Tensor:
        """(B, T, D), (B, T, D) -> (B, T, D)."""
        keep, add = self.weights.to(state.dtype)
        return keep * state + add * discrete.to(state)


@final
class DiscoConnection(Connection):
    """Two channels go from loop to loop: the state h, and the embedding d of what the head reads from it (DiscoLoop,
    arXiv 2607.00341).

        d     = E[head(norm(h))]                 from the second loop on; by `disco_channel`
        state = core(a h + b d)

    The paper's abstract says no more than that the recurrence carries a discrete and a continuous channel. Ours is how
    they are mixed, by two trained scalars, which start at 1 - `disco_weight` and `disco_weight`; that the first loop
    reads the initial state alone, where nothing has been decoded yet; and that d is computed when a loop begins, so
    that the state stays one tensor and the head is not read once more after the last loop. With b = 0 this is the
    plain loop. Layers of a coda are not run for d, and d has no position.

    Before every loop but the first the head is read at every token: 2 D V FLOPs, and as many for the expected
    embedding. The head is the language model's: a base model alone, or one that scores classes, is refused.
    """

    tells_loops = True

    def __init__(self, config):
        super().__init__(config)
        self.channel = DISCRETE_CHANNELS[config.disco_channel]()
        self.mix = DiscoMix(config)
        self.words: tuple[Callable, Callable] | None = None  # what `bind` gives

    @classmethod
    def flops(cls, config, loops) -> int:
        reads = len(loops) - (0 in loops)  # the first loop reads no head
        return reads * DISCRETE_CHANNELS[config.disco_channel].products * 2 * config.hidden_size * config.vocab_size

    def bind(self, readout, embed):
        self.words = readout, embed

    def open(self, start, embeds):
        if self.words is None:
            raise ValueError(
                "loop_connection='disco' reads the head of a language model between loops, which this model lacks: "
                "use LoopedForCausalLM, or another loop_connection."
            )
        return start

    def read(self, state, embeds, loop):
        if loop == 0:
            return state, None
        assert self.words is not None
        readout, embed = self.words
        return self.mix(state, self.channel(readout(state), embed)), None


HYPER_CONNECTIONS: dict[str, type[HyperConnection]] = {
    **dict.fromkeys(MIXINGS, GatedHyperConnection),
    "static": StaticHyperConnection,
}
CONNECTIONS: dict[str, type[Connection]] = {
    "plain": PlainConnection,
    "inject_add": InjectAddConnection,
    "inject_concat": InjectConcatConnection,
    "hyper": HyperConnection,
    "damped": DampedConnection,
    "disco": DiscoConnection,
}


class LoopEmbedding(ABC):
    """What is added to the core's output to say which loop it was."""

    has_parameters_per_loop: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, config): ...

    @abstractmethod
    def __call__(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        """The core's output (B, T, D) in a loop counted from 0 -> (B, T, D)."""


@final
class NoLoopEmbedding(LoopEmbedding):
    """The core's output as it is."""

    def __init__(self, config):
        pass

    def __call__(self, output, loop):
        return output


@final
class LoopVectors(nn.ParameterList, SetsInitialValues):
    """A vector (D,) for each loop: vectors, not a matrix, since they are not to be decayed.

    A list with a forward: what brings offloaded or sharded parameters to their device does so around the forward of
    the module that holds them.
    """

    __call__ = nn.Module.__call__

    def initialize(self) -> None:
        for vector in self:
            init.zeros_(vector)

    def forward(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        """(B, T, D) -> (B, T, D) with the loop's vector added."""
        return output + self[loop].to(output.dtype)


@final
class LearnedLoopEmbedding(nn.Module, LoopEmbedding):
    """A vector for each of `max_num_loops` loops, added to the core's output (2604.21254, e_l); zero at the start."""

    has_parameters_per_loop = True

    def __init__(self, config):
        super().__init__()
        self.vectors = LoopVectors(torch.zeros(config.hidden_size) for _ in range(config.max_num_loops))

    def forward(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        return self.vectors(output, loop)


@final
class SinusoidalLoopEmbedding(nn.Module, LoopEmbedding, SetsInitialValues):
    """Waves of the loop's number, each channel with a learned height that starts at zero: any loop has one."""

    def __init__(self, config):
        super().__init__()
        self.height = nn.Parameter(torch.zeros(config.hidden_size))

    def initialize(self) -> None:
        init.zeros_(self.height)

    def forward(self, output: torch.Tensor, loop: int) -> torch.Tensor:
        # In float32 whatever the default dtype of the moment.
        channels = torch.arange(len(self.height), device=output.device, dtype=torch.float32)
        angles = loop * 10_000.0 ** (-(channels // 2 * 2) / len(self.height))
        waves = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
        return output + (self.height * waves).to(output.dtype)


LOOP_EMBEDDINGS: dict[str, type[LoopEmbedding]] = {
    "none": NoLoopEmbedding,
    "learned": LearnedLoopEmbedding,
    "sinusoidal": SinusoidalLoopEmbedding,
}


class Start(ABC):
    """The initial state of the loop."""

    def __init__(self, config):  # noqa: B027 (most starts need nothing of it)
        pass

    def prepare(self, num_positions: int, generator: torch.Generator | None, device: torch.device) -> None:  # noqa: B027
        """Have ready what evaluation reads at so many positions, for a graph that cannot draw it."""

    def in_graph(self, generator: torch.Generator | None, num_positions: int | None) -> bool:
        """Whether a graph in the making can have the start of evaluation in it; arguments as of `__call__`."""
        return True

    @abstractmethod
    def __call__(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        generator: torch.Generator | None,
        training: bool,
        num_positions: int | None = None,
    ) -> torch.Tensor:
        """The initial state, (B, T, D), in the precision of `embeds`.

        Args:
            embeds: (B, T, D), the prelude's output.
            position_ids: (B or 1, T).
            generator: source of randomness, or None for a fixed one.
            training: whether dropout and other noise are drawn anew in every call.
            num_positions: no position is as large, if the host knows such a number: it need not ask the device.
        """


@final
class EmbeddingsStart(Start):
    """The loop starts from the prelude's output."""

    def __call__(self, embeds, position_ids, generator, training, num_positions=None):
        return embeds


@final
class ZerosStart(Start):
    """The loop starts from zero; only a connection that injects e makes sense of it."""

    def __call__(self, embeds, position_ids, generator, training, num_positions=None):
        return torch.zeros_like(embeds)


class NormalStart(Start):
    """The loop starts from N(0, state_init_std^2) (Huginn, arXiv 2502.05171).

    While training every batch row and token draws its own noise. In evaluation the noise is a function of the
    generator's seed (0 without a generator) and of the token's position only: the same call twice gives the same
    logits, a cached step sees the noise of the uncached run, and a batch row does not depend on its batch.
    """

    block = 64  # positions drawn from one seed

    def __init__(self, config):
        self.std, self.hidden_size = config.state_init_std, config.hidden_size
        # Seed and noise drawn last, and the same on the device that used it last; each replaced as one, since threads
        # share it.
        self.drawn = (0, self._empty())
        self.placed = (0, self._empty())

    def prepare(self, num_positions, generator, device):
        if generator is None:
            self._noise_on(device, num_positions, seed=0)

    def in_graph(self, generator, num_positions):
        # A call before, such as that of the prompt, has drawn what a graph looks up.
        seed, table = self.placed
        return generator is None and seed == 0 and num_positions is not None and num_positions <= len(table)

    def __call__(self, embeds, position_ids, generator, training, num_positions=None):
        if training:
            noise = self.draw(embeds.shape, generator, embeds.device)
        elif torch.compiler.is_compiling():
            noise = self.placed[1][position_ids].expand(embeds.shape)
        else:
            seed = 0 if generator is None else generator.initial_seed()
            needed = int(position_ids.max()) + 1 if num_positions is None else num_positions
            noise = self._noise_on(embeds.device, needed, seed)[position_ids].expand(embeds.shape)
        return (self.std * noise).to(embeds.dtype)

    def _noise_on(self, device: torch.device, num_positions: int, seed: int) -> torch.Tensor:
        """As `_noise`, on a device."""
        placed_seed, table = self.placed
        if placed_seed != seed or table.device != device or len(table) < num_positions:
            table = self._noise(num_positions, seed).to(device)
            self.placed = (seed, table)
        return table

    def draw(self, shape, generator: torch.Generator | None, device) -> torch.Tensor:
        """Noise of this shape and of standard deviation 1, in float32."""
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    def _noise(self, num_positions: int, seed: int) -> torch.Tensor:
        """Noise of at least `num_positions` positions, (positions, D). Each block of positions has its own seed: more
        positions only append blocks."""
        drawn_seed, table = self.drawn
        table = table if seed == drawn_seed else self._empty()
        while len(table) < num_positions:
            block = torch.Generator("cpu").manual_seed((seed * 1_000_003 + len(table)) % 2**63)
            table = torch.cat([table, self.draw((self.block, self.hidden_size), block, "cpu")])
        self.drawn = (seed, table)
        return table

    def _empty(self) -> torch.Tensor:
        # On the CPU and in float32 whatever the defaults of the moment, such as those a model is loaded under.
        return torch.empty(0, self.hidden_size, device="cpu", dtype=torch.float32)


@final
class TruncatedNormalStart(NormalStart):
    """As `NormalStart`, without what is beyond three standard deviations (Huginn's published code)."""

    def draw(self, shape, generator, device):
        noise = torch.empty(shape, device=device, dtype=torch.float32)
        return nn.init.trunc_normal_(noise, a=-3.0, b=3.0, generator=generator)


STARTS: dict[str, type[Start]] = {
    "embeddings": EmbeddingsStart,
    "zeros": ZerosStart,
    "normal": NormalStart,
    "truncated_normal": TruncatedNormalStart,
}
