"""`looped halting` on text: measures halting on held-out blocks, by language/exits.py."""

from pathlib import Path

from data_builders.text_batches import spread_blocks
from looplab.instruments.halting_settings import exit_settings
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import load_run_model
from looplab.tasks.language.exits import BATCHES, DECODED, PROMPT, exit_rows

from .perplexity import run_blocks
from .records import HALTING


def halting_run(run: Run, num_loops: int | None = None, limit: int | None = None, rounds: int = 5) -> Path:
    """Write RUN/halting.jsonl, see `exit_rows`.

    Args:
        run: a finished one on text.
        num_loops: the budget; the model's own loop count unless given.
        limit: number of test blocks, 64 unless given, and at least 16.
        rounds: interleaved pairs.

    Raises:
        ValueError: the run has not finished, its text has changed, its blocks are too short or too few, or there is
            only one loop.
    """
    model, tokenizer = load_run_model(run, num_loops)
    model.eval()
    blocks = run_blocks(run, tokenizer)["test"]
    if blocks.sequence_length < PROMPT + DECODED:
        raise ValueError(
            f"data.sequence_length of {run} is {blocks.sequence_length}, and exits are measured on rows of "
            f"{PROMPT} + {DECODED} tokens: train on longer ones."
        )
    numbers = spread_blocks(len(blocks), 64 if limit is None else limit)
    if len(numbers) < max(BATCHES):
        raise ValueError(f"there are {len(numbers)} rows of test text, and a batch takes {max(BATCHES)}: allow more.")
    rows = {name: value[:, : PROMPT + DECODED].to(model.device) for name, value in blocks.all_rows(numbers).items()}
    num_loops = model.config.num_loops if num_loops is None else num_loops
    results = exit_rows(model, rows, PROMPT, num_loops, exit_settings(model.config, num_loops, "decoded"), rounds)
    return run.write({HALTING.name: to_json_lines(results)})
