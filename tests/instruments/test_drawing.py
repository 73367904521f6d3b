"""Figures: every verb that draws takes every format, the same run gives the same bytes, and numbers can be read where
a page shows them."""

import shutil

import pytest
from matplotlib.text import Text

from looplab.cli import main
from looplab.instruments.drawing import PAGE_WIDTH, points
from looplab.runs.folder import open_run
from looplab.runs.records import PICTURES, read_records
from looplab.tasks.hops.run_figures import MOST_COLUMNS, MOST_ROWS, heat_map
from looplab.tasks.hops.seed_figures import loops_figure
from looplab.tasks.registry import written_files
from toy_runs import failure, written_run

BEGINS = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.slow
@pytest.mark.parametrize("format", PICTURES)
@pytest.mark.parametrize("task", ["hops", "text", "molecules"])
def test_a_verb_draws_in_every_format_and_twice_the_same(toy_runs, tmp_path, task, format):
    folder = shutil.copytree(toy_runs / task, tmp_path / task)
    pictures = []
    for _ in range(2):
        assert main(["plot", str(folder), "--format", format]) == 0
        pictures.append({path.name: path.read_bytes() for path in (folder / "figures").iterdir()})
        shutil.rmtree(folder / "figures")
    assert pictures[0] == pictures[1]
    assert {f"training.{format}"} <= pictures[0].keys()
    for name, content in pictures[0].items():
        assert name.endswith(f".{format}")
        assert content.startswith(BEGINS[format])
        assert f"figures/{name}" in written_files()
        assert f"figures/{name}" in read_records(folder)  # with the weights that it shows


@pytest.mark.slow
def test_the_lens_draws_in_a_format(toy_runs, tmp_path):
    folder = shutil.copytree(toy_runs / "hops", tmp_path / "hops")
    options = ["--limit", "4", "--hops", "2", "--loops", "1", "--no-probes"]
    assert main(["lens", str(folder), *options, "--format", "svg"]) == 0
    assert {"lens.svg", "patch.svg", "swap.svg"} == {path.name for path in (folder / "figures").iterdir()}


def test_a_format_is_one_of_three_and_only_for_tasks_that_draw(toy_runs, capfd):
    with pytest.raises(SystemExit):
        main(["plot", str(toy_runs / "hops"), "--format", "gif"])
    assert "'png', 'pdf', 'svg'" in capfd.readouterr().err
    assert "--format" in failure(capfd, "lens", toy_runs / "molecules", "--format", "svg")


@pytest.fixture
def make_far(tmp_path):
    """make_far(hops, loops): an evaluated run that nobody trained, on 2 to `hops` hops and 1 to `loops` loops."""

    def make(hops: int, loops: int):
        def row(h, r):
            return {"split_kind": "id" if h <= 8 else "ood", "hops": h, "loops": r, "accuracy": float(r >= h), "n": 50}

        counts = range(1, loops + 1)
        grid = [row(h, r) | {"trained": h <= 8} for h in range(2, hops + 1) for r in counts]
        rows = [
            row(h, r) | {"split": "test", "margin": 1.0, "first_correct": 0.1}
            for h in range(2, hops + 1)
            for r in counts
        ]
        facts = {"trained_hops": list(range(1, 9)), "trained_loops": {"minimum": 2, "maximum": 16, "mean": 8.0}}
        recipe = {"name": "far", "seed": 0, "data": {"task": "khop"}}
        files = {"grid": grid, "loops": rows, "summary": facts, "evaluation": {"chance": 0.05, "limit": None}}
        return open_run(written_run(tmp_path / "far", recipe, **files).folder)

    return make


@pytest.mark.parametrize(("hops", "loops"), [(80, 100), (24, 24), (9, 12), (3, 2)])
def test_numbers_of_the_grid_can_be_read_on_a_page(make_far, hops, loops):
    figure = heat_map([make_far(hops, loops)])
    axes = figure.axes[0]
    columns, rows = (
        [int(label.get_text()) for label in of] for of in (axes.get_xticklabels(), axes.get_yticklabels())
    )
    assert len(columns) <= MOST_COLUMNS
    assert len(rows) <= MOST_ROWS
    assert (columns[0], columns[-1], rows[0], rows[-1]) == (2, hops, 1, loops)
    assert min(8, hops) in columns  # where the training ends
    numbers = {tuple(text.get_position()): text for text in axes.texts if text.get_text().isdigit()}
    for x, column in enumerate(columns):
        for y, row in enumerate(rows):
            assert numbers[x, y].get_text() == ("100" if row >= column else "0")
    pixels = PAGE_WIDTH / figure.get_figwidth() / 72
    assert all(text.get_fontsize() * pixels >= 9 for text in numbers.values())
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in numbers.values()]
    cell = axes.get_window_extent()
    assert max(box.width for box in boxes) < cell.width / len(columns)
    assert max(box.height for box in boxes) < cell.height / len(rows)
    words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert all(text.get_fontsize() * pixels >= 8 for text in words)


@pytest.mark.parametrize(("hops", "loops"), [(80, 100), (12, 3)])
def test_every_curve_of_the_legend_is_seen_and_its_style_explained(make_far, hops, loops):
    """Curves that coincide have their marks at places of their own."""
    figure = loops_figure(("far", [make_far(hops, loops)]))
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    lines = [line for line in figure.axes[0].get_lines() if line.get_label().endswith("hops")]
    assert {line.get_label() for line in lines} < labels
    assert {"solid: hops in training", "dashed: more hops"} <= labels
    for line in lines:
        assert line.get_linestyle() == ("-" if int(line.get_label().split()[0]) <= 8 else "--")
        assert line.get_markevery()
    places = [set(line.get_markevery()) for line in lines]
    if loops >= 12:
        assert sum(map(len, places)) == len(set.union(*places))
        assert all(len(own) > 2 for own in places)


@pytest.mark.parametrize("width", [4.0, 8.0, 14.5])
def test_a_font_is_as_high_as_asked_where_the_page_shows_it(make_far, width):
    figure = heat_map([make_far(9, 2)])
    figure.set_figwidth(width)
    assert points(figure, 9) * PAGE_WIDTH / width / 72 >= 9 - 1e-9
