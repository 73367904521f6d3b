"""A looped model, a Llama of its unrolled depth, and the work that `looped bench` times both with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_layers_looped import CACHE_NAME


@dataclass(frozen=True)
class Workload:
    """Sizes of the models and of the work, the same at every width. Lengths are in tokens."""

    layers: int = 2
    loops: int = 4
    vocab: int = 512
    batch: int = 16  # batch rows of an update
    tokens: int = 64  # length of a batch row
    prompt: int = 16
    new_tokens: int = 64
    texts: int = 16  # most texts that a run's model continues
    matmul: int = 1536  # size of the square matrices of `matmul_peak`
    rows_per_hop: int = 64
    steps: int = 8  # tokens decoded at each context
    chunks: tuple[int, ...] = (16, 64, 256, 512)


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
    """A looped model and a Llama of the same width and unrolled depth, with random weights."""
    sizes = model_sizes(width, work)
    looped = LoopedConfig(**sizes, num_core_layers=work.layers, num_loops=work.loops, kv_sharing=kv_sharing)
    llama = LlamaConfig(**sizes, num_hidden_layers=work.layers * work.loops)
    return LoopedForCausalLM(looped), LlamaForCausalLM(llama)


def model_sizes(width: int, work: Workload) -> dict:
    """Configuration fields that both models of a comparison share."""
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
    """A call that makes one update of `model` on `input_ids` (B, T): forward, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, **cache) -> Callable[[], None]:
    """A call of greedy `generate` for exactly `new_tokens` tokens after `prompt` (1, T).

    cache: further arguments of `generate`.
    """
    model.eval()
    mask = torch.ones_like(prompt)

    def decode() -> None:
        model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **cache)

    return decode


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer, and the loop connection, on its own and in place; the loop stays in Python."""
    torch.compiler.reset()  # without it, torch would compile a second width for sizes that may change
    for piece in model.model.pieces() if isinstance(model, LoopedForCausalLM) else model.model.layers:
        piece.compile()


@torch.inference_mode()
def kv_bytes_per_token(model: PreTrainedModel, tokens: int) -> float:
    """Bytes per token of all cache tensors, after a call of `tokens` tokens."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    cache = model.eval()(ids, use_cache=True)[CACHE_NAME]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / tokens
