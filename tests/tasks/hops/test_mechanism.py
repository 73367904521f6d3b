"""`looped lens` on a run folder with toy weights: what it writes, draws and refuses, and the page about it."""

import json
import re

import pytest
import yaml

from data_builders import dataset_tokenizer, load_task
from looplab.cli import main
from looplab.instruments.drawing import call_labels
from looplab.instruments.recorder import layer_calls
from looplab.tasks.hops.lens_figures import heat_maps, lens_figures, stages_figure
from toys import ROOT, make_config, make_model

pytestmark = pytest.mark.slow  # the run is looked at in every way first
PAGE = ROOT / "docs" / "guides" / "mechanism.md"
GRAPH = {"num_entities": 12, "num_relations": 4, "out_degree": 4, "ood_share": 0.3, "phi": 1.0, "id_holdout": 0.2}
GRAPH |= {"test_per_kind": 0, "pair_holdout": 0.0}  # only the kinds train, id and ood

STEPS = (20, 100)
STEP = "step-000000100"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A composition run of a model with random weights, with two snapshots, looked at in every way."""
    folder = tmp_path_factory.mktemp("run") / "runs" / "composition"
    task = load_task("composition", "cpu", seed=0, **GRAPH)
    tokenizer = dataset_tokenizer(task)
    sizes = {"vocab_size": len(tokenizer), "num_core_layers": 1, "num_loops": 2, "residual_init": "normal"}
    for seed, name in enumerate(["model", *(f"snapshots/step-{step:09d}" for step in STEPS)]):
        for saved in (make_model(seed, **sizes), tokenizer):
            saved.save_pretrained(folder / name)
    data = {"task": "composition", "config": "cpu", "seed": 0, "overrides": GRAPH}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "composition", "data": data}))
    assert main(["lens", str(folder), "--limit", "4", "--snapshot", STEP]) == 0
    assert main(["lens", str(folder), "--limit", "4", "--snapshot", "all"]) == 0
    assert main(["lens", str(folder), "--limit", "4", "--hops", "1", "--no-probes"]) == 0
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_files_are_those_of_the_three_commands(run):
    assert {path.name for path in run.iterdir() if path.is_file()} == {
        "recipe.yaml", "lens.jsonl", "lens_stages.jsonl", f"lens_{STEP}.jsonl",
    }  # fmt: skip
    names = {"lens", "patch", "stages", *(f"{name}_{STEP}" for name in ("lens", "patch", "swap", "realign", "probe"))}
    assert {path.name for path in (run / "figures").iterdir()} == {f"{name}.png" for name in names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "figures").iterdir())


def test_every_split_kind_is_measured_in_every_way(run):
    rows = rows_of(run / f"lens_{STEP}.jsonl")
    kinds = {"train", "id", "ood"}
    for measure in ("accuracy", "lens", "patch", "swap"):
        assert {row["split_kind"] for row in rows if row["measure"] == measure} == kinds
    assert {row["split_kind"] for row in rows if row["measure"] == "probe"} == kinds - {"train"}
    assert {row["changed"] for row in rows if row["measure"] == "patch"} == {"h", "r1", "r2"}
    assert {(row["snapshot"], row["step"]) for row in rows} == {(STEP, 100)}


def test_a_fact_has_no_bridge_to_swap_and_no_probe_where_none_is_asked_for(run):
    rows = rows_of(run / "lens.jsonl")
    who = {(row["snapshot"], row["step"], row["hops"], row["split_kind"]) for row in rows}
    assert who == {("model", None, 1, "atomic")}
    assert {row["measure"] for row in rows} == {"accuracy", "lens", "patch"}
    assert {row["at"] for row in rows if row["measure"] == "patch"} == {"h", "r1", "<ans>"}


def test_a_row_names_the_words_of_its_positions(run):
    words = {0: "h", 1: "r1", 2: "r2", 3: "<ans>"}
    for row in rows_of(run / f"lens_{STEP}.jsonl"):
        if "position" in row:
            assert row["at"] == words[row["position"]]
        if "positions" in row:
            assert row["at"] == "+".join(words[position] for position in row["positions"])


def test_the_stages_are_the_snapshots_in_order(run):
    rows = rows_of(run / "lens_stages.jsonl")
    assert list(dict.fromkeys(row["step"] for row in rows)) == list(STEPS)
    assert {row["split_kind"] for row in rows} == {"train", "id", "ood"}
    # A snapshot measured alone gives the same numbers.
    alone = [row for row in rows_of(run / f"lens_{STEP}.jsonl") if row["split_kind"] == "ood"]
    for measure in ("accuracy", "lens", "swap"):
        within = [
            row for row in rows if row["step"] == 100 and row["split_kind"] == "ood" and row["measure"] == measure
        ]
        assert within == [row for row in alone if row["measure"] == measure]


def numbers(axes):
    return {text.get_position(): text.get_text() for text in axes.texts}


def test_a_heat_map_shows_every_row_at_its_word_and_layer_call(run):
    rows = rows_of(run / f"lens_{STEP}.jsonl")
    figure = lens_figures(rows)["lens"]
    panels, words = (
        figure.axes[:6],
        ["h", "r1", "r2", "<ans>"],
    )  # bridge and answer x three kinds, by lines
    assert [axes.get_title().split("\n")[0] for axes in panels[:3]] == [
        "training rows",
        "held out",
        "out of distribution",
    ]
    assert [axes.get_ylabel() for axes in (panels[0], panels[3])] == ["bridge", "answer"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["loop 1", "loop 2"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == [
        "start",
        "relation 1",
        "relation 2",
        "<ans>",
    ]
    for axes, (hop, kind) in zip((panels[1], panels[5]), ((1, "id"), (2, "ood")), strict=True):
        own = [row for row in rows if row["measure"] == "lens" and row["hop"] == hop and row["split_kind"] == kind]
        assert numbers(axes) == {(words.index(row["at"]), row["loop"]): f"{100 * row['top1']:.0f}" for row in own}


def test_what_was_not_probed_stays_white(run):
    figure = lens_figures(rows_of(run / f"lens_{STEP}.jsonl"))["probe"]
    bridge, answer = numbers(figure.axes[0]), numbers(figure.axes[2])
    assert {x for x, _ in bridge} == {0, 1, 2}  # r1, r2 and <ans>; nothing is known at h
    assert {x for x, _ in answer} == {1, 2}
    assert "random weights at most" in figure.axes[0].get_title()


def test_the_stages_figure_has_a_line_per_question_and_a_cell_per_step(run):
    rows = rows_of(run / "lens_stages.jsonl")
    axes = stages_figure(rows).axes
    assert [a.get_ylabel() for a in axes[:15:3]] == [
        "accuracy (%)", "bridge read out\nat relation 1", "answer read out\nat <ans>",
        "clean relations 1+2\nput back", "bridge swapped at\nrelations 1+2",
    ]  # fmt: skip
    assert [label.get_text() for label in axes[12].get_xticklabels()] == ["20", "100"]
    reached = [row["accuracy"] for row in rows if row["measure"] == "accuracy" and row["split_kind"] == "id"]
    assert list(axes[1].lines[0].get_ydata()) == pytest.approx([100 * value for value in reached])
    swapped = [
        row for row in rows if row["measure"] == "swap" and row["split_kind"] == "ood" and row["positions"] == [1, 2]
    ]
    assert numbers(axes[14]) == {
        (STEPS.index(row["step"]), row["loop"]): f"{100 * row['swapped']:.0f}" for row in swapped
    }


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_core_layers": 3, "num_loops": 1}, ["layer 1", "layer 2", "layer 3"]),
        ({"num_core_layers": 1, "num_loops": 2}, ["loop 1", "loop 2"]),
        ({"num_loops": 2}, ["loop 1, layer 1", "loop 1, layer 2", "loop 2, layer 1", "loop 2, layer 2"]),
        (
            {"num_core_layers": 1, "num_loops": 1, "num_prelude_layers": 1, "num_coda_layers": 2},
            ["prelude 1", "core", "coda 1", "coda 2"],
        ),
    ],
)
def test_layer_calls_are_named_without_what_they_share(fields, labels):
    assert call_labels(layer_calls(make_config(**fields))) == labels


def test_long_chains_have_a_panel_line_per_hop():
    row = {"section": "core", "loop": 0, "layer": 0, "at": "r1..r4", "split_kind": "id", "hops": 4, "top1": 0.5}
    rows = [row | {"hop": hop} for hop in (1, 2, 3, 4)]
    figure = heat_maps(rows, "top1", lambda row: str(row["hop"]), lambda rows: "", "scale", "title")
    assert [axes.get_ylabel() for axes in figure.axes[:4]] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--snapshot", "step-7"], "has no snapshot 'step-7'; there are step-000000020, step-000000100, and 'all'"),
        (["--hops", "3"], "no chains of hops=3"),
    ],
)
def test_a_mistake_is_one_sentence(run, capsys, arguments, message):
    assert main(["lens", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_snapshots_the_remedy_is_named(tmp_path, run, capsys):
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert main(["lens", str(tmp_path), "--snapshot", "all"]) == 2
    assert "name the steps to keep in the recipe's `snapshots`" in capsys.readouterr().err


def test_the_pages_figures_are_those_that_are_drawn(run):
    named = set(re.findall(r"`(\w+\.png)`", PAGE.read_text()))
    assert named == {path.name.replace(f"_{STEP}", "") for path in (run / "figures").iterdir()}
