"""Floating-point operations of a forward pass, of a backward pass and of an update, counted from a configuration."""

from modeling_looped import LoopedConfig
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.connections_looped import CONNECTIONS
from modeling_looped.losses_looped import EXIT_LOSSES


def forward_flops(
    config: LoopedConfig, batch: int, tokens: int, num_loops: int, logits_kept: int | None = None
) -> int:
    """FLOPs of the matrix products of one forward pass, 2 per multiply-add.

    Attention counts all tokens x tokens pairs. Norms and activations do not count.

    Args:
        logits_kept: positions of a batch row that get logits, all unless given.
    """
    layers = config.num_prelude_layers + config.num_coda_layers
    return batch * (
        tokens * layers * layer_flops(config, tokens)
        + core_flops(config, tokens, 0, num_loops)
        + (logits_kept or tokens) * 2 * config.hidden_size * config.vocab_size
    )


def backward_flops(
    config: LoopedConfig,
    batch: int,
    tokens: int,
    num_loops: int,
    logits_kept: int | None = None,
    num_grad_loops: int | None = None,
) -> int:
    """FLOPs of the matrix products of the backward pass: twice those of the forward pass that it goes back through.
    Fewer where a choice has no gradient (`disco_channel="likeliest"`).

    Args:
        num_grad_loops: it goes back through so many of the last loops; through all unless given.
    """
    positions, first = logits_kept or tokens, max(num_loops - (num_grad_loops or num_loops), 0)
    if config.exit_gate and not EXIT_LOSSES[config.exit_loss].trains_all:
        return 2 * batch * positions * num_loops * config.hidden_size
    prelude = first == 0 or CONNECTIONS[config.loop_connection].reads_embeds
    layers = config.num_prelude_layers * prelude + config.num_coda_layers
    heads = exits_flops(config, num_loops) or 2 * config.hidden_size * config.vocab_size
    return (
        2
        * batch
        * (
            tokens * layers * layer_flops(config, tokens)
            + core_flops(config, tokens, first, num_loops)
            + positions * heads
        )
    )


def training_flops(
    config: LoopedConfig,
    batch: int,
    tokens: int,
    num_loops: int,
    logits_kept: int | None = None,
    num_grad_loops: int | None = None,
) -> int:
    """FLOPs of the matrix products of an update of `batch` rows; what is computed again to save memory is not counted.

    With an exit gate every loop is read out, and the logits of the last loop are computed once more. The teacher of a
    distillation does not count.

    Args:
        logits_kept, num_grad_loops: as in `forward_flops` and `backward_flops`.
    """
    exits = batch * (logits_kept or tokens) * exits_flops(config, num_loops)
    forward = forward_flops(config, batch, tokens, num_loops, logits_kept) + exits
    return forward + backward_flops(config, batch, tokens, num_loops, logits_kept, num_grad_loops)


def layer_flops(config: LoopedConfig, tokens: int) -> int:
    """Matrix-product FLOPs of one layer, per token of a row of `tokens` tokens."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * (2 * heads + 2 * keys) + 4 * tokens * heads
    return attention + 2 * hidden * config.intermediate_size * (3 if config.gated_mlp else 2)


def core_flops(config: LoopedConfig, tokens: int, first: int, last: int) -> int:
    """Matrix-product FLOPs of the loops first .. last - 1, counted from 0, of a row of `tokens` tokens."""
    loops = last - first
    # The first loop has nothing to mix.
    gates = (loops - (first == 0)) * config.num_core_layers * SHARINGS[config.kv_sharing].flops(config)
    layers = loops * config.num_core_layers * layer_flops(config, tokens)
    return tokens * (layers + connection_flops(config, range(first, last)) + gates)


def connection_flops(config: LoopedConfig, loops: range) -> int:
    """Matrix-product FLOPs of the loop connection in these loops, counted from 0, per token."""
    return CONNECTIONS[config.loop_connection].of(config).flops(config, loops)


def exits_flops(config: LoopedConfig, num_loops: int) -> int:
    """Matrix-product FLOPs of head and exit gate after every loop, per position; 0 without an exit gate."""
    return 2 * config.hidden_size * (config.vocab_size + 1) * num_loops if config.exit_gate else 0


def update_flops(config: LoopedConfig, batch: int, tokens: dict[int, float], loops: dict[int, float]) -> float:
    """Mean `training_flops` of an update of `batch` rows with logits at one position.

    Without attention and head this is the usual 6 x layer weights x loops x tokens.

    Args:
        tokens: length of the batch rows -> share of the updates with that length.
        loops: loop count -> share of the updates with that loop count.
    """
    cost = {(t, r): training_flops(config, batch, t, r, logits_kept=1) for t in tokens for r in loops}
    return sum(tokens[t] * loops[r] * cost[t, r] for t, r in cost)
