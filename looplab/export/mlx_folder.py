"""Write folders of stock models: what mlx-lm loads, and what transformers and CTranslate2 load."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

GROUP = 32  # weights of a row that share a scale, as in GGUF
BITS = {"q8_0": 8, "q4_0": 4}


def write_folder(
    folder: Path, stock: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
) -> None:
    """Fill an empty folder with a stock model, its settings for `generate` and its tokenizer.

    Args:
        dtype: of the weights; their own unless given.
    """
    tensors = {name: tensor.detach() for name, tensor in stock.state_dict().items()}
    if stock.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    # A file has a copy for every layer, since loaders know no tensor of two names.
    save_file(
        {name: tensor.to(dtype or tensor.dtype).clone().contiguous() for name, tensor in tensors.items()},
        folder / SAFE_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    stock.config.architectures = [type(stock).__name__]
    stock.config.dtype = dtype or next(iter(tensors.values())).dtype
    stock.config.save_pretrained(folder)
    stock.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_mlx(
    folder: Path,
    stock: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quantize: str | None = None,
    loops: dict | None = None,
) -> None:
    """Fill an empty folder with what mlx-lm loads.

    Args:
        quantize: "f16", or one of `BITS`, which needs mlx.
        loops: of a `nanbeige`: num_loops, and skip_loop_final_norm.
    """
    write_folder(folder, stock, tokenizer, torch.float16 if quantize == "f16" else None)
    path = folder / CONFIG_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")  # MLX reads these two
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = rope
    if fields["model_type"] == "stablelm":
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if loops is not None:
        fields |= {"model_type": "nanbeige", "architectures": ["NanbeigeForCausalLM"], **loops}
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    join_words(folder / "tokenizer.json")
    if quantize in BITS:
        pack(folder, BITS[quantize])


def join_words(path: Path) -> None:
    """Have a tokenizer of whole words write its tokens one after the other, as mlx-lm knows it from SentencePiece.

    Of any other decoder mlx-lm asks how a text of its own comes back, which has words that such a tokenizer refuses.
    """
    parts = json.loads(path.read_text(encoding="utf-8"))
    if parts["model"]["type"] == "WordLevel":
        spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        parts["decoder"] = {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]}
        path.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")


def pack(folder: Path, bits: int) -> None:
    """Quantize the weights in a folder with mlx-lm; matrices whose rows no group divides stay as they are."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(folder)
    model, config = quantize_model(model, config, group_size=GROUP, bits=bits)
    save_model(folder, model)
    save_config(config, folder / CONFIG_NAME)
