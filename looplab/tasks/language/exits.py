"""`looped halting` on text: what halting saves, and what it costs. Molecules: tasks/molecules/exits.py.

    for every halting rule at every threshold, and for every fixed loop count, which a rule must beat:
        quality    decode held-out sequences token by token with the KV cache, teacher-forced: nats per token, how
                   often the likeliest token is the same as with all loops, mean loops of a token
        time       decode the same tokens with the rule and with all loops in turn, in batches of 1 and 16 sequences:
                   a batch row that has halted costs no more work, and a loop without batch rows is not run

The prompt of a text runs with all loops, or with the fixed loop count. What a token that halted early leaves in the
cache depends on `kv_sharing`. Layer calls are counted by hooks on the core's layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from data_builders.packing import IGNORED
from looplab.instruments.halting_settings import HaltingSetting, saved_text, threshold_text
from looplab.instruments.timing import counted_calls, interleaved, ratio_of, ratio_text

PROMPT, DECODED = 32, 32  # tokens of each text: prompt, then decoded
BATCHES = (1, 16)  # batch sizes that are timed
SLACK = 0.01  # nats per token that a threshold may cost


@dataclass(frozen=True)
class Decoded:
    """Sequences decoded token by token; every tensor is (N, T).

    losses: nats. said: the likeliest token. loops: of the token. real: whether the token has a label.
    """

    losses: torch.Tensor
    said: torch.Tensor
    loops: torch.Tensor
    real: torch.Tensor


@torch.inference_mode()
def decode(model: PreTrainedModel, rows: dict, prompt: int, num_loops: int, halting: dict | None) -> Decoded:
    """Decode `input_ids` (N, prompt + T), teacher-forced; `shift_labels`, of the same shape, are the next tokens.

    A sequence may end earlier: from there on its labels are -100, and its batch row is dropped.
    """
    ids, labels = rows["input_ids"], rows["shift_labels"][:, prompt:]
    real = labels != IGNORED
    lengths = real.sum(1)
    losses, said, loops = (torch.zeros(labels.shape, dtype=dtype) for dtype in (torch.float32, torch.long, torch.long))
    cache = DynamicCache()
    if prompt:
        model(ids[:, :prompt], past_key_values=cache, use_cache=True, num_loops=num_loops, logits_to_keep=1)
    left = torch.arange(len(ids), device=ids.device)
    for step in range(int(lengths.max())):
        going = lengths[left] > step
        if not going.all():
            left = left[going]
            cache.batch_select_indices(going.nonzero().squeeze(1))
        token = ids[left, prompt + step].unsqueeze(1)
        output = model(token, past_key_values=cache, use_cache=True, num_loops=num_loops, halting=halting)
        logits, rows_left = output.logits[:, -1].float(), left.cpu()
        losses[rows_left, step] = F.cross_entropy(logits, labels[left, step], reduction="none").cpu()
        said[rows_left, step] = logits.argmax(-1).cpu()
        loops[rows_left, step] = output.loops_used[:, -1].cpu()
    return Decoded(losses, said, loops, real.cpu())


def quality_of(decoded: Decoded, full: Decoded, chosen: torch.Tensor) -> dict:
    """loss, full_loss, agreement, loops and tokens, see `exit_rows`, over the tokens that are True in `chosen` (N, T).

    full: decoded with all loops.
    """
    return {
        "loss": float(decoded.losses[chosen].double().mean()),
        "full_loss": float(full.losses[chosen].double().mean()),
        "agreement": float((decoded.said == full.said)[chosen].double().mean()),
        "loops": float(decoded.loops[chosen].double().mean()),
        "tokens": int(chosen.sum()),
    }


def halted_loss(model: PreTrainedModel, rows: dict, prompt: int, setting: HaltingSetting) -> dict:
    """What a halting setting does to held-out sequences: its own fields, and those of `quality_of`.

    rows, prompt: as for `decode`; at most DECODED tokens are decoded.
    """
    some = {name: values[:, : prompt + DECODED].to(model.device) for name, values in rows.items()}
    full = decode(model, some, prompt, setting.num_loops, None)
    halted = decode(model, some, prompt, setting.num_loops, setting.halting)
    return setting.row() | quality_of(halted, full, full.real)


def halted_text(row: dict) -> str:
    """The record of `halted_loss` as a line of text."""
    found = f"{row['loss']:.4f} nats per token in {row['loops']:.2f} loops, {row['full_loss']:.4f} in all"
    return saved_text(row, f"{found} ({row['tokens']:,} tokens decoded)")


def exit_rows(
    model: PreTrainedModel,
    rows: dict,
    prompt: int,
    num_loops: int,
    settings: Sequence[HaltingSetting],
    rounds: int,
    batches: Sequence[int] = BATCHES,
) -> list[dict]:
    """Records of halting.jsonl, one per setting and batch size, each compared with all `num_loops` loops:

    rule, its thresholds  `fixed` for a fixed loop count
    num_loops             the budget, or the fixed loop count
    loss, full_loss       nats per token with the rule, and with all loops
    agreement             share of tokens whose likeliest token is the same with all loops
    loops                 mean loops of the decoded tokens
    fixed_loss            nats per token at as many loops, on the straight lines between the fixed loop counts
    layer_calls           calls of core layers, as a share of the calls with all loops
    row_calls             batch rows in these calls, as a share of those with all loops
    ratio                 seconds with all loops over seconds with the rule, median (ratio_min, ratio_max) of pairs

    Quality is measured on all sequences; time and calls on the first `batch` of them.

    Args:
        rows: `input_ids` and `shift_labels` (N, prompt + T), see `decode`; N is at least the largest batch size.
        prompt: tokens of a sequence that are not decoded.
        settings: as from `exit_settings`, with the fixed loop counts below `num_loops`.
        rounds: interleaved pairs.
        batches: batch sizes.
    """
    full = decode(model, rows, prompt, num_loops, None)
    results = []
    for setting in tqdm(settings, desc="exits", unit="rule"):
        quality = quality_of(decode(model, rows, prompt, setting.num_loops, setting.halting), full, full.real)
        for batch in batches:
            some = {name: values[:batch] for name, values in rows.items()}

            def once(which: HaltingSetting, some=some):
                return decode(model, some, prompt, which.num_loops, which.halting)

            counts = []
            for which in (setting, HaltingSetting(None, num_loops)):
                with counted_calls(model) as calls:
                    once(which)
                counts.append((len(calls), sum(calls)))
            (calls, row_calls), (all_calls, all_row_calls) = counts
            pairs = interleaved(
                lambda setting=setting: once(setting), lambda: once(HaltingSetting(None, num_loops)), rounds, warmup=0
            )
            results.append(
                {"measure": "exit", **setting.row(), "batch": batch, **quality}
                | {"layer_calls": calls / all_calls, "row_calls": row_calls / all_row_calls}
                | ratio_of(pairs)
            )
    fixed = {row["num_loops"]: row["loss"] for row in results if row["rule"] == "fixed"}
    fixed[num_loops] = results[0]["full_loss"]
    return [row | {"fixed_loss": between_counts(fixed, row["loops"])} for row in results]


def cost(row: dict, rows: Sequence[dict]) -> tuple[float, float]:
    """(nats per token more than the best fixed loop count, 0 if at most SLACK; mean loops).

    Args:
        row: a record of measure exit.
        rows: all of these records.
    """
    best = min(row["loss"] if row["rule"] == "fixed" else row["full_loss"] for row in rows)
    more = row["loss"] - best
    return (0.0 if more <= SLACK else more, row["loops"])


def cheapest(rows: Sequence[dict]) -> list[dict]:
    """For each rule but `fixed`, the record of measure exit with the lowest `cost`."""
    names = dict.fromkeys(row["rule"] for row in rows if row["rule"] != "fixed")
    return [min((row for row in rows if row["rule"] == name), key=lambda row: cost(row, rows)) for name in names]


def best_rule(rows: Sequence[dict]) -> tuple[dict | None, str]:
    """See `Task.best_rule`: the rule with the lowest `cost`; it may not cost more than SLACK.

    rows: the records of halting.jsonl.
    """
    rows = [row for row in rows if row["measure"] == "exit"]
    best = min(cheapest(rows), key=lambda row: cost(row, rows), default=None)
    best = best if best is not None and cost(best, rows)[0] == 0 else None
    return best, f"costs at most {SLACK} nats per token more than the best fixed loop count"


def between_counts(fixed: dict[int, float], loops: float) -> float:
    """The value that fixed loop counts reach at a mean of `loops` loops, by linear interpolation.

    fixed: loop count -> value. Raises ValueError if `loops` is beyond them.
    """
    for (low, one), (high, two) in pairwise(sorted(fixed.items())):
        if low <= loops <= high:
            return one + (two - one) * (loops - low) / (high - low)
    raise ValueError(f"{loops} loops are not between {min(fixed)} and {max(fixed)}.")


def exits_text(rows: Sequence[dict]) -> str:
    """The records of measure exit as a table of text."""
    first = rows[0]
    columns = f"{'batch':>7}{'loops':>7}{'calls':>8}{'row calls':>11}{'nats':>8}{'fixed':>8}{'agree':>8}"
    text = [
        f"{first['num_loops']} loops: {first['full_loss']:.3f} nats per token, {first['tokens']} tokens decoded; "
        "fixed: nats of fixed loop counts at as many loops",
        f"{'rule':<12}{'threshold':>10}{columns}   speed (all loops / rule)",
    ]
    for row in rows:
        text.append(
            f"{row['rule']:<12}{threshold_text(row):>10}{row['batch']:>7}{row['loops']:>7.2f}"
            f"{100 * row['layer_calls']:>6.0f} %{100 * row['row_calls']:>9.0f} %"
            f"{row['loss']:>8.3f}{row['fixed_loss']:>8.3f}{100 * row['agreement']:>6.1f} %   {ratio_text(row)}"
        )
    return "\n".join(text)
