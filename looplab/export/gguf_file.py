"""Write a stock model to a GGUF file, which llama.cpp loads; as `nanbeige` if its layers are to be looped there.

`nanbeige` is the architecture of llama.cpp (and MLX) that runs all layers several times. The file says how often by
default, and who loads it may say otherwise: `--override-kv nanbeige.num_loops=int:16`.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

from looplab.runs.writing import partial_of

from .gguf_tokenizer import Vocabulary

MOST_LAYERS = 512  # of llama.cpp, loops counted; with more it aborts
# What the weights become, and what the file says that it holds.
KINDS = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
GROUP = 32  # weights of a row that share a scale in q8_0 and q4_0
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "stablelm": gguf.MODEL_ARCH.STABLELM,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
}
OUTPUT = "output.weight"
NO_TURN = 1e30  # a wavelength times this: no rotation, to the last bit


def write_gguf(
    path: Path, stock: PreTrainedModel, vocabulary: Vocabulary, name: str, kind: str, loops: dict | None = None
) -> None:
    """Write the file `path`, whole or not at all.

    Args:
        stock: a model of `unroll`.
        name: of the model, for people.
        kind: one of `KINDS`.
        loops: of a `nanbeige`: num_loops, and skip_loop_final_norm.
    """
    config = stock.config
    architecture = config.model_type if loops is None else "nanbeige"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        writer.add_name(name)
        writer.add_file_type(KINDS[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        head_dim = stock.model.layers[0].self_attn.head_dim
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
        match config.model_type:
            case "llama" | "qwen3":
                writer.add_layer_norm_rms_eps(config.rms_norm_eps)
            case "stablelm":
                writer.add_layer_norm_eps(config.layer_norm_eps)
                writer.add_parallel_residual(False)
            case "starcoder2":
                writer.add_layer_norm_eps(config.norm_epsilon)
        add_rope(writer, stock)
        if loops is not None:  # llama.cpp passes over a key that it does not know, so these names are tested
            writer.add_uint32("nanbeige.num_loops", loops["num_loops"])
            writer.add_bool("nanbeige.skip_loop_final_norm", loops["skip_loop_final_norm"])
        vocabulary.write(writer)
        for tensor_name, tensor in tensors(stock):
            data, tensor_kind = pack(tensor_name, tensor, KINDS[kind][0])
            writer.add_tensor(tensor_name, data, raw_dtype=tensor_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def add_rope(writer: gguf.GGUFWriter, stock: PreTrainedModel) -> None:
    """Say how queries and keys are rotated.

    A llama or nanbeige gets a factor for every frequency, which says all of `rope_parameters` that does not depend on
    the length of a text. The other architectures have one factor for all.
    """
    rope, rotary = stock.config.rope_parameters, stock.model.rotary_emb
    writer.add_rope_freq_base(rope["rope_theta"])
    if stock.config.model_type != "llama":
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        return
    channels = 2 * len(rotary.inv_freq)
    plain = rope["rope_theta"] ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    factors = plain / rotary.inv_freq.cpu().double()
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_scaling_attn_factors(rotary.attention_scaling)
    writer.add_tensor("rope_freqs.weight", factors.float().numpy())


def tensors(stock: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a stock model under llama.cpp's names, in its order of channels."""
    config = stock.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in stock.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp then takes the embeddings
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        projection = name.split(".")[-2]
        if config.model_type == "llama" and projection in heads:
            tensor = by_pairs(tensor, heads[projection])
        yield found, tensor


def by_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Output channels (heads * d, ...) with the two that rotate together side by side; transformers has them d / 2
    apart."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def pack(name: str, tensor: torch.Tensor, kind: Kind) -> tuple[np.ndarray, Kind]:
    """The bytes of a tensor and what they are: vectors stay float32, and rows that no group divides are float16."""
    data = tensor.detach().float().cpu().contiguous().numpy()
    if data.ndim == 1:
        return data, Kind.F32
    if kind in (Kind.Q8_0, Kind.Q4_0):
        if data.shape[-1] % GROUP:
            kind = Kind.F16
        elif name in (OUTPUT, "token_embd.weight"):
            kind = Kind.Q8_0  # what is read out rounds an answer directly; llama.cpp's own tool is as careful
    return gguf.quants.quantize(data, kind), kind
