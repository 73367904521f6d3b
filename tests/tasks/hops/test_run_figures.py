"""Plots are read off their artists: numbers, axes, and the frame around what was trained."""

import pytest
from matplotlib.patches import Rectangle

from looplab.runs.folder import open_run
from looplab.tasks.hops.figures import plot_runs
from looplab.tasks.hops.run_figures import heat_map, smooth, training_curves
from toy_runs import written_run

LOOPS, HOPS, TRAINED = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5), 3


def accuracy(loops, hops):
    return min(1.0, loops / hops / 2)


@pytest.fixture
def make_run(tmp_path):
    """make_run("name", shift): a finished, evaluated run whose accuracies are `shift` lower than `accuracy`."""

    def make(name="toy", shift=0.0, loops=LOOPS):
        kind = {1: "atomic", 2: "id", 3: "id", 4: "ood", 5: "ood"}
        grid = [
            {"loops": r, "hops": k, "split_kind": kind[k], "accuracy": max(0.0, accuracy(r, k) - shift), "n": 100}
            | {"trained": k <= TRAINED}
            for r in loops
            for k in HOPS
        ]
        grid += [{**row, "split_kind": "train"} for row in grid if row["split_kind"] == "id"]
        steps = [
            {"step": i, "stage": 2 + (i >= 30), "loss": 3.0 / (i + 1), "lr": 0.1, "num_loops": 2, "hops": 2}
            | {"seconds": 6.0 * i, "tokens": i}
            for i in range(60)
        ]
        gates = [
            {"step": i, "stage": 2 + (i >= 30), "gate": {"2": i / 60, **({"3": i / 90} if i >= 30 else {})}}
            | {"seconds": 6.0 * i}
            for i in (10, 20, 40, 50)
        ]
        summary = {"trained_hops": [1, 2, 3], "trained_loops": {"minimum": 2, "maximum": 8, "mean": 4.1}}
        facts = {"summary": summary, "evaluation": {"chance": 0.125, "limit": None}}
        return written_run(
            tmp_path / name, {"name": name, "data": {"task": "khop"}}, **facts, grid=grid, metrics=steps + gates
        ).folder

    return make


def test_the_figures_are_written_as_png(make_run):
    run = make_run()
    paths = plot_runs([open_run(run)])
    assert paths == [run / "figures" / "grid.png", run / "figures" / "training.png"]
    assert sorted(paths) == sorted((run / "figures").iterdir())
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_the_heat_map_shows_every_held_out_cell_as_a_percentage(make_run):
    axes = heat_map([open_run(make_run())]).axes[0]
    numbers = {text.get_position(): text.get_text() for text in axes.texts if text.get_text().isdigit()}
    for x, hops in enumerate(HOPS):
        for y, loops in enumerate(LOOPS):
            assert numbers[x, y] == f"{100 * accuracy(loops, hops):.0f}"
    assert axes.get_images()[0].get_array().shape == (len(LOOPS), len(HOPS))
    assert axes.get_xlabel() == "hops"
    assert axes.get_ylabel() == "loops at inference"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "4", "8", "16"]
    assert {"facts", "held out", "out of distribution"} <= {text.get_text() for text in axes.texts}


def test_the_frame_is_around_the_trained_hops_and_loops(make_run):
    figure = heat_map([open_run(make_run())])
    (frame,) = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    # Hops 1 to 3 are columns 0 to 2, loops 2 to 8 are lines 1 to 3; a cell reaches half a unit around its number.
    assert (frame.get_x(), frame.get_x() + frame.get_width()) == (-0.5, 2.5)
    assert (frame.get_y(), frame.get_y() + frame.get_height()) == (0.5, 3.5)
    assert figure.legends[0].get_texts()[0].get_text() == "in training: up to 3 hops, 2 to 8 loops"


def test_the_scale_is_in_percent_and_marks_chance(make_run):
    scale = heat_map([open_run(make_run())]).axes[1]
    assert scale.get_ylim() == (0, 100)
    assert scale.get_ylabel() == "accuracy (%); white line: chance, 12.5"
    assert [12.5, 12.5] in [list(line.get_ydata()) for line in scale.lines]


@pytest.mark.slow
def test_several_runs_are_drawn_as_mean_and_lowest(make_run):
    runs = [make_run("ab"), make_run("ab_seed1", shift=0.2)]
    assert runs[0].parent / "figures" / "ab" / "grid_ab.png" in plot_runs([open_run(run) for run in runs])
    axes = heat_map([open_run(run) for run in runs]).axes[0]
    at_2_loops_2_hops = [text for text in axes.texts if tuple(map(round, text.get_position())) == (1, 1)]
    assert [text.get_text() for text in at_2_loops_2_hops if text.get_text().isdigit()] == ["40", "30"]  # of 50 and 30
    assert axes.get_title() == "accuracy in %, mean (small: lowest) of ab, ab_seed1"


def test_runs_on_different_grids_cannot_be_averaged(make_run):
    with pytest.raises(ValueError, match=r"different .loops, hops.: run `looped eval` on each with the same --loops"):
        plot_runs([open_run(make_run("ab")), open_run(make_run("ab_seed1", loops=(1, 2)))])


def test_the_training_curves_show_loss_gates_and_stage_changes_over_minutes(make_run):
    upper, lower, scale = training_curves(open_run(make_run())).axes
    raw, smoothed, stage = upper.lines
    assert list(raw.get_xdata()[:2]) == [0.0, 0.1]  # 6 seconds
    assert list(smoothed.get_ydata()) == smooth(list(raw.get_ydata()))
    two, three, _ = lower.lines
    assert list(two.get_ydata()) == pytest.approx([100 / 6, 200 / 6, 400 / 6, 500 / 6])
    assert list(three.get_xdata()) == [4.0, 5.0]
    assert list(stage.get_xdata()) == [2.9, 2.9]
    assert upper.texts[0].get_text() == "+3"
    labels = upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel(), scale.get_ylabel()
    assert labels == ("loss (nats)", "held-out accuracy (%)", "wall time (minutes)", "hops")


def test_smoothing_keeps_a_constant_and_follows_the_rest():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    values = smooth([0.0] * 50 + [1.0] * 50)
    assert values[49] == 0.0
    assert values[-1] > 0.9
