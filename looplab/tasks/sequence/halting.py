"""`looped halting` on questions: what halting saves where answers are written. Writes RUN/halting.jsonl.

    sweep    every rule at every threshold, and every fixed loop count, on validation rows: right answers, and loops
             of a token, means over lines (grade, kind)
    chosen   for each rule, the setting with the fewest loops that loses at most a point of right answers in each
             solvable line of the validation rows; measured on the test rows, a record per line
    oracle   for each line, the fewest fixed loops within a point of its best on the validation rows: what a rule that
             knew the grade would run; on the test rows
    fixed    the fewest fixed loops that lose at most a point in each solvable line of the validation rows; on the test
             rows, a record per line
    time     the chosen setting and these fixed loops in turn, on rows of one length, one by one and in a batch
    best     of the chosen settings, the one with the fewest loops that loses so little; `--save` writes its rule

`loops` are a mean over the tokens of an answer, and `first_loops` those of its first: an end that follows one sure
token costs a rule little, and the oracle, which knows the grade alone, as much as any.

Every row is decoded as `generate(halting=...)` does, the right tokens put in place of those said: the answer is right
if and only if `generate` writes it. A line is solvable if all loops, or a fixed count, get 60 % of it right.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from data_builders import EncodedRows
from looplab.instruments.halting_settings import HaltingSetting, exit_settings, threshold_text
from looplab.instruments.timing import interleaved, ratio_of, ratio_text
from looplab.runs.folder import Run, to_json_lines
from looplab.runs.models import load_run_model

from .data import SequenceData
from .measures import TOKENS, decode_answers, same_first
from .records import HALTING
from .results import CRITERION, POINT, ROUNDING, SOLVABLE
from .rows import Line, encoded, groups_of, load_questions

LIMIT = 32  # rows of a line
TIMED_ROWS = 16

# Line -> (share of right answers, mean loops of a token, mean loops of the first token of an answer).
Outcome = dict[Line, tuple[float, float, float]]


@torch.no_grad()
def answer_rows(
    model: PreTrainedModel, rows: EncodedRows, numbers: Sequence[int], setting: HaltingSetting
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N,) bool, whether the answer is right under a setting; (N,), mean loops of the tokens of each row; and (N,),
    loops of the first of them."""
    place = {int(number): index for index, number in enumerate(numbers)}
    right = torch.zeros(len(place), dtype=torch.bool)
    loops, first_loops = torch.zeros(2, len(place), dtype=torch.float64)
    for batch in rows.by_length(list(place), TOKENS):
        for first, members in same_first(rows, batch):
            some = [batch[member] for member in members]
            inputs = {name: value.to(model.device) for name, value in rows.stacked(some).items()}
            ids, labels = inputs["input_ids"], inputs["shift_labels"][:, first:]
            at = torch.tensor([place[number] for number in some])
            if rows.in_place:
                call = {"num_loops": setting.num_loops, "halting": setting.halting, "use_cache": False}
                output = model(ids, **call)
                said, used = output.logits.argmax(-1), output.loops_used
            else:
                done = decode_answers(model, ids, labels, setting.num_loops, setting.halting)
                said, used = done.said, done.loops
            right[at] = (said == labels).all(1).cpu()
            loops[at] = used.double().mean(1).cpu()
            first_loops[at] = used[:, 0].double().cpu()
    return right, loops, first_loops


def outcome_of(
    model: PreTrainedModel, rows: EncodedRows, groups: Mapping[Line, np.ndarray], setting: HaltingSetting
) -> Outcome:
    """What a setting does to every line."""
    found = {}
    for line, numbers in groups.items():
        found[line] = tuple(float(each.double().mean()) for each in answer_rows(model, rows, numbers, setting))
    return found


def means(outcome: Outcome) -> dict[str, float]:
    """exact and loops, means over lines."""
    exact, loops, _ = (sum(column) / len(outcome) for column in zip(*outcome.values(), strict=True))
    return {"exact": exact, "loops": loops}


def cost(outcome: Outcome, best: Mapping[Line, float]) -> tuple[float, float]:
    """(the largest loss of right answers in a solvable line, 0 if it is at most a point; mean loops of these lines).
    best: solvable line -> share to compare with."""
    loss = max(0.0, *(share - outcome[line][0] for line, share in best.items()))
    loops = sum(outcome[line][1] for line in best) / len(best)
    return 0.0 if loss <= POINT + ROUNDING else loss, loops


def in_turn(groups: Sequence[np.ndarray]) -> list[int]:
    """Row numbers of several lines, one of each line in turn."""
    return [number for each in zip_longest(*groups) for number in each if number is not None]


def time_rows(
    model: PreTrainedModel,
    rows: EncodedRows,
    numbers: Sequence[int],
    setting: HaltingSetting,
    fixed: HaltingSetting,
    rounds: int,
) -> list[dict]:
    """Time `setting` against `fixed` on TIMED_ROWS rows, or fewer, of the commonest length among `numbers`: one by
    one, and in one batch. The ratio is seconds of `fixed` over seconds of `setting`."""
    timed = max(rows.by_length(numbers, TOKENS), key=len)[:TIMED_ROWS]

    def run(which: HaltingSetting, size: int) -> None:
        for start in range(0, len(timed), size):
            answer_rows(model, rows, timed[start : start + size], which)

    records = []
    for size in dict.fromkeys((1, len(timed))):
        pairs = interleaved(partial(run, setting, size), partial(run, fixed, size), rounds)
        row = {"measure": "time", **setting.row(), "against": fixed.num_loops, "batch": size, "rows": len(timed)}
        records.append(row | ratio_of(pairs))
    return records


