"""`looped eval` on questions: right answers and right tokens over loops x grade, on the splits validation and test.

    grades.jsonl      a record per split, loop count, grade and kind:
        exact         share of answers that are right as a whole, with Wilson's interval over rows
        tokens        share of right tokens, each read after the right ones before it. Its interval is Wilson's with a
                      trial per row, as if the tokens of an answer were right or wrong together: rather too wide
        score         mean worth of the written answers, where a verifier judges them (`sequences.Verifier`)
    evaluation.json   chance, the share of test rows with the commonest training answer; how answers were read

The model is the published one, RUN/model. How an answer is read, `measures.py` says.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from data_builders import EncodedRows, Verifier
from data_builders.sequence_rows import Reader
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.intervals import wilson_interval
from looplab.runs.models import count_parameters, load_run_model, loops_to_try

from .ask import written_answers
from .data import SequenceData
from .measures import Said, decodes, said_at
from .records import EVALUATION, GRADES
from .rows import Line, encoded, groups_of, load_questions


def loops_of(run: Run, model: PreTrainedModel) -> list[int]:
    """Loop counts that are measured unless given: 1, 2, 4 .. to twice those of the training, the model's own, and the
    recipe's `eval_loops`; to twice the model's own where there is no recipe."""
    own = model.config.num_loops
    most = 2 * (own if run.bare else run.trained_loops()[1])
    doubled = [2**power for power in range(most.bit_length()) if 2**power <= most]
    counts = {*doubled, most, own, *([] if run.bare else run.recipe()["eval_loops"])}
    return sorted(loops_to_try(model, sorted(counts)))


def record(said: Said, scores: torch.Tensor | None) -> dict:
    """The measures of rows at one loop count, see the module docstring."""
    n = len(said.right)
    exact, tokens = float(said.exact.double().mean()), float(said.right.sum() / said.labels.sum())
    found = {
        "exact": exact,
        "exact_interval": list(wilson_interval(exact, n)),
        "tokens": tokens,
        "tokens_interval": list(wilson_interval(tokens, n)),
        "loss": float(said.loss.sum() / said.labels.sum()),
        "n": n,
    }
    if scores is not None:
        score = float(scores.mean())
        found |= {"score": score, "score_interval": list(wilson_interval(score, n))}
    return found


def lines_at(
    model: PreTrainedModel, rows: EncodedRows, groups: Mapping[Line, np.ndarray], loops: Sequence[int], what: str
) -> dict[Line, dict[int, Said]]:
    """Line -> loop count -> what the model says to its rows."""
    total = sum(map(len, groups.values()))
    with tqdm(total=total, desc=what, unit="row", mininterval=1) as bar:
        return {line: said_at(model, rows, numbers, loops, bar=bar) for line, numbers in groups.items()}


def chance_of(splits: Mapping) -> float:
    """The share of test rows whose answer is the commonest of the training, or of themselves where there is none."""
    commonest = Counter(splits["train" if "train" in splits else "test"]["answer"][:]).most_common(1)[0][0]
    answers = splits["test"]["answer"][:]
    return sum(answer == commonest for answer in answers) / len(answers)


def evaluate_run(run: Run, loops: Sequence[int] | None = None, limit: int | None = None) -> Path:
    """Write RUN/grades.jsonl and RUN/evaluation.json; returns the first.

    Args:
        run: a finished one, or a model without a recipe and what the user names in its `data`.
        loops: loop counts, `loops_of` unless given.
        limit: most rows of a grade and kind, the same ones every time; all unless given.

    Raises:
        ValueError: the run has not finished, its data have changed, or the model may not run so many loops.
    """
    trained = set() if run.bare else set(run.summary()["trained_grades"])
    data = SequenceData.of(run)
    model, tokenizer = load_run_model(run, *(loops or ()))
    loops = sorted(set(loops or loops_of(run, model)))
    splits, longest = load_questions(run), model.config.max_position_embeddings
    held_out = [split for split in ("validation", "test") if split in splits]
    rows = encoded(data, splits, tokenizer, held_out, longest, "max_position_embeddings of the model")
    reader, verifier, records = data.reader(tokenizer), data.verifier(), []
    for split in rows:
        numbers = groups_of(rows[split], limit)
        found = lines_at(model, rows[split], numbers, loops, split)
        for count in loops:
            for (grade, kind), at in found.items():
                scores = None
                if not verifier.exact:
                    scores = scored(model, reader, splits[split], numbers[grade, kind], at[count], count, verifier)
                cell = {"split": split, "loops": count, "grade": grade, "kind": kind}
                records.append(cell | record(at[count], scores) | {"trained": grade in trained})
    facts = {
        "chance": chance_of(splits),
        "limit": limit,
        "by": "decoding" if decodes(model) else "one pass",
        "num_loops": model.config.num_loops,
        "parameters": count_parameters(model),
    }
    return run.write({EVALUATION.name: json.dumps(facts, indent=1) + "\n", GRADES.name: to_json_lines(records)})


def scored(
    model: PreTrainedModel,
    reader: Reader,
    split: Dataset,
    numbers: Sequence[int],
    said: Said,
    num_loops: int,
    verifier: Verifier,
) -> torch.Tensor:
    """Worth (N,) of the answers that the model writes to the rows `numbers`. Where `said` is exact, that is the row's
    own answer; the others are written."""
    rows, exact = [split[number] for number in numbers.tolist()], said.exact.tolist()
    others = [reader.question(row["prompt"]) for row, right in zip(rows, exact, strict=True) if not right]
    texts = iter(written_answers(model, reader, others, num_loops))
    scores = [
        verifier.score(row, row["answer"] if right else next(texts)) for row, right in zip(rows, exact, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64).clamp(0, 1)
