"""Accuracy of a trained run over (loops x hops), and single questions.

    for every (hops, split_kind) group of rows:
        trace(model, rows, answers, loops)        one forward: the answer after every loop, see instruments/traces.py
    grid.jsonl   loops x hops                     the `evaluate` module in hop_accuracy/: full-vocabulary argmax
    loops.jsonl  every loop x held-out hops       accuracy, mean margin, first correct loop; validation and test

Protocol of Loop, Think & Generalize (arXiv 2604.07822): accuracy per hop count while the loops at inference
are swept. What is evaluated is what ships: the weights in `RUN/model`, loaded by `runs/models.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_builders import encode_groups, load_task
from looplab.instruments.traces import Trace, joined, trace
from looplab.runs.folder import Run, open_run, to_json_lines
from looplab.runs.intervals import wilson_interval
from looplab.runs.models import load_run_model

from .readers import HopReader, reader_of
from .results import THRESHOLDS, hops_solved

LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
MAX_LOOPS = 50  # how far overthinking is followed
TRAIN_ROWS = 1000  # rows of each (hops, split_kind) group of the train split: a check of memory, not a result


@dataclass(frozen=True)
class Group:
    """Rows of one hop count and split kind: `input_ids` (N, T) ending in the readout token, `answers` (N,)."""

    hops: int
    split_kind: str
    input_ids: torch.Tensor
    answers: torch.Tensor


def groups_of(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Group]:
    """`rows` split by (split_kind, hops), at most `limit` of each (the same ones every time).

    Raises:
        ValueError: two questions of one group have different lengths, or one has a word that the tokenizer lacks.
    """
    hops, kinds = np.array(rows["hops"][:]), np.array(rows["split_kind"][:])
    groups = []
    for kind, count in sorted(set(zip(kinds.tolist(), hops.tolist(), strict=True))):
        members = np.flatnonzero((kinds == kind) & (hops == count))
        if limit is not None and limit < len(members):
            members = np.sort(np.random.default_rng(0).choice(members, limit, replace=False))
        chosen = rows.select(members)
        if len({len(text.split()) for text in chosen["text"]}) > 1:
            raise ValueError(f"questions of {count} hops ({kind}) differ in length; a group must have one length.")
        groups.append(Group(count, kind, *encode_groups(chosen, tokenizer)[count, kind]))
    return groups


def trace_groups(
    model: PreTrainedModel, groups: Sequence[Group], num_loops: Sequence[int], batch_size: int = 512
) -> list[Trace]:
    """The trace of every group, over its own number of loops."""
    total = sum(loops * len(group.answers) for loops, group in zip(num_loops, groups, strict=True))
    traces = []
    with tqdm(total=total, desc="evaluating", unit="loop", unit_scale=True, mininterval=1) as bar:
        for loops, group in zip(num_loops, groups, strict=True):
            parts = []
            batches = zip(group.input_ids.split(batch_size), group.answers.split(batch_size), strict=True)
            for input_ids, answers in batches:
                parts.append(trace(model, input_ids, answers, loops))
                bar.update(loops * len(answers))
            traces.append(joined(parts))
    return traces


def accuracy_grid(
    groups: Sequence[Group], predictions: Sequence[torch.Tensor], loops: Sequence[int], trained_hops: Sequence[int]
) -> list[dict]:
    """A row per loop count and group: loops, hops, split_kind, accuracy (a fraction), n, trained (this hop count).

    Args:
        predictions: of each group, (R, N) ids after each of R >= max(loops) loops.
    """
    metric = evaluate.load(str(Path(__file__).parent / "hop_accuracy"), keep_in_memory=True)
    columns = {
        "references": torch.cat([group.answers for group in groups]).numpy(),
        "hops": [group.hops for group in groups for _ in group.answers],
        "split_kind": [group.split_kind for group in groups for _ in group.answers],
    }
    rows = []
    for num_loops in loops:
        said = torch.cat([prediction[num_loops - 1] for prediction in predictions])
        result = metric.compute(predictions=said.numpy(), **columns)
        rows += [{"loops": num_loops, **cell, "trained": cell["hops"] in trained_hops} for cell in result["groups"]]
    return rows


def loop_rows(split: str, group: Group, traced: Trace) -> list[dict]:
    """A row per loop: split, split_kind, hops, loops, accuracy, margin (mean), first_correct (share of the rows that
    are right after this loop and after none before it), n."""
    correct = traced.prediction == group.answers  # (R, N)
    first = correct & (correct.cumsum(0) == 1)
    columns = zip(correct.double().mean(1), traced.margin.double().mean(1), first.double().mean(1), strict=True)
    cell = {"split": split, "split_kind": group.split_kind, "hops": group.hops}
    return [
        {**cell, "loops": loop, "accuracy": float(accuracy), "margin": float(margin), "first_correct": float(share)}
        | {"n": len(group.answers)}
        for loop, (accuracy, margin, share) in enumerate(columns, start=1)
    ]


def load_run_task(run: Run, max_hops: int | None = None) -> datasets.DatasetDict:
    """The data of a run, from its recipe; already in the datasets cache where the run was trained.

    Args:
        max_hops: test up to this hop count instead of the recipe's; the rows of the other hop counts stay the same.

    Raises:
        ValueError: the task has no hops, max_hops is given and it is not k-hop, or it is below the trained hops; the
            data are not those the run was trained on.
    """
    data = run.recipe()["data"]
    if not isinstance(reader_of([run]), HopReader):
        raise ValueError(f"{run.folder} is a run on {data['task']}, which has no hops: `looped eval` measures it.")
    overrides = {"seed": data["seed"]} | data["overrides"]
    if max_hops is not None:
        if data["task"] != "khop":
            raise ValueError(f"--max-hops {max_hops} is for the task khop; the chains of {data['task']} have 2 hops.")
        overrides["max_hops"] = max_hops
    task = load_task(data["task"], data["config"], **overrides)
    run.check_data(task, only=None if max_hops is None else "train")
    return task


def evaluate_run(
    folder: str | Path,
    loops: Sequence[int] | None = None,
    limit: int | None = None,
    max_loops: int = MAX_LOOPS,
    max_hops: int | None = None,
) -> Path:
    """Write RUN/grid.jsonl (`accuracy_grid`), RUN/loops.jsonl (`loop_rows`) and RUN/evaluation.json (chance, limit).

    Args:
        folder: a finished run.
        loops: loop counts of the grid, `LOOPS` unless given.
        limit: at most so many rows per (hops, split_kind); all held-out rows unless given.
        max_loops: held-out rows are followed so far.
        max_hops: deepest held-out chains, the recipe's unless given (k-hop only).

    Raises:
        ValueError: no such run, it has not finished, or it has no deeper chains.
    """
    run = open_run(folder)
    trained_hops = run.summary()["trained_hops"]
    loops = sorted(set(loops or LOOPS))
    model, tokenizer = load_run_model(run, *loops, max_loops)
    task = load_run_task(run, max_hops)
    depth = {"train": loops[-1], "test": max(max_loops, loops[-1]), "validation": max_loops}
    limits = {"train": min(limit or TRAIN_ROWS, TRAIN_ROWS), "test": limit, "validation": limit}
    plan = [(split, group) for split in depth for group in groups_of(task[split], tokenizer, limits[split])]
    groups = [group for _, group in plan]
    traces = trace_groups(model, groups, [depth[split] for split, _ in plan])
    gridded = [i for i, (split, _) in enumerate(plan) if split != "validation"]
    grid = accuracy_grid([groups[i] for i in gridded], [traces[i].prediction for i in gridded], loops, trained_hops)
    every_loop = [
        row
        for (split, group), traced in zip(plan, traces, strict=True)
        for row in loop_rows(split, group, traced)[:max_loops]
        if split != "train"
    ]
    facts = {"chance": 1 / len(set(task["train"]["answer"][:])), "limit": limit}
    rows = {"loops.jsonl": to_json_lines(every_loop), "grid.jsonl": to_json_lines(grid)}
    return run.write({"evaluation.json": json.dumps(facts, indent=1) + "\n"} | rows)


def grid_table(rows: Sequence[dict], chance: float, trained_loops: tuple[int, int]) -> str:
    """The grid as text: a line per (split kind, hops), a column per loop count, accuracies in %.

    The last column is the Wilson interval at the loop count that is best on average over the held-out lines.
    """
    loops = sorted({row["loops"] for row in rows})
    cells = {(row["split_kind"], row["hops"], row["loops"]): row for row in rows}
    lines = sorted({key[:2] for key in cells}, key=line_order)
    held_out = [line for line in lines if line[0] not in ("atomic", "train")] or lines
    best = max(loops, key=lambda count: sum(cells[(*line, count)]["accuracy"] for line in held_out))
    low, high = trained_loops
    header = "".join(f"{f'[{count}]' if low <= count <= high else count:>6}" for count in loops)
    text = [
        f"Accuracy in % (chance {100 * chance:.1f}); a column is a loop count; [ ] and * mark those of the training.",
        f"{'split':<11}{'hops':>5} {'n':>6} |{header} | 95 % interval at {best} loops",
    ]
    for line in lines:
        row = cells[(*line, best)]
        values = "".join(f"{100 * cells[(*line, count)]['accuracy']:6.1f}" for count in loops)
        interval = " - ".join(f"{100 * bound:.1f}" for bound in wilson_interval(row["accuracy"], row["n"]))
        text.append(f"{line[0]:<11}{line[1]:>4}{'*' if row['trained'] else ' '} {row['n']:>6} |{values} | {interval}")
    for threshold in THRESHOLDS:
        values = "".join(f"{hops_solved(rows, count, threshold):>6}" for count in loops)
        text.append(f"{f'hops at >= {100 * threshold:.0f} %':<23} |{values} |")
    return "\n".join(text)


def line_order(line: tuple[str, int]) -> tuple[int, str, int]:
    """What was trained on first, then held-out rows, easy before hard."""
    kinds = ["atomic", "train", "id", "ood_first", "ood_second", "ood", "pair"]
    return kinds.index(line[0]) if line[0] in kinds else len(kinds), line[0], line[1]


def print_grid(run: Run) -> None:
    """Print the grid of an evaluated run."""
    print(f"\n{run.folder}")
    print(grid_table(run.grid(), run.evaluation()["chance"], run.trained_loops()))


def true_path(train_rows: datasets.Dataset, question: str) -> list[str] | None:
    """Entities along the chain of `question`, by following the atomic facts; None where a fact does not exist."""
    facts = {
        text: answer
        for text, answer, kind in zip(*(train_rows[name][:] for name in ("text", "answer", "split_kind")), strict=True)
        if kind == "atomic"
    }
    entity, *relations = question.split()
    path = [entity]
    for relation in relations:
        if f"{path[-1]} {relation}" not in facts:
            return None
        path.append(facts[f"{path[-1]} {relation}"])
    return path


def first_question_beyond(test_rows: datasets.Dataset, trained_hops: Sequence[int]) -> str:
    """The first test question one hop count beyond the training, or of the deepest hop count if none is beyond."""
    hops = test_rows["hops"][:]
    deepest = min(set(hops) - set(trained_hops), default=max(hops))
    return test_rows[hops.index(deepest)]["text"]


def ask(folder: str | Path, question: str | None = None, loops: Sequence[int] = (1, 2, 4, 8, 16)) -> None:
    """Print the generated answer to `question` ("e3 r1 r2") at several loop counts, and the true chain.

    Without a question, one is taken from the test split, one hop count beyond the training.

    Raises:
        ValueError: no such run, an empty question, or a word the tokenizer does not know.
    """
    run = open_run(folder)
    if question is not None and not question.strip():
        raise ValueError('the question is empty: give an entity and relations, such as "e3 r1 r2", or leave it out.')
    task = load_run_task(run)
    model, tokenizer = load_run_model(run, *loops)
    question = first_question_beyond(task["test"], run.summary()["trained_hops"]) if question is None else question
    words, known = question.split(), tokenizer.get_vocab()
    unknown = [word for word in words if word not in known]
    if unknown:
        examples = ", ".join(task["test"]["text"][:3])
        raise ValueError(f"unknown words {unknown} in the question {question!r}; questions look like: {examples}.")
    path = true_path(task["train"], question)
    print(f"question  {question}")
    if path is None:
        print("chain     not in the graph: the question is an entity followed by relations it has")
    else:
        steps = "".join(f" -{relation}-> {entity}" for relation, entity in zip(words[1:], path[1:], strict=True))
        print(f"chain     {path[0]}{steps}   ({len(path) - 1} hops)")
    print("loops     answer   probability")
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    for num_loops in loops:
        answer, probability = generate_answer(model, inputs, num_loops)
        word = tokenizer.decode(answer)
        place = "" if path is None or word not in path else "correct" if word == path[-1] else on_the_way(path, word)
        print(f"{num_loops:>5}     {word:<8} {100 * probability:10.1f} %   {place}".rstrip())


def on_the_way(path: list[str], word: str) -> str:
    return f"(the chain after {path.index(word)} of {len(path) - 1} hops)"


@torch.inference_mode()
def generate_answer(model: PreTrainedModel, inputs: dict, num_loops: int) -> tuple[int, float]:
    """The one generated token and its probability."""
    output = model.generate(
        **inputs,
        num_loops=num_loops,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    token = int(output.sequences[0, -1])
    return token, float(output.logits[0][0].softmax(-1)[token])
