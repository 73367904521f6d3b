"""`looped eval` on hops: accuracy of a trained run over loops x hops.

    for every group of rows (hops, split_kind):
        trace(model, rows, answers, loops)        the answer after every loop, see instruments/traces.py
    grid.jsonl   loops x hops                     accuracy, by the `evaluate` module in hop_accuracy/
    loops.jsonl  every loop x held-out hops       accuracy, mean margin, first correct loop; validation and test

Protocol: Loop, Think & Generalize (arXiv 2604.07822), accuracy per hop count at many loop counts. The model is the
published one, RUN/model.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import evaluate
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.halting_settings import HaltingSetting, saved_setting, saved_text
from looplab.instruments.traces import Trace, joined, trace
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.intervals import wilson_interval
from looplab.runs.models import load_run_model

from .records import EVALUATION, GRID, LOOPS
from .results import THRESHOLDS, hops_solved
from .rows import RowGroup, answered, groups_of, line_order, load_run_task

GRID_LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
MAX_LOOPS = 50  # last loop at which held-out rows are measured, to see overthinking
TRAIN_ROWS = 1000  # most training rows of a group: they only show what was memorised


def trace_groups(
    model: PreTrainedModel, groups: Sequence[RowGroup], num_loops: Sequence[int], batch_size: int = 512
) -> list[Trace]:
    """The trace of every group.

    Args:
        num_loops: loop count of each group.
        batch_size: rows of a forward pass.
    """
    traces = []
    total = sum(len(group.answers) for group in groups)
    with tqdm(total=total, desc="evaluating", unit="question", mininterval=1) as bar:
        for loops, group in zip(num_loops, groups, strict=True):
            parts = []
            batches = zip(group.input_ids.split(batch_size), group.answers.split(batch_size), strict=True)
            for input_ids, answers in batches:
                parts.append(trace(model, input_ids, answers, loops))
                bar.update(len(answers))
            traces.append(joined(parts))
    return traces


def accuracy_grid(
    groups: Sequence[RowGroup], predictions: Sequence[torch.Tensor], loops: Sequence[int], trained_hops: Sequence[int]
) -> list[dict]:
    """A record per loop count and group: loops, hops, split_kind, accuracy in [0, 1], n, trained (the hop count was).

    Args:
        predictions: for each group, the predicted ids (R, N) after each of R >= max(loops) loops.
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


def loop_rows(split: str, group: RowGroup, traced: Trace) -> list[dict]:
    """A record per loop of a group: split, split_kind, hops, loops, accuracy, margin, first_correct, n.

    margin: mean logit margin of the gold token. first_correct: share of rows that are right for the first time.
    """
    correct = traced.prediction == group.answers  # (R, N)
    first = correct & (correct.cumsum(0) == 1)
    columns = zip(correct.double().mean(1), traced.margin.double().mean(1), first.double().mean(1), strict=True)
    cell = {"split": split, "split_kind": group.split_kind, "hops": group.hops}
    return [
        {**cell, "loops": loop, "accuracy": float(accuracy), "margin": float(margin), "first_correct": float(share)}
        | {"n": len(group.answers)}
        for loop, (accuracy, margin, share) in enumerate(columns, start=1)
    ]


def halted_lines(model: PreTrainedModel, setting: HaltingSetting, groups: Sequence[RowGroup]) -> dict:
    """What a halting setting does to groups of rows, by running it: its own fields, and `lines`, for each group
    split_kind, hops, accuracy and mean loops."""
    lines = []
    for group in groups:
        arguments = {"num_loops": setting.num_loops, "halting": setting.halting}
        right, used = answered(model, group.input_ids, group.answers, **arguments)
        line = {"split_kind": group.split_kind, "hops": group.hops}
        lines.append(line | {"accuracy": float(right.double().mean()), "loops": float(used.double().mean())})
    return setting.row() | {"lines": lines}


