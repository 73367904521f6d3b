"""What is refused before any work, with the value and the remedy.

Legend: B batch rows, T tokens of this call, S cached and new tokens.
"""

import difflib
from collections.abc import Iterable

import torch
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs

from .depth_looped import check_loops_of_rows, too_many_loops
from .masks_looped import PATTERNS

# What engines with caches of their own pass through forward: they pack the tokens of several requests in one call.
ENGINE_ARGUMENTS = frozenset({"attention_instances", "block_table", "cache", "read_index", "write_index"})

# What attention backends and serving engines pass through forward (continuous batching, vLLM); any other keyword that
# is not a parameter is a mistake.
BACKEND_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | ENGINE_ARGUMENTS | {
    "logits_indices", "logits_processor_args", "max_seqlen_k", "max_seqlen_q", "return_dict",
}  # fmt: skip


# Attention implementations of engines that keep the keys and values of every slot themselves.
SERVING_ENGINES = frozenset({"vllm", "sglang"})


def refuse_unknown(kwargs: Iterable[str], known: Iterable[str]) -> None:
    """A misspelt loop argument must not vanish into the attention keywords.

    Args:
        kwargs: names that are no parameters of `forward`.
        known: names of the parameters of `forward`.

    Raises:
        TypeError: an attention backend or engine knows none of them by this name; with the nearest name.
    """
    for name in kwargs:
        if name not in BACKEND_ARGUMENTS:
            names = [*known, *BACKEND_ARGUMENTS]
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"forward got an unexpected keyword argument {name!r}.{hint}")


def refuse_engine(config, sharing, cache, kwargs: dict) -> None:
    """ValueError where an engine packs requests, which this KV policy or pattern of attention cannot take."""
    engine = {name: value for name, value in kwargs.items() if name in ENGINE_ARGUMENTS and value is not None}
    engine |= {} if cache is None or isinstance(cache, Cache) else {"cache": cache}
    if engine:
        name = f"an engine that packs requests ({min(engine)} is given)"
        if sharing.takes_engines:
            raise ValueError(no_pattern(config.attention_pattern, name))
        raise ValueError(no_engine(config.kv_sharing, sharing.engine_trouble, name))


def no_engine(kv_sharing: str, trouble: str, engine: str) -> str:
    """What a refusal says of a KV policy that an engine cannot run."""
    return f"kv_sharing={kv_sharing!r} {trouble.format(engine)}: use generate, or kv_sharing='per_loop' or 'first'."


def no_pattern(attention_pattern: str, engine: str) -> str:
    """What a refusal says of a pattern of attention that looks ahead."""
    return (
        f"attention_pattern={attention_pattern!r} looks ahead, and {engine} lets a token see earlier ones alone: use "
        "forward, or generate where attention_pattern='prefix'."
    )


def check_served(config, sharing, num_loops: int | torch.Tensor | None = None, halts: bool = False) -> None:
    """ValueError where the attention of a serving engine is set and that engine would compute something else.

    Args:
        config: of the model; its `_attn_implementation` names the engine, if there is one.
        sharing: its KV policy.
        num_loops: what a call asks for; None for the configuration's.
        halts: whether a call has a halting rule.
    """
    engine = config._attn_implementation
    if engine not in SERVING_ENGINES:
        return
    if not sharing.takes_engines:
        raise ValueError(no_engine(config.kv_sharing, sharing.engine_trouble, engine))
    if PATTERNS[config.attention_pattern].looks_ahead:
        raise ValueError(no_pattern(config.attention_pattern, engine))
    if halts:
        raise ValueError(
            f"{engine} keeps keys and values of all loops of every token, which a halting rule would leave out: use "
            "generate, or leave halting out."
        )
    if num_loops is not None and (isinstance(num_loops, torch.Tensor) or num_loops != config.num_loops):
        raise ValueError(
            f"num_loops={num_loops!r} cannot be asked of {engine}, whose cache is made for "
            f"config.num_loops={config.num_loops}: set the depth when the model is loaded, in vLLM by "
            "hf_overrides={'num_loops': ...}."
        )


