"""A looped model and a dense one of its unrolled depth, and the work both are timed at."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_layers_looped import CACHE_NAME


@dataclass(frozen=True)
class Workload:
    """What is run at every width: a core of `layers` x `loops`, `batch` x `tokens` per training step."""

    layers: int = 2
    loops: int = 4
    vocab: int = 512
    batch: int = 16
    tokens: int = 64
    prompt: int = 16
    new_tokens: int = 64
    texts: int = 16  # drafted at most
    matmul: int = 1536
    rows_per_hop: int = 64
    steps: int = 8  # decoded at each context
    chunks: tuple[int, ...] = (16, 64, 256, 512)  # tokens


QUICK = Workload(
    vocab=64,
    batch=2,
    tokens=8,
    prompt=4,
    new_tokens=4,
    texts=1,
    matmul=64,
    rows_per_hop=4,
    steps=1,
    chunks=(4,),
)


def build_pair(width: int, work: Workload, kv_sharing: str = "per_loop") -> tuple[LoopedForCausalLM, LlamaForCausalLM]:
    """A looped model and a Llama of the same width whose depth is the loops unrolled; random weights."""
    sizes = model_sizes(width, work)
    looped = LoopedConfig(**sizes, num_core_layers=work.layers, num_loops=work.loops, kv_sharing=kv_sharing)
    llama = LlamaConfig(**sizes, num_hidden_layers=work.layers * work.loops)
    return LoopedForCausalLM(looped), LlamaForCausalLM(llama)


def model_sizes(width: int, work: Workload) -> dict:
    """Configuration fields that all sides of a comparison share."""
    return {
        "vocab_size": work.vocab,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        "max_position_embeddings": 2 * max(work.tokens, work.prompt + work.new_tokens),
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def training_step(model: PreTrainedModel, input_ids: torch.Tensor) -> Callable[[], None]:
    """One update of `model` on `input_ids` (B, T): forward, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **cache) -> Callable[[], None]:
    """Greedy `generate` of exactly `new_tokens` after `prompt` (1, T)."""
    model.eval()
    mask = torch.ones_like(prompt)

    def decode() -> None:
        model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **cache)

    return decode


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer, and what a loop reads and writes, on its own, in place; the loop stays in Python."""
    torch.compiler.reset()  # a second width would otherwise be compiled for sizes that may change
    for piece in model.model.pieces() if isinstance(model, LoopedForCausalLM) else model.model.layers:
        piece.compile()


@torch.inference_mode()
def kv_bytes_per_token(model: PreTrainedModel, tokens: int) -> float:
    """Bytes of all cache tensors after `tokens` tokens, per token."""
    cache = model.eval()(torch.ones(1, tokens, dtype=torch.long), use_cache=True)[CACHE_NAME]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / tokens
