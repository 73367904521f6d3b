"""`looped quantize`, `memory`, `dynamics` and `bench` on questions: rows to calibrate on, test rows, prompts."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.drawing import spread
from looplab.runs.folder import Run
from looplab.runs.intervals import wilson_interval
from looplab.tasks.quantizing import Quantizing

from .data import SequenceData
from .measures import TOKENS, said_at
from .rows import encoded, groups_of, load_questions


def trained_rows(rows, trained: Sequence[int], limit: int | None = None) -> np.ndarray:
    """Numbers of the rows of trained grades, `limit` at most of each grade and kind."""
    groups = [numbers for (grade, _), numbers in groups_of(rows, limit).items() if grade in trained]
    if not groups:
        raise ValueError("the split test has no rows of a trained grade: there is nothing to measure.")
    return np.sort(np.concatenate(groups))


def sorts_of(run: Run, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, list[torch.Tensor]]:
    """Test rows of at most six grades, `limit` of each, as batches of one length."""
    rows = encoded(SequenceData.of(run), load_questions(run), tokenizer, ("test",))["test"]
    found = {}
    for grade in spread(np.unique(rows.grades).tolist(), 6):
        numbers = np.flatnonzero(rows.grades == grade)[:limit]
        batches = rows.by_length(numbers, TOKENS)
        found[f"grade {grade}"] = [rows.stacked(batch)["input_ids"] for batch in batches]
    return found


def prompts_of(run: Run, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> torch.Tensor:
    """Token ids (at most count, T) of whole prompts of test rows, of the commonest T up to `length`.

    Raises ValueError for answers in place, which nobody writes on, and if all prompts are longer.
    """
    rows = encoded(SequenceData.of(run), load_questions(run), tokenizer, ("test",))["test"]
    if rows.in_place:
        raise ValueError(f"{run} answers in place, in one pass: drafts are for answers that are written.")
    sizes = Counter(int(first) + 1 for first in rows.firsts if first < length)
    if not sizes:
        raise ValueError(f"the prompts of {run} have more than {length} tokens each: drafts are not timed on them.")
    common = sizes.most_common(1)[0][0]
    chosen = np.flatnonzero(rows.firsts == common - 1)[:count]
    return torch.stack([torch.from_numpy(rows.row(number)[0][:common]) for number in chosen])


class SequenceMeasure:
    """Right answers to the test rows of trained grades, see `Task.measure`: exact, interval (Wilson), n."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, limit: int | None):
        self.rows = encoded(SequenceData.of(run), load_questions(run), tokenizer, ("test",))["test"]
        self.numbers = trained_rows(self.rows, run.summary()["trained_grades"], limit)

    def __call__(self, model: PreTrainedModel, num_loops: int) -> dict:
        said = said_at(model, self.rows, self.numbers, [num_loops])[num_loops]
        exact = float(said.exact.double().mean())
        return {"exact": exact, "interval": wilson_interval(exact, len(self.numbers)), "n": len(self.numbers)}


class SequenceQuantizing(Quantizing):
    """Questions with their answers, in batches of one length; the loss is that of the answer's tokens."""

    rows, unit = "the training questions", "token"

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase):
        rows = encoded(SequenceData.of(run), load_questions(run), tokenizer, ("train", "test"))
        self.train, self.test = rows["train"], rows["test"]
        trained = run.summary()["trained_grades"]
        self.numbers, self.tested = (trained_rows(part, trained) for part in (self.train, self.test))
        self.test_tokens = int(self.test.num_labels()[self.tested].sum())

    def __len__(self) -> int:
        return len(self.numbers)

    def calibration(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        batches = self.train.by_length(self.numbers[numbers.numpy()], TOKENS)
        return [self.train.stacked(batch)["input_ids"] for batch in batches]

    def losses(self, model: PreTrainedModel, loops: Sequence[int]) -> dict[int, torch.Tensor]:
        found = said_at(model, self.test, self.tested, loops)
        return {count: said.loss / said.labels for count, said in found.items()}

    def measure(self, model: PreTrainedModel, num_loops: int, losses: torch.Tensor) -> dict:
        said = said_at(model, self.test, self.tested, [num_loops])[num_loops]
        return {"accuracy": float(said.exact.double().mean()), "loss": losses.mean().item()}
