"""`looped lens` on text: what a model would say if it stopped after each loop, by language/lens.py."""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from data_builders.text_batches import spread_blocks
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.tasks.language.lens import measure_lens

from .perplexity import run_blocks, text_digest
from .records import LENS

LIMIT = 32  # blocks of test text


def lens_run(
    run: Run, text: str | None = None, num_loops: int | None = None, limit: int | None = None, format: str = "png"
) -> list[Path]:
    """Write RUN/lens.jsonl and RUN/figures/lens.png; returns their paths.

    Args:
        text: looked at instead of the run's test text.
        num_loops: the last loop; the model's own count unless given.
        limit: most blocks of test text, `LIMIT` unless given, the same ones every time.

    Raises:
        ValueError: the run has not finished, its text has changed, the model may not run so many loops, or there is no
            text: a model without a recipe has none of its own.
    """
    if text is None and run.bare:
        raise ValueError(f"{run} does not say which text it was trained on: name a text to look at by --text.")
    model, tokenizer = load_run_model(run, num_loops)
    num_loops = model.config.num_loops if num_loops is None else num_loops
    model.eval()
    if text is None:
        blocks = run_blocks(run, tokenizer)["test"]
        numbers = spread_blocks(len(blocks), LIMIT if limit is None else limit)
        load, digest = blocks.all_rows, text_digest(blocks, numbers)
    else:
        load, numbers, digest = partial(rows_of_text, tokenizer, text), torch.arange(1), text
    facts = {"weights": run.weights, "last": num_loops, "text": digest}
    what = "blocks of test text" if text is None else None
    return measure_lens(run, model, tokenizer, load, numbers, facts, LENS, blocks=what, format=format)


def rows_of_text(tokenizer: PreTrainedTokenizerBase, text: str, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """The one row of a text, in the form of `TextBlocks.rows`. Raises ValueError if it has no tokens."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise ValueError("the text has no tokens: give some, in quotes.")
    return {"input_ids": ids, "shift_labels": torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)}
