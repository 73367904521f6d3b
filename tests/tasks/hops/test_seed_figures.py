"""The figures of groups are read off their artists: which loops, whose band, what is marked."""

import pytest

from looplab.instruments.drawing import spread
from looplab.runs.intervals import t_interval
from looplab.tasks.hops.seed_figures import halting_figure, hops_figure, learning_figure, loops_figure
from toy_runs import written_run

CHANCE = 0.125
STYLES = ["solid: hops in training", "dashed: more hops"]


def accuracy(hops, loops, shift):
    return max(0.0, min(1.0, 1.25 - hops / 4 + (loops >= hops) / 2 - shift))


@pytest.fixture
def make_run(tmp_path):
    """make_run("name", shift): a run of 4 loops on 2, 3 (trained) and 4 hops, with its files of eval and halting."""

    def make(name, shift=0.0, kinds=None):
        lines = [(kind, 2) for kind in kinds] if kinds else [("id", 2), ("id", 3), ("ood", 4)]
        loops = [
            {
                "split": split,
                "split_kind": kind,
                "hops": hops,
                "loops": count,
                "accuracy": accuracy(hops, count, shift),
            }
            | {"margin": count - shift, "first_correct": 0.1, "n": 50}
            for split in ("validation", "test")
            for kind, hops in lines
            for count in (1, 2, 3, 4)
        ]
        halting = [{"measure": "fixed", "accuracy": count / 4 - shift, "loops": count} for count in (1, 2, 3, 4)]
        for rule, used in (("kl", 2.5), ("latent", 3.0)):
            halting.append({"measure": "frontier", "rule": rule, "loops": used, "accuracy": 0.9})
            halting.append({"measure": "time", "rule": rule, "ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0})
            halting += [
                {"measure": "chosen", "rule": rule, "hops": hops, "solvable": hops < 4, "accuracy": 0.9 - shift}
                | {"loops": used + shift, "simulated_loops": used, "own_accuracy": 1.0, "own_loops": hops}
                | {"fixed_accuracy": 1.0, "fixed_loops": 4, "needed_loops": 3}
                for hops in (2, 3, 4)
            ]
        gates = [
            {"step": step, "seconds": 60 * step * (1 + shift), "gate": {}}
            | {"gate_by_split_kind": {"2 id": 1 - shift, "2 ood": step / 100 - shift}}
            for step in ((20, 40, 80, 160) if shift else (20, 40, 80))
        ]
        summary = {"trained_hops": [1, 2, 3], "learnable_depth": 3, "trained_loops": {"minimum": 2, "maximum": 3}}
        facts = {"summary": summary, "evaluation": {"chance": CHANCE, "limit": None}}
        return written_run(tmp_path / name, {"name": name}, **facts, loops=loops, halting=halting, metrics=gates)

    return make


def line(axes, label):
    (found,) = [artist for artist in axes.lines if artist.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_accuracy_by_hops_is_at_the_chosen_loops_with_thresholds_chance_and_training(make_run):
    figure = hops_figure([("toy", [make_run("toy"), make_run("toy_seed1", 0.1), make_run("toy_seed2", 0.2)])])
    (axes,) = figure.axes
    # 4 loops are best, for all three hop counts in every run.
    expected = [100 * sum(accuracy(hops, 4, shift) for shift in (0, 0.1, 0.2)) / 3 for hops in (2, 3, 4)]
    assert line(axes, "toy at 4 loops") == ([2, 3, 4], pytest.approx(expected))
    assert labels(figure) == ["toy at 4 loops", "60, 90, 95 %", "chance, 12.5", "hops in training"]
    heights = [artist.get_ydata()[0] for artist in axes.lines if len(set(artist.get_ydata())) == 1]
    assert {60, 90, 95, 12.5} <= {round(height, 6) for height in heights}
    assert axes.get_title(loc="left") == "test questions; band: 95 % t-interval over 3 seeds"


def test_the_band_is_the_t_interval_cut_to_what_an_accuracy_can_be(make_run):
    shifts = (0.0, 0.35, 0.7)
    (axes,) = hops_figure([("toy", [make_run(f"toy_seed{i}", shift) for i, shift in enumerate(shifts)])]).axes
    heights = {hops: [y for x, y in axes.collections[0].get_paths()[0].vertices if x == hops] for hops in (2, 4)}
    for hops in (2, 4):
        _, low, high = t_interval([accuracy(hops, 4, shift) for shift in shifts])
        assert min(heights[hops]) == pytest.approx(max(0, 100 * low))
        assert max(heights[hops]) == pytest.approx(min(100, 100 * high))


def test_split_kinds_of_one_hop_count_are_named_and_groups_stand_side_by_side(make_run):
    groups = [("a", [make_run("a", kinds=("id", "ood"))]), ("b", [make_run("b", 0.3, kinds=("id", "ood"))])]
    (axes,) = hops_figure(groups).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["held out", "out of distribution"]
    places = [list(container.lines[0].get_xdata()) for container in axes.containers]
    assert places == [pytest.approx([-0.06, 0.94]), pytest.approx([0.06, 1.06])]
    assert axes.get_title(loc="left") == "test questions; band: 95 % Wilson interval of one run's rows"


def test_loops_are_drawn_for_every_hop_count_with_those_of_the_training_marked(make_run):
    figure = loops_figure(("toy", [make_run("toy"), make_run("toy_seed1", 0.2)]))
    upper, lower = figure.axes
    assert line(upper, "2 hops") == ([1, 2, 3, 4], pytest.approx([100 * (accuracy(2, r, 0) + accuracy(2, r, 0.2)) / 2
                                                                  for r in (1, 2, 3, 4)]))  # fmt: skip
    assert line(lower, "4 hops") == ([1, 2, 3, 4], pytest.approx([0.9, 1.9, 2.9, 3.9]))
    styles = {artist.get_label(): artist.get_linestyle() for artist in upper.lines}
    assert (styles["3 hops"], styles["4 hops"]) == ("-", "--")
    assert labels(figure) == ["2 hops", "3 hops", "4 hops", "loops in training", "chance, 12.5", *STYLES]
    (span,) = upper.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == (1.5, 3.5)


def test_at_most_six_hop_counts_are_drawn_the_first_and_last_among_them():
    assert spread([1, 2, 3], 6) == [1, 2, 3]
    assert spread(list(range(20)), 6) == [0, 4, 8, 11, 15, 19]


def test_the_halting_figure_has_the_means_of_the_chosen_settings_and_the_baselines(make_run):
    figure = halting_figure(("toy", [make_run("toy"), make_run("toy_seed1", 0.2)]))
    left, right = figure.axes
    assert line(left, "fixed count") == ([1, 2, 3, 4], pytest.approx([15, 40, 65, 90]))
    assert line(left, "kl: chosen") == (pytest.approx([2.5, 2.7]), pytest.approx([90, 70]))
    assert line(right, "latent") == ([2, 3, 4], pytest.approx([3.1] * 3))
    assert line(right, "own count (oracle)") == ([2, 3], [2, 3])
    assert {"kl", "latent", "fixed count, 4.0", "hops in training", "chance, 12.5"} <= set(labels(figure))


def test_learning_is_drawn_over_the_mean_minutes_of_each_step(make_run):
    group = [make_run("toy"), make_run("toy_seed1", 0.5)]
    figure = learning_figure([("toy", group), ("other", [make_run("other")])])
    (axes,) = figure.axes
    assert line(axes, "toy: out of distribution") == ([25, 50, 100], pytest.approx([-5, 15, 55]))
    assert line(axes, "other: held out") == ([20, 40, 80], [100] * 3)
    assert axes.get_xscale() == "log"
    assert axes.get_title(loc="left") == "band: 95 % t-interval over 2 seeds"
