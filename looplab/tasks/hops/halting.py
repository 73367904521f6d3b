"""`looped halting` on hops: what halting saves. Writes RUN/halting.jsonl.

    sweep      every rule x thresholds x budget, simulated from one trace of the validation rows
    chosen     for each rule, the setting with the fewest loops that loses at most a point of accuracy at each solvable
               hop count, compared with the best fixed loop count of that hop count
    best       of the chosen settings, the one with the fewest loops that loses so little; `--save` writes its rule
    measured   the chosen setting on the test rows, by running it: rows that halt cost no more work
    timed      the chosen setting and the fixed loop count in turn, on one batch of mixed hop counts

There are three baselines. `own` has for each hop count the smallest fixed loop count within a point of its best, and
so is an oracle that knows the hops. `fixed` is the one loop count that is best on average. `length` is as many loops
as the input has tokens, and reads no state: where the length tells the hops, a rule has to beat it. A hop count is
solvable if some loop count reaches 60 % on its validation rows; other hop counts are measured, but no setting is
chosen by them.
"""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from looplab.instruments.halting_settings import HaltingSetting, rules_to_try
from looplab.instruments.timing import counted_calls, interleaved, ratio_of
from looplab.instruments.traces import Trace
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import load_run_model
from modeling_looped import LoopedConfig
from modeling_looped.halting_looped import FixedRule, entropy_bound, halting_rule

from .evaluation import MAX_LOOPS, trace_groups
from .records import HALTING
from .results import ROUNDING, best_loops, fewest_near_best
from .rows import RowGroup, answered, groups_of, load_run_task

POINT = 0.01  # accuracy that a setting may lose at any hop count
SOLVABLE = 0.6  # accuracy
TIMED_ROWS = 64  # rows of each hop count in the timed batch


def sweep(config: LoopedConfig, budgets: Sequence[int]) -> list[HaltingSetting]:
    """Every setting that is tried."""
    return [HaltingSetting(rule, budget) for rule, budget in product(rules_to_try(config, "traced"), budgets)]


def loops_used(setting: HaltingSetting, traced: Trace) -> torch.Tensor:
    """Loops (N,) that each row of a trace would run under `setting`."""
    rule = halting_rule(setting.halting) or FixedRule()
    stops = rule.stops(traced)[: setting.num_loops]
    stops[-1] = True  # after the budget
    return stops.int().argmax(0) + 1


def outcome(setting: HaltingSetting, group: RowGroup, traced: Trace) -> tuple[float, float]:
    """(accuracy, mean loops) of a group of rows under `setting`, simulated from its trace."""
    used = loops_used(setting, traced)
    said = traced.prediction.gather(0, used[None] - 1)[0]
    return float((said == group.answers).double().mean()), float(used.double().mean())


def run_setting(model: PreTrainedModel, setting: HaltingSetting, group: RowGroup) -> tuple[float, float]:
    """(accuracy, mean loops) of a group of rows under `setting`, measured by running it."""
    arguments = {"num_loops": setting.num_loops, "halting": setting.halting}
    right, used = answered(model, group.input_ids, group.answers, **arguments)
    return float(right.double().mean()), float(used.double().mean())


def call(model: PreTrainedModel, inputs: dict, setting: HaltingSetting):
    return model(**inputs, num_loops=setting.num_loops, halting=setting.halting, logits_to_keep=1, use_cache=False)


def mean_outcome(setting: HaltingSetting, groups: Sequence[RowGroup], traces: Sequence[Trace]) -> tuple[float, float]:
    """(accuracy, loops) under `setting`, simulated: means over the groups, each group with the same weight."""
    outcomes = [outcome(setting, group, traced) for group, traced in zip(groups, traces, strict=True)]
    return tuple(sum(column) / len(outcomes) for column in zip(*outcomes, strict=True))


def choose(
    settings: Sequence[HaltingSetting], groups: Sequence[RowGroup], traces: Sequence[Trace], best: Sequence[float]
):
    """The setting with the fewest loops among those that lose at most a point in every group.

    If every setting loses more, the one whose largest loss is smallest. best: accuracy of each group to compare with.
    """

    return min(settings, key=lambda setting: cost(setting, groups, traces, best))


def cost(
    setting: HaltingSetting, groups: Sequence[RowGroup], traces: Sequence[Trace], best: Sequence[float]
) -> tuple[float, float]:
    """(the largest loss of accuracy in a group, 0 if it is at most a point; mean loops), as for `choose`."""
    outcomes = [outcome(setting, group, traced) for group, traced in zip(groups, traces, strict=True)]
    loss = max(0.0, *(b - accuracy for b, (accuracy, _) in zip(best, outcomes, strict=True)))
    loops = sum(loops for _, loops in outcomes) / len(outcomes)
    return (0.0 if loss <= POINT + ROUNDING else loss, loops)


