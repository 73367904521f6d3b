"""Ouro's published forward pass written again from its description (arXiv 2510.25741), with matrices and nothing else.

    h_0 = E[x];   h_t = RMS_f(layers(h_{t-1}));   logits_t = W h_t;   lam_t = sigmoid(w . h_t + b)
    layer:  h <- h + RMS_2(attention(RMS_1(h)));   h <- h + RMS_4(swiglu(RMS_3(h)))

It reads a checkpoint in the published names and shares no code with the model that is tested against it.
"""

import json
import math
from pathlib import Path

import torch

PER_LAYER = {
    "input_layernorm": ("hidden",), "input_layernorm_2": ("hidden",),
    "post_attention_layernorm": ("hidden",), "post_attention_layernorm_2": ("hidden",),
    "self_attn.q_proj": ("queries", "hidden"), "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"), "self_attn.o_proj": ("hidden", "queries"),
    "mlp.gate_proj": ("inner", "hidden"), "mlp.up_proj": ("inner", "hidden"), "mlp.down_proj": ("hidden", "inner"),
}  # fmt: skip


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, random: one that is lost or swapped must show."""
    head = config["head_dim"]
    sizes = {
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "queries": config["num_attention_heads"] * head,
        "keys": config["num_key_value_heads"] * head,
    }
    shapes = {
        f"model.layers.{layer}.{name}.weight": [sizes[size] for size in shape]
        for layer in range(config["num_hidden_layers"])
        for name, shape in PER_LAYER.items()
    }
    shapes |= {"model.embed_tokens.weight": [config["vocab_size"], sizes["hidden"]]}
    shapes |= {"lm_head.weight": [config["vocab_size"], sizes["hidden"]], "model.norm.weight": [sizes["hidden"]]}
    shapes |= {"model.early_exit_gate.weight": [1, sizes["hidden"]], "model.early_exit_gate.bias": [1]}
    generator = torch.Generator().manual_seed(seed)
    mean = {name: float("norm" in name) for name in shapes}
    return {name: mean[name] + 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """(T, d): the pair (i, i + d/2) of each position is turned by position * theta ** (-2i / d)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) * 2.0 / x.shape[-1])
    first, second = x[:, :half], x[:, half:]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, dim=-1)


def attention(x: torch.Tensor, w: dict, layer: str, config: dict) -> torch.Tensor:
    """(T, D) -> (T, D), head by head."""
    d, positions = config["head_dim"], torch.arange(len(x))
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    q, k, v = (x @ w[f"{layer}.self_attn.{name}_proj.weight"].T for name in "qkv")
    future = positions[None, :] > positions[:, None]
    outputs = []
    for head in range(config["num_attention_heads"]):
        mine, theirs = slice(head * d, (head + 1) * d), slice(head // shared * d, (head // shared + 1) * d)
        query, key = (rotate(y, positions, config["rope_theta"]) for y in (q[:, mine], k[:, theirs]))
        scores = (query @ key.T / math.sqrt(d)).masked_fill(future, -torch.inf)
        outputs.append(scores.softmax(-1) @ v[:, theirs])
    return torch.cat(outputs, dim=-1) @ w[f"{layer}.self_attn.o_proj.weight"].T


def mlp(x: torch.Tensor, w: dict, layer: str) -> torch.Tensor:
    gate, up = (x @ w[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate * torch.sigmoid(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T


def ouro_loops(w: dict, config: dict, ids: torch.Tensor, num_loops: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row without padding, (T,): logits (R, T, V) and the gate's lam (R, T) after every loop."""
    eps = config["rms_norm_eps"]
    h, logits, gates = w["model.embed_tokens.weight"][ids], [], []
    for _ in range(num_loops):
        for index in range(config["num_hidden_layers"]):
            layer = f"model.layers.{index}"
            x = attention(rms(h, w[f"{layer}.input_layernorm.weight"], eps), w, layer, config)
            h = h + rms(x, w[f"{layer}.input_layernorm_2.weight"], eps)
            x = mlp(rms(h, w[f"{layer}.post_attention_layernorm.weight"], eps), w, layer)
            h = h + rms(x, w[f"{layer}.post_attention_layernorm_2.weight"], eps)
        h = rms(h, w["model.norm.weight"], eps)
        logits.append(h @ w["lm_head.weight"].T)
        gates.append(torch.sigmoid(h @ w["model.early_exit_gate.weight"][0] + w["model.early_exit_gate.bias"]))
    return torch.stack(logits), torch.stack(gates)


def exit_probabilities(gates: torch.Tensor) -> torch.Tensor:
    """(R, T) lam -> (R, T) chance that each loop is the last."""
    stay, p = torch.ones_like(gates[0]), []
    for lam in gates[:-1]:
        p.append(lam * stay)
        stay = stay * (1 - lam)
    return torch.stack([*p, stay])
