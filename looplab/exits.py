"""What leaving the loop early saves a run on text, and costs it: `looped halting RUN` writes RUN/halting.jsonl.

    for every rule and threshold:
        quality    held-out text is decoded token by token through the KV cache, teacher-forced: nats per token, how
                   often the likeliest token is that of all loops, mean loops of a token
        time       the same tokens, with the rule and with all loops in turn, in batches of 1 and 16 rows: rows that
                   are done leave the batch, and a loop that none is left in is not run

The prompt is run with all loops either way. A token that stopped early leaves in the cache what `kv_sharing` says it
does; every one of them is measured alike. Layer calls are counted by hooks on the core's layers.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from .benchmark import counted_calls, entropy_bound, interleaved, ratio_of, ratio_text
from .evaluation import load_run_model
from .perplexity import run_blocks, spread_blocks
from .runs import open_run, to_json_lines, write_whole

PROMPT, DECODED = 32, 32  # tokens of a row
BATCHES = (1, 16)
KL = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # nats
CHANGE = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
SHARE = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def rules(model: PreTrainedModel) -> list[dict]:
    """Every rule with its thresholds, as `forward` takes them."""
    bound = entropy_bound(model.config.vocab_size)
    settings = [{"rule": "kl_entropy", "kl_threshold": kl, "max_entropy": bound} for kl in KL]
    settings += [{"rule": "latent", "threshold": change} for change in CHANGE]
    settings += [{"rule": "q_exit", "q": share} for share in SHARE if model.config.exit_gate]
    return settings


@dataclass(frozen=True)
class Decoded:
    """Rows decoded token by token: `losses` and `said` (likeliest token), `loops`, each (N, DECODED)."""

    losses: torch.Tensor
    said: torch.Tensor
    loops: torch.Tensor


@torch.inference_mode()
def decode(model: PreTrainedModel, rows: dict, num_loops: int, halting: dict | None) -> Decoded:
    """Teacher-forced decoding of `input_ids` (N, PROMPT + DECODED) with `shift_labels` of the same shape."""
    ids, labels = rows["input_ids"], rows["shift_labels"][:, PROMPT:]
    cache = DynamicCache()
    model(ids[:, :PROMPT], past_key_values=cache, use_cache=True, num_loops=num_loops, logits_to_keep=1)
    losses, said, loops = [], [], []
    for token, label in zip(ids[:, PROMPT:].split(1, dim=1), labels.unbind(1), strict=True):
        output = model(token, past_key_values=cache, use_cache=True, num_loops=num_loops, halting=halting)
        logits = output.logits[:, -1].float()
        losses.append(F.cross_entropy(logits, label, reduction="none"))
        said.append(logits.argmax(-1))
        loops.append(output.loops_used[:, -1])
    return Decoded(*(torch.stack(part, dim=1).cpu() for part in (losses, said, loops)))


def exit_rows(model: PreTrainedModel, rows: dict, num_loops: int, rounds: int) -> list[dict]:
    """A row of halting.jsonl per rule, threshold and batch size.

    loss, full_loss       nats per token with the rule, and with all loops
    agreement             share of the tokens whose likeliest one is that of all loops
    loops                 mean of the decoded tokens
    layer_calls           calls of core layers as a share of those of all loops; row_calls: each times its rows
    ratio                 seconds of all loops over seconds with the rule, median (ratio_min, ratio_max) of pairs

    Args:
        rows: `input_ids` and `shift_labels` (N, PROMPT + DECODED), N >= 16.
    """
    full = decode(model, rows, num_loops, None)
    results = []
    for rule in tqdm(rules(model), desc="exits", unit="rule"):
        halted = decode(model, rows, num_loops, rule)
        quality = {
            "loss": float(halted.losses.double().mean()),
            "full_loss": float(full.losses.double().mean()),
            "agreement": float((halted.said == full.said).double().mean()),
            "loops": float(halted.loops.double().mean()),
            "tokens": halted.loops.numel(),
        }
        for batch in BATCHES:
            some = {name: values[:batch] for name, values in rows.items()}

            def once(halting, some=some):
                return decode(model, some, num_loops, halting)

            counts = []
            for halting in (rule, None):
                with counted_calls(model) as calls:
                    once(halting)
                counts.append((len(calls), sum(calls)))
            (calls, row_calls), (all_calls, all_row_calls) = counts
            pairs = interleaved(lambda rule=rule: once(rule), lambda: once(None), rounds, warmup=1)
            results.append(
                {"measure": "exit", **rule, "num_loops": num_loops, "batch": batch, **quality}
                | {"layer_calls": calls / all_calls, "row_calls": row_calls / all_row_calls}
                | ratio_of(pairs)
            )
    return results


def exits_run(folder: str | Path, num_loops: int | None = None, limit: int | None = None, rounds: int = 5) -> Path:
    """Write RUN/halting.jsonl, see `exit_rows`.

    Args:
        folder: a finished run on text.
        num_loops: all loops; the model's own unless given.
        limit: so many rows of test text, 64 unless given, and at least 16.
        rounds: timed pairs.

    Raises:
        ValueError: no such run, it has not finished, its text has changed, its blocks are too short, or too few rows.
    """
    run = open_run(folder)
    model, tokenizer = load_run_model(run)
    model.eval()
    blocks = run_blocks(run, tokenizer)["test"]
    if blocks.sequence_length < PROMPT + DECODED:
        raise ValueError(
            f"data.sequence_length of {run.folder} is {blocks.sequence_length}, and exits are measured on rows of "
            f"{PROMPT} + {DECODED} tokens: train on longer ones."
        )
    numbers = spread_blocks(len(blocks), 64 if limit is None else limit)
    if len(numbers) < max(BATCHES):
        raise ValueError(f"there are {len(numbers)} rows of test text, and a batch takes {max(BATCHES)}: allow more.")
    rows = {name: value[:, : PROMPT + DECODED].to(model.device) for name, value in blocks.rows(numbers).items()}
    results = exit_rows(model, rows, model.config.num_loops if num_loops is None else num_loops, rounds)
    return write_whole(run.folder / "halting.jsonl", to_json_lines(results))


def exits_text(rows: list[dict]) -> str:
    """The rows as a table."""
    first = rows[0]
    text = [
        f"{first['num_loops']} loops: {first['full_loss']:.3f} nats per token, {first['tokens']} tokens decoded",
        f"{'rule':<12}{'threshold':>10}{'batch':>7}{'loops':>7}{'calls':>8}{'row calls':>11}{'nats':>8}{'agree':>8}"
        "   speed (all loops / rule)",
    ]
    for row in rows:
        threshold = row.get("kl_threshold", row.get("threshold", row.get("q")))
        text.append(
            f"{row['rule']:<12}{threshold:>10g}{row['batch']:>7}{row['loops']:>7.2f}{100 * row['layer_calls']:>6.0f} %"
            f"{100 * row['row_calls']:>9.0f} %{row['loss']:>8.3f}{100 * row['agreement']:>6.1f} %   "
            f"{ratio_text(row)}"
        )
    return "\n".join(text)
