"""Toys that all tests share: tiny configurations of every kind, and one tolerance per precision."""

import ast
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import DynamicCache

import modeling_looped
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_looped import SHARINGS

ROOT = Path(__file__).parents[1]  # of the repository

# Written once for the suite, never loosened (fp32 rounding over a few layers; bf16 has 8 bits).
FP32 = {"rtol": 1e-5, "atol": 1e-5}
BF16 = {"rtol": 0.0, "atol": 2e-2}

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_core_layers": 2,
    "num_loops": 3,
    "pad_token_id": 0,
    # Larger than a real model's, so that a wrong row or slot moves the logits by far more than rounding does.
    "initializer_range": 0.15,
}


KV_SHARINGS = list(SHARINGS)


def make_config(**fields) -> LoopedConfig:
    return LoopedConfig(**{**SIZES, **fields})


def make_model(seed: int = 0, attn: str = "sdpa", **fields) -> LoopedForCausalLM:
    """A tiny causal LM in evaluation mode with seeded weights."""
    torch.manual_seed(seed)
    return LoopedForCausalLM._from_config(make_config(**fields), attn_implementation=attn).eval()


def open_gates(model, seed: int = 5):
    """The same model with KV gates that differ by channel and token: fresh ones hardly let anything through."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "kv_gate" in name:
            with torch.no_grad():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
    return model


def make_melt(kv_gate: str = "elementwise", gates_open: bool = True, **fields) -> LoopedForCausalLM:
    model = make_model(kv_sharing="gated", kv_gate=kv_gate, kv_gate_rank=4, **fields)
    return open_gates(model) if gates_open else model


def as_policy(model, **fields):
    """The same weights (but gates) under another configuration."""
    config = LoopedConfig.from_dict({**model.config.to_dict(), **fields})
    twin = LoopedForCausalLM._from_config(config, attn_implementation=model.config._attn_implementation).eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


def make_ids(rows: int = 3, tokens: int = 7, seed: int = 1) -> torch.Tensor:
    """(rows, tokens) ids without the padding id."""
    return torch.randint(1, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stepwise(model, ids, sizes, cache=None, **kwargs) -> torch.Tensor:
    """Logits of `ids` fed in pieces of the given sizes through one cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    pieces = ids.split(list(sizes), dim=1)
    return torch.cat([model(piece, past_key_values=cache, use_cache=True, **kwargs).logits for piece in pieces], dim=1)


def count_layer_calls(model) -> list:
    """A list that grows by (section, rows) at every layer call of `model`."""
    calls = []
    for section in ("prelude", "core", "coda"):
        for layer in getattr(model.model, section):
            layer.register_forward_hook(
                lambda module, args, output, section=section: calls.append((section, len(args[0])))
            )
    return calls


def write_pages(folder, pages: int = 40, seed: int = 0) -> list[str]:
    """Text files of eight paragraphs each, no two alike, below `folder`; returns the glob that names them."""
    draw = torch.Generator().manual_seed(seed)
    words = [
        "the",
        "a",
        "loop",
        "reads",
        "writes",
        "state",
        "token",
        "layer",
        "again",
        "of",
        "and",
        "then",
        "more",
        "deep",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for page in range(pages):
        chosen = torch.randint(len(words), (8, 12), generator=draw).tolist()
        lines = [" ".join(words[i] for i in row) + f", on page {page}." for row in chosen]
        (folder / f"page{page:03}.txt").write_text("\n\n".join(lines) + "\n")
    return [str(folder / "*.txt")]


WORDS = (
    "the",
    "loop",
    "reads",
    "a",
    "state",
    "and",
    "writes",
    "it",
    "again",
    "then",
    "another",
    "layer",
    "of",
    "more",
)


def make_texts(shards: int = 5) -> list[list[str]]:
    """Documents of 3 to 30 words, no two alike, in shards of 60, 80, 100 .. documents; each says its shard and row."""

    def text(shard: int, row: int) -> str:
        draw = random.Random(f"{shard} {row}")
        return f"<{shard}.{row}> " + " ".join(draw.choices(WORDS, k=draw.randint(3, 30)))

    return [[text(shard, row) for row in range(60 + 20 * shard)] for shard in range(shards)]


def write_shards(folder: Path, kind: str, shards: list[list]) -> dict:
    """Arguments of `load_dataset` for these texts as a stream: a file of the `kind` json or parquet for each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.{'jsonl' if kind == 'json' else kind}" for number in range(len(shards))]
    for file, texts in zip(files, shards, strict=True):
        rows = {"text": texts, "row": list(range(len(texts)))}
        if kind == "parquet":
            pq.write_table(pa.table(rows), file, row_group_size=50)
        else:
            lines = (json.dumps({"text": text, "row": row}) + "\n" for row, text in enumerate(texts))
            file.write_text("".join(lines), encoding="utf-8")
    return {"path": kind, "data_files": {"train": list(map(str, files))}, "split": "train", "streaming": True}


def shipped_with(*modules: str) -> set[str]:
    """Files that a saved model ships: these modules of modeling_looped and all that they import of it."""
    folder, files = Path(modeling_looped.__file__).parent, set()
    waiting = [f"{module}.py" for module in modules]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            imports = [
                n for n in ast.walk(ast.parse((folder / file).read_text("utf-8"))) if isinstance(n, ast.ImportFrom)
            ]
            waiting += [f"{node.module}.py" for node in imports if node.level == 1]
    return files
