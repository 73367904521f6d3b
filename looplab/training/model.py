"""The model that a recipe trains: with fresh weights, or from a folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from looplab.runs.models import blaming
from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.cache_looped import SHARINGS

from .recipe import Recipe


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, object]
) -> LoopedForCausalLM:
    """A model for the ids of `tokenizer`: with fresh weights, or from `init_from`.

    generation: fields of its generation_config.json beside the token ids and the loop count.

    Raises:
        ValueError: model and tokenizer do not fit.
    """
    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    num_ids = 1 + max(tokenizer.get_vocab().values())  # ids may have holes, so their number is not enough
    if recipe.init_from is None:
        config = LoopedConfig(**({"vocab_size": num_ids} | special_ids | recipe.model))
        if num_ids > config.vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least {num_ids}, the tokens of the tokenizer, got {config.vocab_size}."
            )
        model = LoopedForCausalLM(config)
    else:
        with blaming(recipe.init_from, "name another folder in init_from."):
            config = LoopedConfig.from_pretrained(recipe.init_from, **recipe.model)
        # KV gates that the weights were trained without start as fresh ones do.
        model = load_trained("init_from", recipe.init_from, may_lack=".kv_gate.", config=config)
        if num_ids > config.vocab_size:
            raise ValueError(
                f"init_from: {recipe.init_from} has {num_ids} tokens, and a model for {config.vocab_size}."
            )
    # A fresh object: the one derived from the model's config loses unknown fields such as num_loops on reload.
    model.generation_config = GenerationConfig(num_loops=model.config.num_loops, **special_ids, **generation)
    return model


def load_trained(field_name: str, folder: str, may_lack: str | None = None, **options) -> LoopedForCausalLM:
    """The model saved in a folder, in float32; ValueError, naming the recipe's field, if it is not whole.

    may_lack: part of the names of tensors that may be missing.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{field_name}: there is no folder {folder!r}: name the folder of a saved model.")
    with blaming(folder, f"name another folder in {field_name}."):
        model, report = LoopedForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    missing = [name for name in report["missing_keys"] if may_lack is None or may_lack not in name]
    wrong = sorted([*missing, *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if wrong:
        raise ValueError(f"{field_name}: the weights in {folder} do not fit its config.json ({wrong[0]}).")
    return model


def may_lack_gradients(recipe: Recipe, config: LoopedConfig) -> bool:
    """Whether an update may leave parameters without a gradient, which DDP has to know.

    Truncated back-propagation leaves out the prelude. A batch leaves out the parameters of loops that it does not run.
    KV gates have nothing to mix in the first loop. One loop does not read the exit gate, and an exit gate that is
    trained alone leaves out all other parameters.
    """
    return (
        recipe.num_grad_loops is not None
        or config.loops_have_parameters
        or SHARINGS[config.kv_sharing].has_parameters
        or config.exit_gate
    )


def check_max_loops(config: LoopedConfig, asked: dict[str, int], eval_loops: list[int]):
    """ValueError for a field of the recipe that asks for loops the model has no parameters for."""
    for name, loops in (asked | {"eval_loops": max(eval_loops, default=1)}).items():
        if config.max_num_loops is not None and loops > config.max_num_loops:
            raise ValueError(
                f"{name} asks for {loops} loops, and model.max_num_loops is {config.max_num_loops}: raise it, or ask "
                "for fewer."
            )