def frontier(
    settings: Sequence[HaltingSetting], groups: Sequence[RowGroup], traces: Sequence[Trace]
) -> list[HaltingSetting]:
    """The settings that no other setting beats in accuracy with as few loops, sorted by loops."""
    points = sorted(
        ((*mean_outcome(setting, groups, traces), setting) for setting in settings), key=lambda p: (p[1], -p[0])
    )
    kept, best = [], -1.0
    for accuracy, _, setting in points:
        if accuracy > best:
            kept.append(setting)
            best = accuracy
    return kept


def time_row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows,
    setting: HaltingSetting,
    fixed: HaltingSetting,
    rounds: int,
) -> dict:
    """Time `setting` against `fixed` on one padded batch of `rows`: the ratio is seconds of `fixed` over seconds of
    `setting`. rounds: interleaved pairs."""
    inputs = tokenizer(rows["text"][:], padding=True, return_tensors="pt").to(model.device)
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(rows["answer"][:]))

    def once(which: HaltingSetting):
        with torch.inference_mode():
            return call(model, inputs, which)

    halted, full = once(setting), once(fixed)
    pairs = interleaved(lambda: once(setting), lambda: once(fixed), rounds)
    return {
        "measure": "time",
        **setting.row(),
        "against": fixed.num_loops,
        **ratio_of(pairs),
        "rows": len(rows),
        "loops": float(halted.loops_used[:, -1].double().mean()),
        "accuracy": float((halted.logits[:, -1].argmax(-1).cpu() == answers).double().mean()),
        "fixed_accuracy": float((full.logits[:, -1].argmax(-1).cpu() == answers).double().mean()),
    }


def halting_run(
    run: Run,
    max_loops: int | None = None,
    max_hops: int | None = None,
    limit: int | None = None,
    rounds: int = 7,
) -> Path:
    """Write RUN/halting.jsonl. The `measure` of a record is one of

    fixed      accuracy on the solvable test rows at every fixed loop count
    frontier   accuracy and mean loops there, of the settings in the `frontier` of the validation rows
    chosen     for each rule and hop count: accuracy and loops of the chosen setting, measured, simulated, and of
               `own` and `fixed`
    length     for each hop count: accuracy and loops of as many loops as the input has tokens, at most max_loops
    time       for each rule, see `time_row`
    best       the chosen setting with the fewest loops, of those that lose at most a point of accuracy at each
               solvable hop count of the validation rows; no record where every rule loses more. `loops` is its
               mean there

    Args:
        run: a finished one.
        max_loops: the largest budget, `MAX_LOOPS` unless given.
        max_hops: deepest hop count, the recipe's unless given (task khop only).
        limit: most rows of a group (hops, split_kind); all unless given.
        rounds: interleaved pairs of `time_row`.

    Raises:
        ValueError: the run has not finished, or it solves no hop count.
    """
    max_loops = MAX_LOOPS if max_loops is None else max_loops
    model, tokenizer = load_run_model(run, max_loops)
    task = load_run_task(run, max_hops=max_hops)
    groups = {split: groups_of(task[split], tokenizer, limit) for split in ("validation", "test")}
    # Settings are chosen on validation rows: test groups without validation rows are left out.
    known = {(group.split_kind, group.hops) for group in groups["validation"]}
    groups["test"] = [group for group in groups["test"] if (group.split_kind, group.hops) in known]
    traces = {split: trace_groups(model, groups[split], [max_loops] * len(groups[split])) for split in groups}
    by_loops = {  # accuracies of the validation rows after each loop
        (group.split_kind, group.hops): (traced.prediction == group.answers).double().mean(1).tolist()
        for group, traced in zip(groups["validation"], traces["validation"], strict=True)
    }
    solvable = [index for index, line in enumerate(by_loops) if max(by_loops[line]) >= SOLVABLE]
    if not solvable:
        raise ValueError(f"{run} reaches {100 * SOLVABLE:.0f} % at no hop count: there is nothing to save.")
    lines = [list(by_loops)[index] for index in solvable]
    best = [max(by_loops[line]) for line in lines]
    own = {line: fewest_near_best(accuracies, POINT) for line, accuracies in by_loops.items()}
    fixed = HaltingSetting(None, best_loops({line: by_loops[line] for line in lines}))
    needed = max(own[line] for line in lines)

    few = {split: [groups[split][index] for index in solvable] for split in groups}
    few_traces = {split: [traces[split][index] for index in solvable] for split in groups}
    budgets = sorted({fixed.num_loops, min(2 * fixed.num_loops, max_loops), max_loops} - {1})
    settings = sweep(model.config, budgets)
    rows = []
    for loops in range(1, max_loops + 1):
        accuracy, used = mean_outcome(HaltingSetting(None, loops), few["test"], few_traces["test"])
        rows.append({"measure": "fixed", **HaltingSetting(None, loops).row(), "accuracy": accuracy, "loops": used})
    timed, costs = task["test"].select(timed_rows(task["test"], lines)), []
    for rule in dict.fromkeys(setting.rule for setting in settings):
        mine = [setting for setting in settings if setting.rule == rule]
        for setting in frontier(mine, few["validation"], few_traces["validation"]):
            accuracy, used = mean_outcome(setting, few["test"], few_traces["test"])
            rows.append({"measure": "frontier", **setting.row(), "accuracy": accuracy, "loops": used})
        setting = choose(mine, few["validation"], few_traces["validation"], best)
        costs.append((cost(setting, few["validation"], few_traces["validation"], best), setting))
        for index, (group, traced) in enumerate(zip(groups["test"], traces["test"], strict=True)):
            line = group.split_kind, group.hops
            accuracy, used = run_setting(model, setting, group)
            simulated = outcome(setting, group, traced)
            row = {"measure": "chosen", **setting.row(), "split_kind": line[0], "hops": line[1]}
            row |= {"solvable": index in solvable, "n": len(group.answers), "accuracy": accuracy, "loops": used}
            row |= {"simulated_accuracy": simulated[0], "simulated_loops": simulated[1]}
            row |= {"own_loops": own[line], "own_accuracy": outcome(HaltingSetting(None, own[line]), group, traced)[0]}
            row |= {"fixed_loops": fixed.num_loops, "fixed_accuracy": outcome(fixed, group, traced)[0]}
            rows.append(row | {"needed_loops": needed})
        rows.append(time_row(model, tokenizer, timed, setting, fixed, rounds))
    for index, (group, traced) in enumerate(zip(groups["test"], traces["test"], strict=True)):
        length = HaltingSetting(None, min(group.input_ids.shape[1], max_loops))
        accuracy, used = outcome(length, group, traced)
        row = {"measure": "length", "rule": "length", "split_kind": group.split_kind, "hops": group.hops}
        rows.append(
            row | {"solvable": index in solvable, "n": len(group.answers), "accuracy": accuracy, "loops": used}
        )
    (loss, used), setting = min(costs, key=lambda pair: pair[0])
    if loss == 0:
        rows.append({"measure": "best", **setting.row(), "loops": used})
    return run.write({HALTING.name: to_json_lines(rows)})


