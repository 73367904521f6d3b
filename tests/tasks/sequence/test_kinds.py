"""Kinds are text of the user: whatever they are called, and however many there are, figures and tables show them."""

import re

import pytest

from looplab.instruments.drawing import picture_of
from looplab.runs.folder import open_run
from looplab.tasks.sequence.card import grades_markdown
from looplab.tasks.sequence.figures import MOST_PANELS, grades_figure, loops_figure, reach_figure
from looplab.tasks.sequence.records import GRADES
from toy_runs import written_run

ODD = ["a|b", r"$\frac$", "from $5 to $7", "{{ x }}", "x y/z", "<b>", "\U0001f600"]


def run_of(folder, kinds):
    """A run with one grade, measured on test rows of these kinds."""
    share = {"exact": 0.5, "exact_interval": [0.4, 0.6], "tokens": 0.5, "tokens_interval": [0.4, 0.6], "loss": 1.0}
    grades = [
        {"split": split, "loops": loops, "grade": 3, "kind": kind, **share, "n": 9, "trained": True}
        for split in ("validation", "test")
        for loops in (1, 2)
        for kind in kinds
    ]
    summary = {"trained_loops": {"minimum": 1, "maximum": 2}, "learnable_depth": 0}
    recipe = {"name": "odd", "data": {"task": "sequence"}, "model": {}, "eval_loops": []}
    evaluation = {"chance": 0.1, "by": "one pass", "num_loops": 2}
    return written_run(folder, recipe, summary=summary, grades=grades, evaluation=evaluation)


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")
@pytest.mark.parametrize("figure", [grades_figure, loops_figure, lambda run: reach_figure([("one", [run])])])
def test_a_kind_is_drawn_as_it_is_called(figure, tmp_path):
    drawn = figure(run_of(tmp_path / "odd", ODD))
    assert picture_of(drawn, "png")
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    ticks = [label.get_text() for axes in drawn.axes for label in axes.get_xticklabels()]
    assert all(any(kind in text for text in titles + ticks) for kind in ODD)


def test_of_many_kinds_some_are_drawn(tmp_path):
    """A picture may be 65,536 pixels high."""
    for figure in (loops_figure, lambda run: reach_figure([("one", [run])])):
        drawn = figure(run_of(tmp_path / "many", [f"k{number}" for number in range(500)]))
        assert len(drawn.axes) == MOST_PANELS
        assert f"{MOST_PANELS} of 500 kinds" in drawn.axes[0].get_title(loc="left")


def test_a_line_of_a_table_has_a_cell_for_each_column(tmp_path):
    rows = open_run(run_of(tmp_path / "odd", ODD).folder).read(GRADES)
    lines = grades_markdown(rows, "exact", (1, 2)).splitlines()
    assert len(lines) == 2 + len(ODD)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert r"| a\|b |" in "\n".join(lines)
