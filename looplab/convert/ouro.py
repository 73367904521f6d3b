"""Ouro (arXiv 2510.25741): the names of a published checkpoint, and what they become in a looped model.

    model.layers.I.*        -> model.core.I.*            all layers loop; the four norms have the same names
    model.norm              -> model.core_norm           closes every loop: readout and next input
    model.early_exit_gate   -> model.exit_gate
    total_ut_steps          -> num_loops
    early_exit_threshold q  -> generation_config.halting = {"rule": "q_exit", "q": q}, where q < 1

The published code is not run. It runs all loops whatever its exit gate says, and does not load in transformers 5.
"""

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_looped import LoopedConfig

from .published import Layout, Tensors, stored_settings

logger = logging.get_logger(__name__)

SAME_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "tie_word_embeddings",
)  # fmt: skip
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The published configurations say 0 for all three, so that generation never stops.
RIGHT_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def same_special_ids(fields: dict) -> bool:
    """Whether bos, eos and pad have one id, which is the fault of the published files."""
    ids = {fields.get(name) for name in SPECIAL_IDS}
    return len(ids) == 1 and None not in ids


def special_ids(fields: dict) -> dict:
    """The ids of bos, eos and pad in an Ouro config.json, corrected if all three are the same."""
    if not same_special_ids(fields):
        return {name: fields.get(name) for name in SPECIAL_IDS}
    logger.warning(f"bos, eos and pad are all {fields['eos_token_id']}: corrected to {RIGHT_IDS}.")
    return dict(RIGHT_IDS)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, fields: dict) -> None:
    """Correct the special tokens of `tokenizer` in place where they have the fault of the published files.

    Raises:
        ValueError: the tokenizer and config.json have different ids.
    """
    of_tokenizer = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, right in special_ids(fields).items():
        found = of_tokenizer[name]
        if found is None or found == right:
            continue
        if not (same_special_ids(fields) and found == fields[name]):
            raise ValueError(
                f"{name} is {right} in the converted configuration and {found} in the tokenizer: write the right id "
                "into config.json, or the right token into tokenizer_config.json."
            )
        setattr(tokenizer, name.removesuffix("_id"), tokenizer.convert_ids_to_tokens(right))


def check_fields(fields: dict) -> None:
    """Raise ValueError for a field of Ouro's configuration that no looped model can express."""
    refused = {
        "use_sliding_window": bool(fields.get("use_sliding_window")),
        "layer_types": bool(set(fields.get("layer_types") or []) - {"full_attention"}),
        "rope_scaling": fields.get("rope_scaling") is not None,
        "quantization_config": fields.get("quantization_config") is not None,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ValueError(
                f"{name}={fields[name]!r} cannot be converted exactly: a converted Ouro attends to all earlier "
                "tokens, rotates by one base and reads plain tensors; take the checkpoint as it was published."
            )


def ouro_config(fields: dict) -> LoopedConfig:
    """The configuration of the looped model, from the fields of a published Ouro config.json.

    Raises:
        ValueError: a field is missing or cannot be mapped exactly.
    """
    check_fields(fields)
    needed = {*SAME_FIELDS, "num_hidden_layers", "total_ut_steps", "rms_norm_eps", "rope_theta"}
    missing = sorted(needed - fields.keys())
    if missing:
        raise ValueError(f"the source's config.json lacks {', '.join(missing)}: it is not the file of an Ouro model.")
    return LoopedConfig(
        **{name: fields[name] for name in SAME_FIELDS},
        **special_ids(fields),
        head_dim=fields.get("head_dim"),
        num_core_layers=fields["num_hidden_layers"],
        num_loops=fields["total_ut_steps"],
        norm_eps=fields["rms_norm_eps"],
        attention_dropout=fields.get("attention_dropout") or 0.0,
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["rope_theta"])},
        norm_placement="sandwich",
        norm_between_loops=True,
        exit_gate=True,
    )


def ouro_generation_settings(source: str, fields: dict, num_loops: int | None = None) -> GenerationConfig:
    """The source's generation settings, with corrected ids, the loop count and the threshold of the exit gate.

    Args:
        source: folder or Hub name.
        fields: of its config.json.
        num_loops: default loop count; the one of the source unless given.
    """
    step = fields.get("early_exit_step")  # counted from 0
    trained = fields["total_ut_steps"] if step is None else step + 1
    settings = stored_settings(source, trained if num_loops is None else num_loops)
    for name, value in special_ids(fields).items():
        setattr(settings, name, value)
    q = fields.get("early_exit_threshold", 1.0)
    if q < 1:
        settings.halting = {"rule": "q_exit", "q": q}
    return settings


def ouro_name(name: str) -> str:
    """The name in the looped model of the published tensor `name`."""
    for published, ours in (
        ("model.layers.", "model.core."),
        ("model.norm.", "model.core_norm."),
        ("model.early_exit_gate.", "model.exit_gate."),
    ):
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return name


def ouro_tensors(published: Tensors, fields: dict) -> Tensors:
    """The tensors of the looped model by name."""
    return {ouro_name(name): tensor for name, tensor in published.items()}


OURO = Layout("Ouro", ouro_config, ouro_tensors, ouro_generation_settings, check_tokenizer)
