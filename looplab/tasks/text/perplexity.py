"""`looped eval` on text: perplexity of a trained run at several loop counts.

    block        of the split test, which shares no document with train and validation, by the run's tokenizer
    block loss   mean cross-entropy of a block's labels, in nats: its tokens, or of conversations what assistants wrote
    loss         mean of the block losses, in nats per token; perplexity = exp(loss)
    interval     95 % bootstrap interval of the perplexity, over blocks

    text.jsonl       a line per loop count: loops, loss, perplexity, interval, tokens, text (digest of the blocks), and
                     block_losses; runs with the same digest can be compared block by block
    evaluation.json  limit, num_loops (the model's own) and parameters, see `count_parameters`; for a halting rule that
                     is saved with the model `halting`, see `language.exits.halted_loss`

The model is the published one, RUN/model.
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
from data_builders.packing import IGNORED
from data_builders.text_batches import spread_blocks
from looplab.instruments.at_loops import at_loops
from looplab.instruments.halting_settings import saved_setting
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.intervals import bootstrap_intervals
from looplab.runs.models import count_parameters, load_run_model
from looplab.tasks.language.exits import PROMPT, halted_loss
from looplab.tasks.quantizing import Quantizing

from .data import TextData
from .records import EVALUATION, PERPLEXITY

HALTED = 64  # most blocks that are decoded with a saved halting rule
TOKENS = 2048  # tokens in one forward pass; its logits have this many times the vocabulary numbers


def run_blocks(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, TextBlocks]:
    """Blocks of the run's splits train and test, with the sequence_length of its recipe, see `Source.run_blocks`.

    Raises:
        ValueError: the run was trained on another text (files changed, or another working folder), or the split test
            is too small for a block.
    """
    return TextData.of(run).source.run_blocks(run, tokenizer)


def first_words(run: Run, number: int = 8) -> str:
    """The first words of the split test. Raises ValueError for a model whose text is not known."""
    if run.bare:
        raise ValueError(f'give a text to go on from, such as `looped ask {run} "Once upon a time"`.')
    return TextData.of(run).source.first_words(run, number)


def text_digest(blocks: TextBlocks, numbers: torch.Tensor) -> str:
    """Short SHA-256 of the tokens in the blocks `numbers`, and of the length of a block."""
    rows = blocks.rows(numbers)
    parts = [f"{blocks.sequence_length}\n".encode(), *(rows[name].numpy().tobytes() for name in sorted(rows))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@torch.inference_mode()
def block_losses(
    model: PreTrainedModel, blocks: TextBlocks, numbers: torch.Tensor, loops: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Loop count -> mean cross-entropy (N,) of each block in `numbers` (N,), in nats per token, float64."""
    num_rows = max(1, TOKENS // blocks.sequence_length)
    losses = {num_loops: [] for num_loops in sorted(loops)}
    with tqdm(total=len(numbers), desc="evaluating", unit="block", mininterval=1) as bar:
        for chosen in numbers.split(num_rows):
            rows = {name: value.to(model.device) for name, value in blocks.rows(chosen).items()}
            labels = rows["shift_labels"]  # (b, T)

            def read(logits: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:  # (b, T, V)
                each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
                # Of a conversation some tokens are no labels.
                return (each.view(len(logits), -1).double().sum(1) / (labels != IGNORED).sum(1)).cpu()

            for num_loops, each in at_loops(model, loops, read, input_ids=rows["input_ids"]).items():
                losses[num_loops].append(each)
            bar.update(len(chosen))
    return {num_loops: torch.cat(parts) for num_loops, parts in losses.items()}


def text_rows(losses: dict[int, torch.Tensor], tokens: int, text: str) -> list[dict]:
    """The lines of text.jsonl, see the module docstring. losses: of `block_losses`."""
    intervals = bootstrap_intervals(torch.stack(list(losses.values())).numpy())
    rows = []
    for (num_loops, each), (low, high) in zip(losses.items(), intervals, strict=True):
        loss = each.mean().item()
        # If all blocks are alike, rounding may put the mean outside its interval, and an error bar would be negative.
        bounds = [perplexity(min(low, loss)), perplexity(max(high, loss))]
        rows.append(
            {"loops": num_loops, "loss": loss, "perplexity": perplexity(loss), "interval": bounds}
            | {"tokens": tokens, "text": text, "block_losses": each.tolist()}
        )
    return rows


def perplexity(loss: float) -> float:
    """exp(loss); math.exp would raise for the huge loss of a model that went astray."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()


def evaluate_run(run: Run, loops: Sequence[int] | None = None, limit: int | None = None) -> Path:
    """Write RUN/text.jsonl and RUN/evaluation.json, see the module docstring; returns the first.

    Args:
        run: a finished one on text.
        loops: loop counts; the model's own and the recipe's `eval_loops` unless given.
        limit: most blocks, the same ones every time; all unless given.

    Raises:
        ValueError: the run has not finished, its text has changed, or the model may not run so many loops.
    """
    run.summary()  # raises if the training has not finished
    model, tokenizer = load_run_model(run, *(loops or ()))
    blocks = run_blocks(run, tokenizer)["test"]
    numbers = spread_blocks(len(blocks), limit)
    own = model.config.num_loops
    losses = block_losses(model, blocks, numbers, sorted(set(loops or [own, *run.recipe()["eval_loops"]])))
    rows = text_rows(losses, blocks.num_labels(numbers), text_digest(blocks, numbers))
    facts = {"limit": limit, "num_loops": own, "parameters": count_parameters(model)}
    if setting := saved_setting(model, rows[-1]["loops"]):
        few = blocks.rows(spread_blocks(len(blocks), min(limit or HALTED, HALTED)))
        facts["halting"] = halted_loss(model, few, min(PROMPT, blocks.sequence_length // 2), setting)
    return run.write({EVALUATION.name: json.dumps(facts, indent=1) + "\n", PERPLEXITY.name: to_json_lines(rows)})


class TextMeasure:
    """Test perplexity, see `Task.measure`: loss, perplexity, interval, block_losses."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, limit: int | None):
        self.blocks = run_blocks(run, tokenizer)["test"]
        self.numbers = spread_blocks(len(self.blocks), limit)

    def __call__(self, model: PreTrainedModel, num_loops: int) -> dict:
        losses = block_losses(model, self.blocks, self.numbers, [num_loops])
        (row,) = text_rows(losses, self.blocks.num_labels(self.numbers), "")
        return {name: row[name] for name in ("loss", "perplexity", "interval", "block_losses")}


class TextQuantizing(Quantizing):
    """Blocks of the training text, and all blocks of the test text."""

    rows, unit = "the blocks of the training text", "token"

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase):
        self.blocks = run_blocks(run, tokenizer)
        test = self.blocks["test"]
        self.test_tokens = test.num_labels(torch.arange(len(test)))

    def __len__(self) -> int:
        return len(self.blocks["train"])

    def calibration(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        rows = max(1, TOKENS // self.blocks["train"].sequence_length)
        return [self.blocks["train"].rows(chosen)["input_ids"] for chosen in numbers.split(rows)]

    def losses(self, model: PreTrainedModel, loops: Sequence[int]) -> dict[int, torch.Tensor]:
        test = self.blocks["test"]
        return block_losses(model, test, torch.arange(len(test)), loops)

    def measure(self, model: PreTrainedModel, num_loops: int, losses: torch.Tensor) -> dict:
        return {"perplexity": perplexity(losses.mean().item()), "block_losses": losses.tolist()}
