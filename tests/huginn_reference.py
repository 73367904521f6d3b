"""Huginn's published forward pass written again from its description (arXiv 2502.05171), with matrices alone.

    e = prelude(s E[x]);   h_0 = noise;   h_t = core(A [h_{t-1}, e]);   logits = E N(coda(N(h_R)))
    layer:  h <- N_2(h + attention(N_1(h)));   h <- N_4(h + swiglu(N_3(h)))

N is one norm. Rotary embeddings are complex numbers: two neighbouring channels of a head are one, turned by its angle.
It reads a checkpoint in the published names and shares no code with the model that is tested against it.
"""

import math

import torch

PER_LAYER = {
    "norm_1.weight": ("hidden",), "norm_2.weight": ("hidden",), "norm_3.weight": ("hidden",),
    "norm_4.weight": ("hidden",), "attn.Wqkv.weight": ("three", "hidden"), "attn.proj.weight": ("hidden", "hidden"),
    "mlp.fc.weight": ("two", "hidden"), "mlp.proj.weight": ("hidden", "inner"),
}  # fmt: skip


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, random: one that is lost or swapped must show. Tied embeddings have one name."""
    hidden, inner = config["n_embd"], config["intermediate_size"]
    sizes = {"hidden": hidden, "three": 3 * hidden, "inner": inner, "two": 2 * inner}
    sections = {
        "prelude": config["n_layers_in_prelude"],
        "core_block": config["n_layers_in_recurrent_block"],
        "coda": config["n_layers_in_coda"],
    }
    shapes = {"transformer.wte.weight": [config["vocab_size"], hidden], "transformer.ln_f.weight": [hidden]}
    shapes["transformer.adapter.weight"] = [hidden, 2 * hidden]
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    for section, layers in sections.items():
        for index in range(layers):
            layer = f"transformer.{section}.{index}"
            shapes |= {f"{layer}.{name}": [sizes[size] for size in shape] for name, shape in PER_LAYER.items()}
            if config["qk_bias"]:
                shapes[f"{layer}.attn.qk_bias"] = [2, 1, config["n_heads"], hidden // config["n_heads"]]
    generator = torch.Generator().manual_seed(seed)
    mean = {name: float("norm" in name or "ln_f" in name) for name in shapes}
    return {name: mean[name] + 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def turn(x: torch.Tensor, theta: float) -> torch.Tensor:
    """(T, d): channels 2i and 2i + 1 of each position are a complex number, by position * theta ** (-2i / d)."""
    pairs = torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous())
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(pairs.shape[1]) * 2.0 / x.shape[1])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(x.shape)


def attention(x: torch.Tensor, w: dict, layer: str, config: dict) -> torch.Tensor:
    """(T, D) -> (T, D), head by head."""
    size, d = config["n_embd"], config["n_embd"] // config["n_heads"]
    fused = x @ w[f"{layer}.attn.Wqkv.weight"].T
    future = torch.ones(len(x), len(x)).triu(1).bool()
    outputs = []
    for head in range(config["n_heads"]):
        q, k, v = (fused[:, part * size + head * d : part * size + (head + 1) * d] for part in range(3))
        if config["qk_bias"]:
            bias = w[f"{layer}.attn.qk_bias"]
            q, k = q + bias[0, 0, head], k + bias[1, 0, head]
        q, k = turn(q, config["rope_base"]), turn(k, config["rope_base"])
        outputs.append((q @ k.T / math.sqrt(d)).masked_fill(future, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, dim=-1) @ w[f"{layer}.attn.proj.weight"].T


def run(section: str, layers: int, h: torch.Tensor, w: dict, config: dict) -> torch.Tensor:
    eps, inner = config["norm_eps"], config["intermediate_size"]
    for index in range(layers):
        layer = f"transformer.{section}.{index}"
        x = attention(rms(h, w[f"{layer}.norm_1.weight"], eps), w, layer, config)
        h = rms(h + x, w[f"{layer}.norm_2.weight"], eps)
        x = rms(h, w[f"{layer}.norm_3.weight"], eps) @ w[f"{layer}.mlp.fc.weight"].T
        gate, up = x[:, :inner], x[:, inner:]
        x = (gate * torch.sigmoid(gate) * up) @ w[f"{layer}.mlp.proj.weight"].T
        h = rms(h + x, w[f"{layer}.norm_4.weight"], eps)
    return h


def huginn_logits(w: dict, config: dict, ids: torch.Tensor, noise: torch.Tensor, num_loops: int) -> torch.Tensor:
    """Of one row without padding, (T,), from the initial state (T, D): logits (T, V)."""
    eps, norm = config["norm_eps"], w["transformer.ln_f.weight"]
    embeds = w["transformer.wte.weight"][ids] * config["init_values"]["embed_scale"]
    embeds = run("prelude", config["n_layers_in_prelude"], embeds, w, config)
    h = noise
    for _ in range(num_loops):
        h = torch.cat([h, embeds], dim=-1) @ w["transformer.adapter.weight"].T
        h = run("core_block", config["n_layers_in_recurrent_block"], h, w, config)
    h = run("coda", config["n_layers_in_coda"], rms(h, norm, eps), w, config)
    return rms(h, norm, eps) @ w["transformer.wte.weight" if config["tie_embeddings"] else "lm_head.weight"].T
