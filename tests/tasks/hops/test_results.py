"""Laws of what is read off RUN/loops.jsonl and RUN/halting.jsonl: choose on validation rows, measure on test rows."""

import subprocess
import sys

import pytest

from looplab.runs.intervals import wilson_interval
from looplab.tasks.hops.results import (
    best_loops,
    depth_facts,
    depth_text,
    fewest_near_best,
    halting_facts,
    halting_text,
)
from toy_runs import written_run
from toys import ROOT


def loop_row(split, hops, loops, accuracy, first=0.0, kind=None):
    kind = kind or ("id" if hops <= 2 else "ood")
    row = {"split": split, "split_kind": kind, "hops": hops, "loops": loops, "accuracy": accuracy, "margin": accuracy}
    return row | {"first_correct": first, "n": 100}


@pytest.fixture
def make_run(tmp_path):
    def make(validation, test, learnable=2):
        """A run with accuracies {hops: [after loop 1, 2 ..]}."""
        rows = [
            loop_row(split, hops, loops, accuracy, first=0.25 if loops in (2, 4) else 0.0)
            for split, lines in (("validation", validation), ("test", test))
            for hops, accuracies in lines.items()
            for loops, accuracy in enumerate(accuracies, start=1)
        ]
        return written_run(tmp_path, {"name": "toy"}, summary={"learnable_depth": learnable}, loops=rows)

    return make


VALIDATION = {2: [0.9, 1.0, 1.0, 0.8], 3: [0.1, 0.8, 0.9, 0.5], 4: [0.0, 0.1, 0.3, 0.7]}
TEST = {2: [1.0, 0.99, 0.97, 1.0], 3: [1.0, 0.7, 0.9, 0.45], 4: [1.0, 0.2, 0.3, 0.65]}


def test_loops_are_chosen_on_validation_rows_and_measured_on_test_rows(make_run):
    facts = depth_facts(make_run(VALIDATION, TEST))
    assert facts["loops"] == 3  # the test rows alone would choose 1
    assert facts["own_loops"] == {("id", 2): 2, ("ood", 3): 3, ("ood", 4): 4}
    assert facts["reach"] == {0.6: 3, 0.9: 3, 0.95: 2}
    assert facts["reach_own_loops"] == {0.6: 4, 0.9: 3, 0.95: 2}
    assert facts["ratio"] == 1.5
    assert facts["accuracy"] == {"id": 0.97, "ood": pytest.approx(0.6)}


def test_what_is_kept_after_the_last_loop_is_measured_against_the_chosen_loops(make_run):
    facts = depth_facts(make_run(VALIDATION, TEST))
    assert facts["kept"] == pytest.approx((1.0 + 0.45 + 0.65) / (0.97 + 0.9 + 0.3))
    assert facts["kept_by_line"] == pytest.approx({("id", 2): 1 / 0.99, ("ood", 3): 0.5, ("ood", 4): 1.0})


def test_the_first_correct_loop_is_averaged_over_the_rows_that_are_ever_right(make_run):
    run = make_run(VALIDATION, TEST)
    assert set(depth_facts(run)["first_correct"].values()) == {
        3.0
    }  # a quarter at loop 2, another at loop 4, the rest never


def test_a_run_that_learnt_nothing_has_no_ratio(make_run):
    nothing = {2: [0.0, 0.0]}
    facts = depth_facts(make_run(nothing, nothing, learnable=0))
    assert (facts["ratio"], facts["kept"], facts["loops"]) == (None, None, 1)
    assert "ratio -" in depth_text(make_run(nothing, nothing, learnable=0))


def test_a_stray_row_does_not_choose_more_loops():
    assert fewest_near_best([0.5, 0.9990, 0.9995]) == 2
    assert fewest_near_best([0.5, 0.998, 0.9995]) == 3
    assert best_loops({("id", 2): [1.0, 0.0, 0.0], ("id", 3): [0.0, 0.9, 1.0]}) == 1


def test_the_text_has_a_line_per_line_and_the_reach(make_run):
    text = depth_text(make_run(VALIDATION, TEST)).splitlines()
    assert "3 loops are best on the validation rows" in text[0]
    assert text[2].split()[:6] == ["id", "2", "|", "97.0", "99.0", "@2"]
    assert text[-1].startswith("learnable depth 2; hops reached in loops 1 to 4: 3 (4 with own loops) at >= 60 %")
    assert text[-1].endswith("ratio 1.50")


def halting_rows():
    chosen = [
        {"measure": "chosen", "rule": "kl", "hops": hops, "solvable": hops < 4, "accuracy": accuracy, "loops": loops}
        | {"own_accuracy": 1.0, "own_loops": hops, "fixed_accuracy": 0.9, "fixed_loops": 8, "needed_loops": 6}
        | {"simulated_loops": loops, "split_kind": "id", "n": 9, "simulated_accuracy": accuracy}
        for hops, accuracy, loops in ((2, 1.0, 2.0), (3, 0.9, 4.0), (4, 0.1, 8.0))
    ]
    time = {"measure": "time", "rule": "kl", "kl_threshold": 0.01, "num_loops": 8, "against": 8}
    return [*chosen, time | {"ratio": 1.5, "ratio_min": 1.4, "ratio_max": 1.7}]


def test_the_length_of_the_input_is_a_baseline_of_files_that_have_it():
    length = [
        {
            "measure": "length",
            "rule": "length",
            "hops": hops,
            "solvable": hops < 4,
            "accuracy": 0.5,
            "loops": hops + 1.0,
        }
        for hops in (2, 3, 4)
    ]
    assert "length" not in halting_text(halting_rows())
    (line,) = [line for line in halting_text([*halting_rows(), *length]).splitlines() if line.startswith("length")]
    assert line.split()[1:3] == ["50.0", "3.50"]


def test_savings_are_means_over_the_solvable_hop_counts_against_both_baselines():
    fact = halting_facts(halting_rows())["kl"]
    assert (fact["accuracy"], fact["loops"]) == (pytest.approx(0.95), 3.0)
    assert fact["saved"] == 1 - 3 / 8
    assert fact["saved_of_needed"] == 1 - 3 / 6
    assert fact["largest_loss"] == pytest.approx(0.1)
    assert fact["time"] == (1.4, 1.5, 1.7)
    assert fact["setting"] == {"kl_threshold": 0.01, "num_loops": 8}
    text = halting_text(halting_rows())
    assert "solvable hops 2, 3," in text
    assert "62 % fewer than the fixed count, 50 % than the largest own one" in text


def test_an_interval_holds_the_share_it_is_of():
    """At 100 % of 317 rows rounding put the upper end below 1: the figure of six composition runs was refused."""
    for n in range(1, 400):
        for right in (0, n // 2, n):
            low, high = wilson_interval(right / n, n)
            assert 0 <= low <= right / n <= high <= 1


@pytest.mark.parametrize(
    "module", ["looplab.runs", "looplab.training.recipe", "looplab.runs.seeds", "data_builders.files"]
)
def test_what_reads_results_imports_no_torch(module):
    """A table, or a folder that is misspelt, is a matter of a fraction of a second."""
    code = f"import sys, {module}; print(sorted({{'torch', 'datasets', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
