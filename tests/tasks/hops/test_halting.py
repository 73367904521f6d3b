"""Laws of the halting sweep: a simulated setting is the real one, and none is chosen on what it is measured on."""

import pytest
import torch

from looplab.instruments.halting_settings import HaltingSetting
from looplab.instruments.traces import Trace, trace
from looplab.tasks.hops.evaluation import trace_groups
from looplab.tasks.hops.halting import (
    POINT,
    choose,
    frontier,
    loops_used,
    mean_outcome,
    outcome,
    run_setting,
    sweep,
    timed_rows,
)
from looplab.tasks.hops.rows import RowGroup
from toys import make_ids, make_model

LOOPS = 8
SETTINGS = [
    HaltingSetting(None, 5),
    HaltingSetting({"rule": "kl", "kl_threshold": 0.05}, 8),
    HaltingSetting({"rule": "kl", "kl_threshold": 0.05}, 3),
    HaltingSetting({"rule": "kl_entropy", "kl_threshold": 0.2, "max_entropy": 3.55}, 8),
    HaltingSetting({"rule": "latent", "threshold": 0.25}, 8),
    HaltingSetting({"rule": "kl", "kl_threshold": 1.0}, 1),
]


@pytest.fixture(scope="module")
def rows():
    """A toy model and a group of 40 rows, half of which it answers right after 4 loops."""
    model, ids = make_model(), make_ids(rows=40)
    answers = make_ids(rows=1, tokens=40, seed=2)[0]
    answers[:20] = trace(model, ids, answers, 4).prediction[3, :20]
    return model, RowGroup(2, "id", ids, answers)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.rule}-{s.num_loops}")
def test_a_simulated_setting_is_the_setting_run_for_real(rows, setting):
    model, group = rows
    (traced,) = trace_groups(model, [group], [LOOPS])
    output = model(group.input_ids, num_loops=setting.num_loops, halting=setting.halting, logits_to_keep=1)
    assert torch.equal(loops_used(setting, traced), output.loops_used[:, -1])
    assert outcome(setting, group, traced) == run_setting(model, setting, group)


def test_the_settings_of_that_test_do_halt_rows_at_different_loops(rows):
    model, group = rows
    (traced,) = trace_groups(model, [group], [LOOPS])
    for setting in (SETTINGS[1], SETTINGS[3], SETTINGS[4]):
        assert len(loops_used(setting, traced).unique()) > 2


def toy_trace(signal, right_from):
    """Rows whose KL, change and entropy are `signal` (R, N), right from loop `right_from` (N,) on; gold token 1."""
    loops = torch.arange(1, len(signal) + 1)[:, None]
    return Trace((loops >= right_from).long(), signal, signal, signal, signal, torch.zeros_like(signal))


def test_the_fewest_loops_within_a_point_are_chosen_and_else_the_smallest_loss():
    signal = torch.tensor([[9.0], [0.5], [0.05], [0.005]]).expand(4, 100)
    right_from = torch.full((100,), 3)
    group = RowGroup(2, "id", torch.ones(100, 3), torch.ones(100, dtype=torch.long))
    settings = [HaltingSetting({"rule": "latent", "threshold": value}, 4) for value in (1.0, 0.1, 0.01)]
    traced = toy_trace(signal, right_from)
    assert choose(settings, [group], [traced], [1.0]) == settings[1]
    right_from[0] = 4  # one row of a hundred is a point
    assert choose(settings, [group], [toy_trace(signal, right_from)], [1.0]) == settings[1]
    right_from[:2] = 4
    assert choose(settings, [group], [toy_trace(signal, right_from)], [1.0]) == settings[2]
    assert choose(settings[:2], [group], [toy_trace(signal, right_from)], [1.0]) == settings[1]
    assert POINT == 0.01


def test_no_setting_beats_one_of_the_frontier_and_it_rises(rows):
    model, group = rows
    traces = trace_groups(model, [group], [LOOPS])
    settings = sweep(model.config, [4, LOOPS])
    points = [mean_outcome(setting, [group], traces) for setting in frontier(settings, [group], traces)]
    assert points == sorted(set(points))
    assert [loops for _, loops in points] == sorted(loops for _, loops in points)
    for accuracy, loops in (mean_outcome(setting, [group], traces) for setting in settings):
        assert any(best >= accuracy and fewest <= loops for best, fewest in points)


def test_the_timed_batch_has_the_same_number_of_rows_of_each_line():
    test = {"split_kind": ["id"] * 150 + ["ood"] * 90, "hops": [2] * 70 + [3] * 80 + [4] * 90}
    assert timed_rows(test, [("id", 2), ("ood", 4)]) == [*range(64), *range(150, 214)]