def halting_run(run: Run, num_loops: int | None = None, limit: int | None = None, rounds: int = 5) -> Path:
    """Write RUN/halting.jsonl, see the module docstring.

    Args:
        run: a finished one.
        num_loops: the budget; the model's own loop count unless given.
        limit: most rows of a line, LIMIT unless given.
        rounds: interleaved pairs of `time_rows`.

    Raises:
        ValueError: the run has not finished, its data have changed, there is only one loop, or no line is solvable.
    """
    model, tokenizer = load_run_model(run, num_loops)
    model.eval()
    num_loops = model.config.num_loops if num_loops is None else num_loops
    settings = [*exit_settings(model.config, num_loops, "decoded"), HaltingSetting(None, num_loops)]
    rows = encoded(SequenceData.of(run), load_questions(run), tokenizer, ("validation", "test"))
    groups = {split: groups_of(rows[split], LIMIT if limit is None else limit) for split in rows}
    # Settings are chosen on validation rows: test lines without such rows are left out.
    groups["test"] = {line: numbers for line, numbers in groups["test"].items() if line in groups["validation"]}
    swept = {
        index: outcome_of(model, rows["validation"], groups["validation"], setting)
        for index, setting in enumerate(tqdm(settings, desc="halting", unit="setting"))
    }
    records = [{"measure": "sweep", **setting.row(), **means(swept[index])} for index, setting in enumerate(settings)]
    fixed = {setting.num_loops: swept[index] for index, setting in enumerate(settings) if setting.halting is None}
    best = {line: max(found[line][0] for found in fixed.values()) for line in groups["validation"]}
    solvable = {line: share for line, share in best.items() if share >= SOLVABLE and line in groups["test"]}
    if not solvable:
        raise ValueError(f"{run} gets {100 * SOLVABLE:.0f} % of no grade right: there is nothing to save.")
    tests: dict[int, Outcome] = {}

    def on_test(index: int) -> Outcome:
        if index not in tests:
            tests[index] = outcome_of(model, rows["test"], groups["test"], settings[index])
        return tests[index]

    at_fixed = {setting.num_loops: index for index, setting in enumerate(settings) if setting.halting is None}
    full = on_test(at_fixed[num_loops])
    own = {
        line: min(count for count, found in fixed.items() if found[line][0] >= share - POINT - ROUNDING)
        for line, share in best.items()
    }
    # Where no fixed count loses so little, the one whose largest loss is the smallest.
    common = min(fixed, key=lambda count: cost(fixed[count], solvable))
    for measure, of_line in (("oracle", own), ("fixed", dict.fromkeys(own, common))):
        for line in groups["test"]:
            loops, exact = of_line[line], on_test(at_fixed[of_line[line]])[line][0]
            records.append(
                {"measure": measure, "rule": measure, "num_loops": loops, "grade": line[0], "kind": line[1]}
                | {"solvable": line in solvable, "exact": exact, "loops": loops, "first_loops": loops}
                | {"n": len(groups["test"][line])}
            )
    timed, costs = in_turn([groups["test"][line] for line in solvable]), []
    for rule in dict.fromkeys(setting.rule for setting in settings if setting.halting is not None):
        mine = [index for index, setting in enumerate(settings) if setting.rule == rule]
        chosen = min(mine, key=lambda index: cost(swept[index], solvable))
        costs.append((cost(swept[chosen], solvable), chosen))
        for line, (exact, loops, first_loops) in on_test(chosen).items():
            records.append(
                {"measure": "chosen", **settings[chosen].row(), "grade": line[0], "kind": line[1]}
                | {"solvable": line in solvable, "n": len(groups["test"][line]), "exact": exact, "loops": loops}
                | {"first_loops": first_loops, "full_exact": full[line][0], "full_loops": num_loops}
            )
        records += time_rows(model, rows["test"], timed, settings[chosen], HaltingSetting(None, common), rounds)
    (loss, used), index = min(costs, key=lambda pair: pair[0])
    if loss == 0:
        records.append({"measure": "best", **settings[index].row(), "loops": used})
    return run.write({HALTING.name: to_json_lines(records)})


def halting_text(rows: Sequence[dict]) -> str:
    """The chosen settings as text. rows: records of halting.jsonl."""
    times: dict[str, list[dict]] = {}
    for row in (row for row in rows if row["measure"] == "time"):
        times.setdefault(row["rule"], []).append(row)
    text = [
        "Test rows of the solvable grades, every line alike; settings chosen on validation rows.",
        f"{'rule':<14}{'threshold':>10}{'right':>9}{'loops':>7}   time of the fixed loops over time of the rule",
    ]

    def line(name: str, threshold: str, chosen: Sequence[dict], fields: tuple[str, str], end: str) -> str:
        exact, loops = (sum(row[field] for row in chosen) / len(chosen) for field in fields)
        return f"{name:<14}{threshold:>10}{100 * exact:7.1f} %{loops:7.2f}   {end}".rstrip()

    solvable = [row for row in rows if row.get("solvable")]
    for name, what in (("oracle", "the fewest fixed loops of each grade"), ("fixed", "the fewest for all grades")):
        mine = [row for row in solvable if row["measure"] == name]
        text.append(line(name, "", mine, ("exact", "loops"), what))
    for rule, timed in times.items():
        mine = [row for row in solvable if row["measure"] == "chosen" and row["rule"] == rule]
        speed = ", ".join(f"{ratio_text(row)} in batches of {row['batch']}" for row in timed)
        text.append(line(rule, threshold_text(timed[0]), mine, ("exact", "loops"), speed))
    text.append(line("all loops", "", mine, ("full_exact", "full_loops"), ""))
    for row in (row for row in rows if row["measure"] == "best"):
        text.append(f"best: {row['rule']}, the fewest loops of a rule that {CRITERION}; --save keeps it for generate")
    return "\n".join(text)
