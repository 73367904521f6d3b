"""Looped models that others published: what all of their layouts have in common. Their code is not run."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from modeling_looped import LoopedConfig

Tensors = dict[str, torch.Tensor]
# What transformers writes into any config.json, and says nothing about the logits.
OF_TRANSFORMERS = frozenset(PreTrainedConfig().to_dict()) | {
    "_attn_implementation", "_name_or_path", "auto_map", "dtype", "model_type", "pretraining_tp", "torch_dtype",
    "use_cache",
}  # fmt: skip
PACKED = ((None,), "its tensors are packed, take the checkpoint that was not quantised")


@dataclass(frozen=True)
class Layout:
    """How a published layout becomes a looped model.

    Args:
        name: of the models, for people.
        config: the fields of config.json -> the configuration. Raises ValueError for a field that has no equal.
        tensors: the published tensors by name, and the fields -> the tensors of the looped model by name.
        settings: source, fields, default loop count or None -> the generation settings.
        check_tokenizer: may mend the tokenizer in place, and raises ValueError if it does not fit the fields.
    """

    name: str
    config: Callable[[dict], LoopedConfig]
    tensors: Callable[[Tensors, dict], Tensors]
    settings: Callable[[str, dict, int | None], GenerationConfig]
    check_tokenizer: Callable[[PreTrainedTokenizerBase, dict], None] = lambda tokenizer, fields: None


def check_fields(
    name: str,
    fields: Mapping,
    read: Collection[str],
    only: Mapping[str, tuple[tuple, str]],
    without_effect: Collection[str] = (),
) -> None:
    """Check that a looped model says all that the fields of a published config.json say.

    Args:
        name: of the layout.
        read: fields that become fields of the looped model; all must be there.
        only: field -> the values it may have, and why no other one.
        without_effect: fields that say nothing about the logits, beside those that transformers writes.

    Raises:
        ValueError: a field has another value, or is unknown and says something; or one of `read` is missing.
    """
    missing = sorted(set(read) - fields.keys())
    if missing:
        raise ValueError(f"the source's config.json lacks {', '.join(missing)}: it is not the file of a {name} model.")
    for field, (values, reason) in only.items():
        if field in fields and not any(
            type(fields[field]) is type(value) and fields[field] == value for value in values
        ):
            raise ValueError(f"{field}={fields[field]!r} cannot be converted exactly: {reason}.")
    for field in sorted(fields.keys() - set(read) - only.keys() - set(without_effect) - OF_TRANSFORMERS):
        if fields[field] not in (None, False, [], {}, ""):
            raise ValueError(
                f"{field}={fields[field]!r} cannot be converted exactly: no published {name} has it; delete it from "
                "config.json if it changes nothing."
            )


def read_tensors(source: str) -> Tensors:
    """All tensors in the safetensors files of a checkpoint, by name.

    Raises:
        OSError: there are no such files.
    """
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    files = [cached_file(source, name) for name in names]
    return {name: tensor for file in files if file for name, tensor in load_file(file).items()}


def stored_settings(source: str, num_loops: int) -> GenerationConfig:
    """The generation settings that lie with a checkpoint, if any, and a default loop count."""
    stored = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    settings = GenerationConfig() if stored is None else GenerationConfig.from_pretrained(source)
    settings.num_loops = num_loops
    return settings