def timed_rows(test, lines: Sequence[tuple[str, int]]) -> list[int]:
    """Row numbers of the first TIMED_ROWS test rows of each line (split kind, hops)."""
    places = {line: [] for line in lines}
    for index, line in enumerate(zip(test["split_kind"][:], test["hops"][:], strict=True)):
        if line in places and len(places[line]) < TIMED_ROWS:
            places[line].append(index)
    return [index for line in lines for index in places[line]]


def halting_rows(run: Run, number: int, rounds: int) -> list[dict]:
    """KL + entropy halting against fixed loops on one batch of the run's test rows, `number` of each hop count.

    At the largest trained loop count and at twice that; the entropy bound is the paper's 3.00 nats of ln 217, scaled
    to the vocabulary. `layer_calls` counts rows through core layers, by forward hooks.
    """
    model, tokenizer = load_run_model(run)
    model.eval()
    test = load_run_task(run)["test"]
    hops = np.array(test["hops"][:])
    rows = test.select(np.concatenate([np.flatnonzero(hops == count)[:number] for count in np.unique(hops)]))
    inputs = tokenizer(rows["text"][:], padding=True, return_tensors="pt").to(model.device)
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(rows["answer"][:]), device=model.device)
    max_entropy = entropy_bound(model.config.vocab_size)

    def call(loops: int, halting: dict | None) -> Callable:
        @torch.inference_mode()
        def forward():
            return model(**inputs, num_loops=loops, halting=halting, logits_to_keep=1, use_cache=False)

        return forward

    def once(forward: Callable) -> dict:
        with counted_calls(model) as calls:
            output = forward()
        accuracy = (output.logits[:, -1].argmax(-1) == answers).float().mean().item()
        loops_used = output.loops_used[:, -1].float().mean().item()
        return {"accuracy": accuracy, "layer_calls": sum(calls), "loops_used": loops_used}

    results = []
    largest = run.trained_loops()[1]
    for loops in (largest, 2 * largest):
        for kl_threshold in (0.1, 0.01, 0.001):
            rule = {"rule": "kl_entropy", "kl_threshold": kl_threshold, "max_entropy": max_entropy}
            halted, fixed = call(loops, rule), call(loops, None)
            ours, theirs = once(halted), once(fixed)
            pairs = interleaved(halted, fixed, rounds)
            row = {"measure": "halting", "mode": f"kl < {kl_threshold}", "run": run.name, "loops": loops} | rule
            row |= ours | {"fixed_accuracy": theirs["accuracy"], "fixed_layer_calls": theirs["layer_calls"]}
            row |= {"layer_calls_saved": 1 - ours["layer_calls"] / theirs["layer_calls"], "rows": len(rows)}
            row |= ratio_of(pairs)
            results.append(row)
    return results
