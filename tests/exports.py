"""Models of every shape that engines have, and tokenizers of every kind, for the tests of `looped export`."""

import functools

import torch

from data_builders.tokenizers import hop_tokenizer, smiles_tokenizer, train_byte_bpe
from toys import ROOT, make_model

LAYERNORM = {"norm_type": "layernorm"}
GELU = {**LAYERNORM, "gated_mlp": False, "hidden_act": "gelu_pytorch_tanh"}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0}}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Shapes that an engine loops: their depth is set when the engine loads them.
LOOPING = {
    "plain": {},
    "norm between loops": {"norm_between_loops": True},
    "untied, wide heads": {"tie_word_embeddings": False, "head_dim": 16},
    "three layers, one key head": {"num_core_layers": 3, "num_key_value_heads": 1},
    "no positions": {"position_embedding": "none"},
    "linear": LINEAR,
    "exit gate": {"exit_gate": True},
}
# Shapes whose layers are written one after the other.
UNROLLED = {
    "prelude and coda": {"num_prelude_layers": 1, "num_coda_layers": 2},
    "qk_norm": {"qk_norm": True, "num_prelude_layers": 1},
    "layernorm and SwiGLU": {**LAYERNORM, "num_coda_layers": 1},
    "layernorm and SwiGLU, untied": {**LAYERNORM, "tie_word_embeddings": False},
}
GGUF_LOOPING = LOOPING | {"yarn": {"rope_parameters": YARN}, "llama3": {"rope_parameters": LLAMA3}}
GGUF_UNROLLED = UNROLLED | {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qk_norm, linear": {"qk_norm": True, **LINEAR},
    "layernorm and SwiGLU, no positions": {**LAYERNORM, "position_embedding": "none"},
}
GGUF_GELU = {"gelu": {**GELU, "mlp_bias": True}, "gelu, linear": {**GELU, **LINEAR}}
MLX_LOOPING = LOOPING | {"biases": {"attention_bias": True, "mlp_bias": True}}
MLX_UNROLLED = UNROLLED | {
    "gelu": GELU | {"hidden_act": "gelu"},
    "yarn": {"rope_parameters": YARN},
    "llama3": {"rope_parameters": LLAMA3},
}


def rough_model(seed: int = 0, **fields):
    """A toy whose norms and biases differ by channel, so that one that is left out, or put elsewhere, shows."""
    model = make_model(seed, **fields)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


@functools.cache
def tokenizer_of(kind: str):
    """A tokenizer of a task: "hops", "hops, read at the end", "text" or "molecules"."""
    match kind:
        case "hops":
            return hop_tokenizer(40, 7)
        case "hops, read at the end":
            return hop_tokenizer(40, 7, readout="last")
        case "text":
            return train_byte_bpe([path.read_text("utf-8") for path in (ROOT / "docs/guides").glob("*.md")], 400)
    return smiles_tokenizer(molecules())


TOKENIZERS = ("hops", "hops, read at the end", "text", "molecules")


def molecules() -> list[str]:
    lines = (ROOT / "docs/molecules/toys.smi").read_text("utf-8").splitlines()
    return [line.split()[0] for line in lines]


def texts_of(kind: str) -> list[str]:
    """Texts that the tokenizer of a task has tokens for."""
    if kind == "molecules":
        return molecules()
    if kind == "text":
        odd = "don't  I'LL 12345 ½ Ⅷ ١٢٣ äöü e\u0301 漢字 한국 🙂\u200d🙂\t\n\r\n \u00a0\u3000-- ``` x ,y . z\n\n  end"
        return [odd, *(odd[start : start + 9] for start in range(len(odd))), "<eos> in a text<pad>"]
    return ["e0", "e1 r0", "e12 r3 r0", "e39 r6 r6 r6 r6", "e2  e20\te1\nr1", "e3 e33 e3 e30"]
