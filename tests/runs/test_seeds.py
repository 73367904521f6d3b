"""Laws of groups of seeds: which runs belong together, what the interval covers, what the table says."""

import numpy as np
import pytest

from looplab.runs.intervals import T, t_interval, t_quantile
from looplab.runs.seeds import group_runs, span
from looplab.tasks.hops.results import markdown_table
from toy_runs import written_run


@pytest.fixture
def make_run(tmp_path):
    def make(name, seed=0, width=64, accuracy=1.0):
        recipe = {"name": name, "seed": seed, "model": {"hidden_size": width}, "data": {"task": "khop", "seed": seed}}
        rows = [
            {"split": split, "split_kind": "id", "hops": hops, "loops": loops, "accuracy": accuracy * (loops >= hops)}
            | {"margin": 1.0, "first_correct": 0.1, "n": 10}
            for split in ("validation", "test")
            for hops in (2, 3)
            for loops in (1, 2, 3, 4)
        ]
        return written_run(tmp_path / name, recipe, summary={"learnable_depth": 2}, loops=rows)

    return make


def test_runs_that_differ_in_their_seeds_only_are_one_group(make_run):
    a, b, wide = make_run("toy"), make_run("toy_seed1", seed=1), make_run("wide_seed1", seed=1, width=128)
    assert group_runs([a, wide, b]) == {"toy": [a, b], "wide": [wide]}


def test_a_run_given_twice_or_a_name_of_two_recipes_is_refused(make_run):
    a = make_run("toy_seed0")
    with pytest.raises(ValueError, match="is among the runs twice"):
        group_runs([a, a])
    with pytest.raises(ValueError, match="different recipes but the same name toy"):
        group_runs([a, make_run("toy_seed1", seed=1, width=128)])


@pytest.mark.parametrize("n", [2, 3, 5, 10, 14])
def test_the_t_interval_covers_the_mean_of_95_percent_of_samples(n):
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, n))
    bounds = np.array([t_interval(sample.tolist())[1:] for sample in samples])
    assert 0.94 < ((bounds[:, 0] <= 3.0) & (bounds[:, 1] >= 3.0)).mean() < 0.96
    assert t_interval([7.0]) == (7.0, 7.0, 7.0)


def test_the_formula_takes_over_where_the_table_ends():
    assert t_quantile(9) == pytest.approx(T[8], abs=0.01)
    assert t_quantile(20) == pytest.approx(2.086, abs=0.001)


def test_a_span_is_the_mean_and_the_extremes():
    assert span([1.0, 2.0, 4.5], 1) == "2.5 [1.0, 4.5]"
    assert span([0.123, 0.1234], 1, 100) == "12.3"
    assert span([None, 2.0], 1) == "2.0"
    assert span([None]) == "-"


def test_the_table_has_a_line_per_group_at_the_chosen_loops(make_run):
    runs = [make_run("toy"), make_run("toy_seed1", seed=1, accuracy=0.7), make_run("wide", width=128, accuracy=0.5)]
    header, rule, toy, wide = (
        [cell.strip() for cell in row.split("|")[1:-1]] for row in markdown_table(runs).splitlines()
    )
    cells = dict(zip(header, toy, strict=True))
    assert set(rule) == {"---"}
    assert cells["seeds"] == "2"
    assert cells["loops"] == "3.0"
    assert cells["hops >= 60 %"] == "3.0"
    assert cells["hops >= 90 %"] == "1.5 [0.0, 3.0]"
    assert cells["id %"] == "85.0 [70.0, 100.0]"
    assert cells["kept at 4 loops"] == "1.00"
    assert dict(zip(header, wide, strict=True))["hops >= 60 %"] == "0.0"