def cuts_show(kv_sharing: str) -> str:
    """What a refusal says of a KV policy whose tokens depend on how a prompt is cut."""
    return f"kv_sharing={kv_sharing!r} gives other tokens where a prompt is cut"


def check_no_cache(attention_pattern: str, past_key_values) -> None:
    """ValueError for a cache where every token sees later ones, so that no call can go on from an earlier one."""
    if past_key_values is not None:
        raise ValueError(
            f"attention_pattern={attention_pattern!r} has no cache, since every token sees later ones: give the whole "
            "text in one call, without past_key_values."
        )


def check_positions(logits_to_keep: int | torch.Tensor) -> None:
    """ValueError where the positions whose logits are kept differ between batch rows."""
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim != 1:
        raise ValueError(
            "halting and the loss of an exit gate need positions that all rows share: logits_to_keep must be an int "
            f"or a 1-D tensor, got a {logits_to_keep.ndim}-D tensor."
        )


def leave_graph(reasons: dict[str, bool]) -> None:
    """End the graph in the making where a call depends on values that it cannot know.

    `torch.compile` goes on with another graph; with `fullgraph=True` it fails with the reason.

    Args:
        reasons: what a call may depend on -> whether it does.

    Raises:
        ValueError: the graph is to be exported.
    """
    for name, holds in reasons.items():
        if holds:
            reason = f"{name} makes a call data-dependent: compile model.model.pieces() one by one, export without it."
            torch._dynamo.graph_break(msg=reason)
            if torch.compiler.is_exporting():
                raise ValueError(reason)


def check_inputs(config, input_ids, inputs_embeds, attention_mask, past_key_values) -> tuple[int, int]:
    """B and T of a call, after checking what would otherwise fail far from its cause.

    Raises:
        ValueError: not one of ids and embeddings, ids beyond the vocabulary, or a (B, S) mask of another shape.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds.")
    batch_size, num_tokens = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
    # Only on CPU, where it is free: on an accelerator it would wait for the device and break graph capture.
    checkable = input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if checkable and input_ids.numel():
        lowest, highest = (int(bound) for bound in input_ids.aminmax())
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"input_ids must be in [0, {config.vocab_size - 1}] (vocab_size={config.vocab_size}), got values from "
                f"{lowest} to {highest}: is this the tokenizer of another model?"
            )
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    # A static cache counts on the device; its masks are made by generate.
    checkable = is_row_mask(attention_mask) and isinstance(past, int)
    if checkable and attention_mask.shape != (batch_size, past + num_tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but there are {batch_size} rows of {past} "
            f"cached + {num_tokens} new tokens: expected {(batch_size, past + num_tokens)}."
        )
    return batch_size, num_tokens


def is_row_mask(attention_mask) -> bool:
    """Whether it is a (B, S) mask of real tokens, as opposed to a prepared 4-D or block mask."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def check_loops(num_loops, batch_size: int, max_num_loops: int | None) -> int | torch.Tensor:
    """The loop count of a call: an int in 1 .. max_num_loops, or a (B,) LongTensor of such; ValueError otherwise."""
    num_loops = check_loops_of_rows(num_loops, batch_size)
    if max_num_loops is not None:
        most = num_loops if isinstance(num_loops, int) else int(num_loops.max())
        if most > max_num_loops:
            raise ValueError(too_many_loops(most, max_num_loops))
    return num_loops


def check_grad_loops(num_grad_loops: int | None, num_loops: int | torch.Tensor) -> int:
    """The first loop that is differentiated, counted from 0; ValueError for a count that is no int >= 1."""
    if num_grad_loops is None:
        return 0
    if isinstance(num_loops, torch.Tensor):
        raise ValueError("num_grad_loops needs one num_loops for the whole batch: rows of different depth end apart.")
    if isinstance(num_grad_loops, bool) or not isinstance(num_grad_loops, int) or num_grad_loops < 1:
        raise ValueError(f"num_grad_loops must be an int >= 1, got {num_grad_loops!r}.")
    return max(num_loops - num_grad_loops, 0)
