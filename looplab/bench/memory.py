"""`looped memory`: quality and KV bytes of one checkpoint under every KV policy and chunk length.

    for each kv_sharing that fits the weights, and each `prefill_chunk`:
        quality on the task if prompts come in chunks of so many tokens (1: as in decoding; 0: in one call)
        bytes of keys and values that a token leaves in the cache

    memory.jsonl   a line per (kv_sharing, chunk): kv_sharing, chunk, trained (it is the model's own kv_sharing),
                   loops, kv_bytes (per token), and the fields of the task's `measure`, with an interval

`per_loop` and `first` do not depend on the chunk length and are measured in one call. Weights without KV gates are
measured with every policy that has none, without training (Ouro, arXiv 2510.25741, table of decode policies); weights
with KV gates fit their own policy only. Policies that the model's attention pattern cannot have are left out.
"""

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import load_run_model
from looplab.tasks.base import MEMORY
from looplab.tasks.registry import task_for
from modeling_looped.cache_looped import SHARINGS

from .pair import kv_bytes_per_token


def with_memory(model: PreTrainedModel, kv_sharing: str, chunk: int | None) -> PreTrainedModel:
    """A model with the same weights under another KV policy. chunk: its `prefill_chunk`; None is the whole call."""
    config = type(model.config).from_dict(model.config.to_dict() | {"kv_sharing": kv_sharing, "prefill_chunk": chunk})
    twin = type(model)(config).to(model.device, model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def kv_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values per token, from a cache that two tokens filled; 0 if the model keeps none."""
    return int(kv_bytes_per_token(model, 2)) if model.model.pattern.takes_cache else 0


def memories(model: PreTrainedModel, chunks: Sequence[int]) -> list[tuple[str, int | None]]:
    """(kv_sharing, chunk) pairs to measure; a policy that does not depend on chunks comes once, with None."""
    own = model.config.kv_sharing
    # Weights that have KV gates fit no other policy, and others lack them.
    sharings = [own] if SHARINGS[own].has_parameters else [s for s in SHARINGS if not SHARINGS[s].has_parameters]
    fitting = model.model.pattern.sharings or sharings
    sharings = [s for s in sharings if s in fitting]
    lengths = [chunk or None for chunk in chunks]
    return [(s, chunk) for s in sharings for chunk in (lengths if SHARINGS[s].rewrites else [None])]


def measure_memory(
    run: Run, chunks: Sequence[int] = (1, 0), limit: int | None = None, loops: int | None = None
) -> Path:
    """Write RUN/memory.jsonl, see the module docstring.

    Args:
        run: a finished one.
        chunks: chunk lengths in tokens; 0 is the whole call.
        limit: of the task's `measure`; all test rows unless given.
        loops: loop count; the model's own unless given.

    Raises:
        ValueError: the run has not finished, or its task has no measure.
    """
    task = task_for("memory", [run])
    run.summary()
    model, tokenizer = load_run_model(run, loops)
    if loops is not None:
        model.config.num_loops = loops
    measure = task.measure(run, tokenizer, limit)
    rows = []
    for kv_sharing, chunk in tqdm(memories(model, chunks), desc="memories", unit="memory"):
        twin = with_memory(model, kv_sharing, chunk)
        facts = {"kv_sharing": kv_sharing, "chunk": chunk or 0, "trained": kv_sharing == model.config.kv_sharing}
        rows.append(
            facts
            | {"loops": model.config.num_loops, "kv_bytes": kv_bytes(twin)}
            | measure(twin, model.config.num_loops)
        )
    return run.write({MEMORY.name: to_json_lines(rows)})


def memory_table(run: Run) -> str:
    """RUN/memory.jsonl as a table of text, with a line per KV policy and chunk length."""
    rows = run.read(MEMORY)
    name = task_for("memory", [run]).measured
    lines = [f"{'kv_sharing':<12}{'chunk':>7}{'KV bytes':>10}{name:>12}   95 % interval"]
    for row in rows:
        low, high = row["interval"]
        mark = "*" if row["trained"] else ""
        chunk = row["chunk"] or "call"
        lines.append(
            f"{row['kv_sharing'] + mark:<12}{chunk:>7}{row['kv_bytes']:>10}{row[name]:12.4f}   {low:.4f} - {high:.4f}"
        )
    return "\n".join([*lines, "* is the policy it was trained with; chunk 1 is decoding token by token."])
