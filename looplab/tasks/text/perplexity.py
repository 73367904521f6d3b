"""Perplexity of a trained run on text, at several loop counts: what `looped eval` does for the task text.

    blocks       of the test split, which shares no document with train and validation, under the run's own tokenizer
    block loss   mean cross-entropy of a block's tokens, in nats
    loss         mean of the block losses: nats per token; perplexity = exp(loss)
    interval     95 % of the bootstrap over blocks, of the perplexity

    text.jsonl   a line per loop count: loops, loss, perplexity, interval, tokens, text (digest of the blocks), and
                 block_losses in the order of the blocks: runs with the same digest may be compared block by block
    evaluation.json  limit, num_loops (the model's own) and parameters, see `count_parameters`

What is evaluated is what ships: the weights in `RUN/model`, loaded by `runs/models.py`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import TextBlocks
from data_builders.text_batches import spread_blocks
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.intervals import bootstrap_intervals
from looplab.runs.models import count_parameters, load_run_model

from .data import TextData
from .records import EVALUATION, PERPLEXITY

TOKENS = 2048  # that go through the model at once: their logits are this times the vocabulary


def run_blocks(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, TextBlocks]:
    """Blocks of the splits train and test of the run's text, of the length it was trained on.

    Raises:
        ValueError: the text is not the one the run was trained on (files changed, or another working folder), or its
            test split is too small for a block.
    """
    data = TextData.of(run)
    splits = data.load()
    trained_on = run.summary()["train_tokens"]
    blocks = {split: TextBlocks(splits[split], tokenizer, data.sequence_length) for split in ("train", "test")}
    found = blocks["train"].num_tokens
    if found != trained_on:
        raise ValueError(
            f"the text of {run.folder} has {found} training tokens now and had {trained_on} when it was trained, so "
            "its test split may be known to the model: restore the files its recipe names, or train again."
        )
    run.check_data(splits)
    return blocks


def text_digest(blocks: TextBlocks, numbers: torch.Tensor) -> str:
    """Short SHA-256 of the tokens of the blocks, and of how long a block is."""
    rows = blocks.rows(numbers)
    parts = [f"{blocks.sequence_length}\n".encode(), *(rows[name].numpy().tobytes() for name in sorted(rows))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@torch.inference_mode()
def block_losses(
    model: PreTrainedModel, blocks: TextBlocks, numbers: torch.Tensor, loops: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Loop count -> mean cross-entropy (N,) of each block in `numbers` (N,), in nats per token, float64.

    The largest loop count comes first, so that one the model cannot run is refused before any work.
    """
    num_rows = max(1, TOKENS // blocks.sequence_length)
    losses = {}
    with tqdm(total=sum(loops) * len(numbers), desc="evaluating", unit="loop", unit_scale=True, mininterval=1) as bar:
        for num_loops in sorted(loops, reverse=True):
            parts = []
            for chosen in numbers.split(num_rows):
                rows = {name: value.to(model.device) for name, value in blocks.rows(chosen).items()}
                logits = model(input_ids=rows["input_ids"], num_loops=num_loops, use_cache=False).logits  # (b, T, V)
                logits, labels = logits.flatten(0, 1).float(), rows["shift_labels"].flatten()
                each = F.cross_entropy(logits, labels, reduction="none").view(len(chosen), -1)  # (b, T)
                parts.append(each.double().mean(1).cpu())
                bar.update(num_loops * len(chosen))
            losses[num_loops] = torch.cat(parts)
    return {num_loops: losses[num_loops] for num_loops in sorted(losses)}


def text_rows(losses: dict[int, torch.Tensor], tokens: int, text: str) -> list[dict]:
    """The lines of text.jsonl, see the module docstring."""
    intervals = bootstrap_intervals(torch.stack(list(losses.values())).numpy())
    rows = []
    for (num_loops, each), (low, high) in zip(losses.items(), intervals, strict=True):
        loss = each.mean().item()
        # Rounding may leave the mean itself outside where all blocks are alike: an error bar of negative length.
        bounds = [perplexity(min(low, loss)), perplexity(max(high, loss))]
        rows.append(
            {"loops": num_loops, "loss": loss, "perplexity": perplexity(loss), "interval": bounds}
            | {"tokens": tokens, "text": text, "block_losses": each.tolist()}
        )
    return rows


def perplexity(loss: float) -> float:
    """exp(loss); not math.exp, which raises where the loss of a model that went astray is too large."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def evaluate_run(run: Run, loops: Sequence[int] | None = None, limit: int | None = None) -> Path:
    """Write RUN/text.jsonl and RUN/evaluation.json, see the module docstring; returns the first.

    Args:
        run: a finished one on text.
        loops: loop counts; the model's own and the recipe's `eval_loops` unless given.
        limit: at most so many blocks, the same ones every time; all unless given.

    Raises:
        ValueError: the run has not finished, its text has changed, or the model cannot run so many loops.
    """
    run.summary()  # says so if the training has not finished
    model, tokenizer = load_run_model(run, *(loops or ()))
    blocks = run_blocks(run, tokenizer)["test"]
    numbers = spread_blocks(len(blocks), limit)
    own = model.config.num_loops
    losses = block_losses(model, blocks, numbers, sorted(set(loops or [own, *run.recipe()["eval_loops"]])))
    rows = text_rows(losses, len(numbers) * blocks.sequence_length, text_digest(blocks, numbers))
    facts = {"limit": limit, "num_loops": own, "parameters": count_parameters(model)}
    return run.write({EVALUATION.name: json.dumps(facts, indent=1) + "\n", PERPLEXITY.name: to_json_lines(rows)})


class TextMeasure:
    """Test perplexity, see `Task.measure`: loss, perplexity, interval, block_losses."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, limit: int | None):
        self.blocks = run_blocks(run, tokenizer)["test"]
        self.numbers = spread_blocks(len(self.blocks), limit)

    def __call__(self, model: PreTrainedModel, num_loops: int) -> dict:
        losses = block_losses(model, self.blocks, self.numbers, [num_loops])
        (row,) = text_rows(losses, len(self.numbers) * self.blocks.sequence_length, "")
        return {name: row[name] for name in ("loss", "perplexity", "interval", "block_losses")}