def evaluate_run(
    run: Run,
    loops: Sequence[int] | None = None,
    limit: int | None = None,
    max_loops: int | None = None,
    max_hops: int | None = None,
    hops: Sequence[int] | None = None,
) -> Path:
    """Write RUN/grid.jsonl (`accuracy_grid`), RUN/loops.jsonl (`loop_rows`) and RUN/evaluation.json.

    The last has chance and limit, and for a halting rule that is saved with the model `halting`, see `halted_lines`.

    Args:
        run: a finished one.
        loops: loop counts of the grid, `GRID_LOOPS` unless given.
        limit: most rows of a group (hops, split_kind); all held-out rows unless given.
        max_loops: last loop of loops.jsonl, `MAX_LOOPS` unless given.
        max_hops: deepest hop count of held-out rows, the recipe's unless given (task khop only).
        hops: hop counts of held-out rows, in place of all up to the deepest (task khop only).

    Raises:
        ValueError: the run has not finished, both max_hops and hops are given, or `load_run_task` refuses them.
    """
    if hops is not None and max_hops is not None:
        raise ValueError(f"hops {hops} and max_hops {max_hops} both say which chains are measured: leave one out.")
    max_loops = MAX_LOOPS if max_loops is None else max_loops
    trained_hops = run.summary()["trained_hops"]
    loops = sorted(set(loops or GRID_LOOPS))
    model, tokenizer = load_run_model(run, *loops, max_loops)
    task = load_run_task(run, max_hops=max_hops, held_out_hops=None if hops is None else list(hops))
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
    if setting := saved_setting(model, loops[-1]):
        facts["halting"] = halted_lines(model, setting, [group for split, group in plan if split == "test"])
    rows = {LOOPS.name: to_json_lines(every_loop), GRID.name: to_json_lines(grid)}
    return run.write({EVALUATION.name: json.dumps(facts, indent=1) + "\n"} | rows)


def grid_table(
    rows: Sequence[dict], chance: float, trained_loops: tuple[int, int], halting: dict | None = None
) -> str:
    """The grid as text, in %: a line per (split kind, hops), a column per loop count.

    The next column is the Wilson interval at the loop count with the best mean over the held-out lines; then comes
    the saved rule.

    Args:
        halting: of `halted_lines`; None if no rule is saved.
    """
    loops = sorted({row["loops"] for row in rows})
    cells = {(row["split_kind"], row["hops"], row["loops"]): row for row in rows}
    lines = sorted({key[:2] for key in cells}, key=line_order)
    held_out = [line for line in lines if line[0] not in ("atomic", "train")] or lines
    best = max(loops, key=lambda count: sum(cells[(*line, count)]["accuracy"] for line in held_out))
    low, high = trained_loops
    halted = {(line["split_kind"], line["hops"]): line for line in halting["lines"]} if halting else {}
    column = " | saved rule in mean loops" if halting else ""
    header = "".join(f"{f'[{count}]' if low <= count <= high else count:>6}" for count in loops)
    text = [
        f"Accuracy in % (chance {100 * chance:.1f}); a column is a loop count; [ ] and * mark trained loops and hops.",
        f"{'split':<11}{'hops':>5} {'n':>6} |{header} | {f'95 % interval at {best} loops':<26}{column}".rstrip(),
    ]
    for line in lines:
        row = cells[(*line, best)]
        values = "".join(f"{100 * cells[(*line, count)]['accuracy']:6.1f}" for count in loops)
        interval = " - ".join(f"{100 * bound:.1f}" for bound in wilson_interval(row["accuracy"], row["n"]))
        said = f" |{100 * halted[line]['accuracy']:8.1f} in {halted[line]['loops']:.1f}" if line in halted else ""
        name = f"{line[0]:<11}{line[1]:>4}{'*' if row['trained'] else ' '}"
        text.append(f"{name} {row['n']:>6} |{values} | {interval:<26}{said}".rstrip())
    for threshold in THRESHOLDS:
        values = "".join(f"{hops_solved(rows, count, threshold):>6}" for count in loops)
        text.append(f"{f'hops at >= {100 * threshold:.0f} %':<23} |{values} |")
    if halting:
        lines = [halted[line] for line in held_out if line in halted]
        accuracy, used = (sum(line[name] for line in lines) / len(lines) for name in ("accuracy", "loops"))
        text.append(saved_text(halting, f"{100 * accuracy:.1f} % of the held-out questions in {used:.1f} loops"))
    return "\n".join(text)


def grid_text(run: Run) -> str:
    """The grid of an evaluated run."""
    facts = run.read(EVALUATION)
    return grid_table(run.read(GRID), facts["chance"], run.trained_loops(), facts.get("halting"))


class HopMeasure:
    """Accuracy over the test rows of trained hop counts, see `Task.measure`: accuracy, interval (Wilson), n."""

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, limit: int | None):
        trained = run.summary()["trained_hops"]
        groups = groups_of(load_run_task(run)["test"], tokenizer, limit)
        self.groups = [group for group in groups if group.hops in trained]

    def __call__(self, model: PreTrainedModel, num_loops: int) -> dict:
        right = torch.cat([answered(model, g.input_ids, g.answers, num_loops=num_loops)[0] for g in self.groups])
        accuracy = int(right.sum()) / len(right)
        return {"accuracy": accuracy, "interval": wilson_interval(accuracy, len(right)), "n": len(right)}
