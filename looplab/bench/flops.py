"""Floating-point operations of a forward pass and of an update, counted from a configuration."""

from modeling_looped import LoopedConfig
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.connections_looped import CONNECTIONS


def forward_flops(
    config: LoopedConfig, batch: int, tokens: int, num_loops: int, logits_kept: int | None = None
) -> int:
    """FLOPs of the matrix products of one forward pass, 2 per multiply-add; an update takes three times as many.

    Attention counts all tokens x tokens pairs. Norms and activations do not count.

    Args:
        logits_kept: positions of a batch row that get logits, all unless given.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * (2 * heads + 2 * keys) + 4 * tokens * heads
    mlp = 2 * hidden * config.intermediate_size * (3 if config.gated_mlp else 2)
    layer_calls = config.num_prelude_layers + config.num_coda_layers + config.num_core_layers * num_loops
    connection = num_loops * connection_flops(config)
    gates = config.num_core_layers * (num_loops - 1) * SHARINGS[config.kv_sharing].flops(config)
    head = 2 * hidden * config.vocab_size
    return batch * (tokens * (layer_calls * (attention + mlp) + connection + gates) + (logits_kept or tokens) * head)


def connection_flops(config: LoopedConfig) -> int:
    """Matrix-product FLOPs of the loop connection, per token and loop."""
    return CONNECTIONS[config.loop_connection].of(config).flops(config)


def update_flops(config: LoopedConfig, batch: int, tokens: dict[int, float], loops: dict[int, float]) -> float:
    """Mean FLOPs of an update of `batch` rows with logits at one position: 3 x `forward_flops`, as backward takes two.

    Without attention and head this is the usual 6 x layer weights x loops x tokens.

    Args:
        tokens: length of the batch rows -> share of the updates with that length.
        loops: loop count -> share of the updates with that loop count.
    """
    cost = {(t, r): forward_flops(config, batch, t, r, logits_kept=1) for t in tokens for r in loops}
    return 3 * sum(tokens[t] * loops[r] * cost[t, r] for t, r in cost)
