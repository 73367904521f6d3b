"""`looped lens` on questions: what a model would answer if it stopped after each loop, by language/lens.py."""

from pathlib import Path

import torch

from data_builders.text_batches import spread_blocks
from looplab.runs.folder import Run
from looplab.runs.models import load_run_model
from looplab.tasks.language.lens import measure_lens

from .data import SequenceData
from .records import LENS
from .rows import encoded, load_questions

LIMIT = 32  # test rows


def lens_run(run: Run, num_loops: int | None = None, limit: int | None = None, format: str = "png") -> list[Path]:
    """Write RUN/lens.jsonl and RUN/figures/lens.png; returns their paths.

    Args:
        num_loops: the last loop; the model's own count unless given.
        limit: most test rows, `LIMIT` unless given, the same ones every time, spread over the grades.

    Raises:
        ValueError: the run has not finished, its data have changed, or the model may not run so many loops.
    """
    model, tokenizer = load_run_model(run, num_loops)
    model.eval()
    if model.model.pattern.tells_prompts:
        raise ValueError(
            f"{run} has attention_pattern='prefix', and the lens reads question and answer as one prompt: "
            "it is for causal models, and for answers in place."
        )
    rows = encoded(SequenceData.of(run), load_questions(run), tokenizer, ("test",))["test"]
    numbers = spread_blocks(len(rows), LIMIT if limit is None else limit)
    numbers = torch.from_numpy(rows.grades.argsort(kind="stable"))[numbers]
    num_loops = model.config.num_loops if num_loops is None else num_loops
    facts = {"weights": run.weights, "last": num_loops, "rows": len(numbers)}

    def load(number: torch.Tensor) -> dict[str, torch.Tensor]:
        return rows.stacked(number.tolist())

    return measure_lens(
        run, model, tokenizer, load, numbers, facts, LENS, blocks="answers to test questions", format=format
    )
