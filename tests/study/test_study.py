"""`looped study`: rows are the only source of its pages, cells with rows do not run again, and mistakes come first."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from looplab.cli import main, parsed
from looplab.runs.folder import open_run, to_json_lines
from looplab.runs.yaml_text import to_yaml
from looplab.study.cells import cells_of, check_arms, measurement, missing
from looplab.study.page import BLOCK, by_seed, check_study, draw_study, replaced, table_of, verdict
from looplab.study.study_file import Success, digests_of, flags_of, read_study
from toys import ROOT

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
PLAIN = {
    "question": "Does it learn?",
    "arms": {"long": {"recipe": "smoke"}, "short": {"recipe": "smoke", "overrides": {"max_steps": 1}}},
    "seeds": [10, 11],
    "evaluate": {"loops": [1, 2], "max_loops": 2, "limit": 2},
    "keep": {"loops": [2]},
    "table": {"columns": "hops"},
    "success": [{"arm": "long", "where": {"hops": 2}, "at_least": 0.5}],
}


def write(place: Path, **changes) -> Path:
    path = place / "toy.yaml"
    path.write_text(to_yaml(PLAIN | changes))
    return path


def rows_of(study, values) -> list[dict]:
    """Rows of every cell, values[arm][seed], as if it had run."""
    digests = digests_of(study)
    return [
        {"arm": arm, "seed": seed, "recipe": digests[arm], "commit": "c0ffee", "loops": 2}
        | {"hops": hops, "accuracy": value}
        for arm, seeds in values.items()
        for seed, value in seeds.items()
        for hops in (1, 2)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"seeds": []}, "at least one arm and one seed"),
        ({"seeds": [3, 3]}, "twice"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [10], "tuned_on": [9, 10]}, "seed 10 is in tuned_on"),
        ({"arms": {"a": {"recpie": "smoke"}}}, "recpie"),
        ({"arms": {"../a": {"recipe": "smoke"}}}, "plain folder name"),
        ({"arms": [1]}, "arms must be fields and values"),
        ({"success": [{"arm": "nobody", "at_least": 1}]}, "nobody"),
        ({"success": [{"arm": "long", "over": "nobody", "at_least": 1}]}, "nobody"),
        ({"success": [{"arm": "long"}]}, "at_least or at_most"),
        ({"success": [{"arm": "long", "at_least": 1, "at_most": 1}]}, "one of them"),
        ({"success": [{"arm": "long", "at_least": 1, "of": "median"}]}, "of"),
        ({"success": {}}, "success must be a list"),
        ({"sedes": [1]}, "seeds"),
        ({"success": [{"arm": "long", "over_where": {"hops": 1}, "at_least": 1}]}, "over_where needs `over`"),
        ({"folder": "../elsewhere"}, "plain folder name"),
        ({"measure": "lens"}, "measure"),
        (
            {"arms": {"a": {"recipe": "smoke", "overrides": {"init_from": "{b}/model"}}, "b": {"recipe": "smoke"}}},
            "{b}",
        ),
        ({"arms": {"a": {"recipe": "smoke", "overrides": {"init_from": "{a}/model"}}}}, "{a}"),
        ({"table": {"columns": "hops", "digits": -1}}, "digits"),
        (
            {
                "arms": {"a": {"recipe": "smoke", "where": {"loops": 4}}},
                "success": [{"arm": "a", "where": {"loops": 8, "hops": 2}, "at_least": 1}],
            },
            "success[0].where has loops 8, and arms.a.where has 4",
        ),
        (
            {
                "arms": {"a": {"recipe": "smoke", "where": {"loops": 4}}},
                "success": [{"arm": "a", "over": "a", "over_where": {"loops": 1}, "at_least": 1}],
            },
            "success[0].over_where has loops 1, and arms.a.where has 4",
        ),
    ],
)
def test_mistakes_in_the_file(changes, said, tmp_path):
    with pytest.raises(ValueError, match=r"toy\.yaml") as error:
        read_study(write(tmp_path, **changes))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "arm",
    [
        {"recipe": "smoke", "overrides": {"max_stpes": 1}},
        {"recipe": "nowhere"},
        {"recipe": "smoke", "evaluate": {"max_steps": 1}},
    ],
)
def test_a_recipe_that_cannot_run_stops_the_study_before_it_begins(arm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", str(write(tmp_path, arms={"good": {"recipe": "smoke"}, "bad": arm}, success=[]))]) == 2
    assert re.search("max_steps|nowhere", capsys.readouterr().err)
    assert not Path("runs").exists()


values = st.dictionaries(st.integers(0, 40), st.floats(0, 1), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    found=values,
    other=values,
    bound=st.floats(-1, 1),
    up=st.booleans(),
    over=st.booleans(),
    of=st.sampled_from(["every seed", "mean", "interval"]),
)
def test_the_verdict_is_that_of_the_rows(found, other, bound, up, over, of, tmp_path_factory):
    seeds = sorted(found.keys() | other.keys())
    _, study = read_study(write(tmp_path_factory.mktemp("study"), seeds=seeds))
    rows = rows_of(study, {"long": found, "short": other})
    assert by_seed(study, rows, "long", {"hops": 2}) == found
    assert by_seed(study, rows, "long", {"hops": [1, 2]}) == pytest.approx(found)
    asked = Success("long", {"hops": 2}, bound if up else None, None if up else bound, "short" if over else None, of)
    judged = {s: v - (other[s] if over else 0) for s, v in found.items() if not over or s in other}
    text = verdict(study, asked, rows)
    if not judged:
        assert "Not run" in text
        return
    sign = 1 if up else -1
    each = [sign * value >= sign * bound for value in judged.values()]
    met = {"every seed": all(each), "mean": sign * fmean(judged.values()) >= sign * bound}
    if of in met and (len(judged) == len(seeds) or (of == "every seed" and not met[of])):
        assert ("**Met**" in text, "**Not met**" in text) == (met[of], not met[of])
    elif len(judged) < len(seeds):
        assert f"Open, {len(judged)} of {len(seeds)}" in text
    if of == "interval" and "**Met**" in text:  # no seed's mean lies on the wrong side of a met interval
        assert met["mean"]


def test_rows_of_one_arm_are_compared(tmp_path):
    asked = {"arm": "long", "where": {"hops": 2}, "over": "long", "over_where": {"hops": 1}, "at_most": -0.5}
    _, study = read_study(write(tmp_path, success=[asked]))
    rows = rows_of(study, {"long": {10: 0.75, 11: 0.75}})
    for row in rows:
        row["accuracy"] += {1: 0.5, 2: 0.0}[row["hops"]]
    said = verdict(study, study.success[0], rows)
    assert "of long at hops 1, at hops 2: at most -0.5" in said
    assert "**Met**: seeds 10: -0.5, 11: -0.5" in said


def test_pages_follow_the_rows_and_check_sees_a_changed_digit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = Path("page.md")
    page.write_text("before\n\n" + BLOCK.format(name="toy", text="old") + "\n\nafter\n")
    name, study = read_study(write(tmp_path, pages=["page.md"]))
    rows = rows_of(study, {"long": {10: 0.25, 11: 0.75}, "short": {10: 0.5}})
    Path("out").mkdir()
    Path("out/toy.jsonl").write_text(to_json_lines(rows))
    draw_study(name, study, Path("out"), Path("runs"))
    for path in (page, Path("out/toy.md")):
        assert "0.5 [0.2, 0.8]" in path.read_text()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    assert "Not run: short seed 11." in Path("out/toy.md").read_text()
    assert check_study(name, study, Path("out"), Path("runs")) == []
    arguments = ["study", "toy.yaml", "--check", "--to", "out"]
    assert main(arguments) == 0
    for path in (page, Path("out/toy.md")):
        text = path.read_text()
        path.write_text(text.replace("[0.2, 0.8]", "[0.2, 0.9]"))
        assert main(arguments) == 2
        assert str(path) in capsys.readouterr().err
        path.write_text(text)
    Path("out/toy.jsonl").write_text(to_json_lines([*rows, {"seed": 1}]))
    assert main(arguments) == 2
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no line <!-- study toy -->"):
        replaced("no marks", "toy", "text")


def test_a_changed_recipe_makes_its_rows_old(tmp_path):
    _, study = read_study(write(tmp_path))
    rows = rows_of(study, {"long": {10: 1.0, 11: 1.0}, "short": {10: 1.0, 11: 1.0}})
    assert missing(cells_of("toy", study, tmp_path), rows) == []
    changed = PLAIN["arms"] | {"short": {"recipe": "smoke", "overrides": {"max_steps": 2}}}
    _, study = read_study(write(tmp_path, arms=changed))
    assert {cell.arm for cell in missing(cells_of("toy", study, tmp_path), rows)} == {"short"}
    _, study = read_study(write(tmp_path, evaluate={"loops": [1]}))
    assert len(missing(cells_of("toy", study, tmp_path), rows)) == 4


def test_the_seed_goes_into_every_field_named(tmp_path):
    _, study = read_study(
        write(tmp_path, arms={"a": {"recipe": "smoke", "overrides": {"depth": {"rate": 2}}}}, success=[])
    )
    assert flags_of(study, study.arms["a"], 12, Path("runs")) == ["--depth.rate=2", "--seed=12", "--data.seed=12"]


def test_an_arm_that_goes_on_from_another_gets_its_run_and_is_old_when_it_changes(tmp_path):
    going_on = {"recipe": "smoke", "overrides": {"init_from": "{long}/model", "distill": {"teacher": "{long}/model"}}}
    arms = PLAIN["arms"] | {"after": going_on}
    _, study = read_study(write(tmp_path, arms=arms, folder="shared"))
    assert [cell.folder for cell in cells_of("toy", study, tmp_path)][2] == tmp_path / "shared" / "after-seed10"
    teacher = json.dumps(str(tmp_path / "shared" / "long-seed11" / "model"))
    flags = flags_of(study, study.arms["after"], 11, tmp_path / "shared")
    assert flags[:2] == [f"--init_from={teacher}", f"--distill.teacher={teacher}"]
    before = digests_of(study)
    arms["long"] = {"recipe": "smoke", "overrides": {"max_steps": 3}}
    after = digests_of(read_study(write(tmp_path, arms=arms))[1])
    assert {arm for arm in before if before[arm] != after[arm]} == {"long", "after"}
    halting = digests_of(read_study(write(tmp_path, arms=arms, measure="halting"))[1])
    assert all(halting[arm] != after[arm] for arm in after)


def test_options_are_those_of_the_measurement(tmp_path):
    arms = {"only": {"recipe": "smoke"}}
    halting = {"arms": arms, "success": [], "measure": "halting", "record": "halting.jsonl"}
    check_arms(read_study(write(tmp_path, **halting, evaluate={"max_hops": 3}))[1])
    memory = {"measure": "memory", "record": "memory.jsonl", "evaluate": {"chunks": [1]}}
    check_arms(read_study(write(tmp_path, **halting | memory))[1])
    with pytest.raises(ValueError, match=r"evaluate\.hops is no option of `looped halting`"):
        check_arms(read_study(write(tmp_path, **halting, evaluate={"hops": [3]}))[1])


@pytest.mark.parametrize(("measure", "record", "evaluate", "said"), [
    ("eval", "grid.jsonl", {"loops": [4, 0]}, "--loops: must be an integer from 1 to 10000, got '0'"),
    ("eval", "grid.jsonl", {"loops": []}, "--loops: expected at least one argument"),
    ("eval", "grid.jsonl", {"limit": True}, "--limit: must be an integer from 1 to 1000000000, got 'True'"),
    ("eval", "grid.jsonl", {"max_loops": "8 loops"}, "--max-loops: must be an integer"),
    ("halting", "halting.jsonl", {"limit": None}, "--limit: must be an integer"),
    ("memory", "memory.jsonl", {"chunks": [1, -1]}, "--chunks: must be an integer from 0"),
    ("memory", "memory.jsonl", {"hops": 3}, "unknown argument '--hops'"),
])  # fmt: skip
def test_an_option_that_the_measurement_refuses_is_told_before_anything_runs(
    measure, record, evaluate, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arms = {"only": {"recipe": "smoke"}}
    write(tmp_path, arms=arms, success=[], measure=measure, record=record, evaluate=evaluate)
    with pytest.raises(SystemExit):
        main(["study", str(tmp_path / "toy.yaml")])
    told = capsys.readouterr().err
    assert told.startswith(f"looped {measure}: ")
    assert said in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("arm", "measure", "record", "files"), [
    ("smoke", "halting", "grid.jsonl", "halting.jsonl"),
    ("smoke", "eval", "halting.jsonl", "grid.jsonl, loops.jsonl"),
    ("smoke_sequence", "eval", "grid.jsonl", "grades.jsonl"),
])  # fmt: skip
def test_a_record_that_is_not_written_is_refused_before_anything_runs(arm, measure, record, files, tmp_path):
    fields = {"arms": {"only": {"recipe": arm}}, "success": [], "measure": measure, "record": record, "evaluate": {}}
    with pytest.raises(ValueError, match=rf"record {record} is no file .*: name one of {files}\."):
        check_arms(read_study(write(tmp_path, **fields))[1])


@pytest.mark.parametrize(("changes", "said"), [
    ({"table": {"columns": "grade"}}, "table.columns is 'grade'"),
    ({"table": {"columns": "hops", "value": "exact"}}, "table.value is 'exact'"),
    ({"table": {"columns": "hops", "where": {"loop": 2}}}, "`where` has the field 'loop'"),
    ({"success": [{"arm": "long", "value": "exact", "at_least": 0.5}]}, "success: value is 'exact'"),
    ({"success": [{"arm": "long", "where": {"hop": 2}, "at_least": 0.5}]}, "`where` has the field 'hop'"),
    (
        {"success": [{"arm": "long", "over": "long", "over_where": {"loop": 2}, "at_least": 0.5}]},
        "`where` has the field 'loop'",
    ),
])  # fmt: skip
def test_a_name_that_the_rows_do_not_have_is_told_with_those_they_have(changes, said, tmp_path, monkeypatch, capsys):
    """And the rows stay."""
    monkeypatch.chdir(tmp_path)
    _, study = read_study(write(tmp_path, **changes))
    text = to_json_lines(rows_of(study, {"long": {10: 0.25}, "short": {10: 0.5}}))
    Path("out").mkdir()
    Path("out/toy.jsonl").write_text(text)
    assert main(["study", "toy.yaml", "--draw", "--to", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "arm, seed, recipe, commit, loops, hops, accuracy" in error
    assert Path("out/toy.jsonl").read_text() == text


@pytest.mark.slow
def test_a_teacher_is_trained_before_its_student_and_once(tmp_path, monkeypatch):
    """Also where its own rows are there and its run is not, as on another machine."""
    monkeypatch.chdir(tmp_path)
    short = {"max_steps": 2, "check_every": 2, "checkpoint_every": 2, "optim.warmup_steps": 0}
    recipe = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text())
    Path("on.yaml").write_text(to_yaml(recipe | {"model": {}}))
    arms = {
        "teacher": {"recipe": "smoke", "overrides": short},
        "student": {"recipe": "on.yaml", "overrides": short | {"init_from": "{teacher}/model"}},
    }
    path = write(tmp_path, arms=arms, seeds=[10], success=[], folder="both")
    _, study = read_study(path)
    teacher = digests_of(study)["teacher"]
    row = {"arm": "teacher", "seed": 10, "recipe": teacher, "commit": "c0ffee", "loops": 2, "hops": 2, "accuracy": 1.0}
    Path("out").mkdir()
    Path("out/toy.jsonl").write_text(to_json_lines([row]))
    assert main(["study", str(path), "--to", "out"]) == 0
    rows = [json.loads(line) for line in Path("out/toy.jsonl").read_text().splitlines()]
    assert rows[0] == row
    assert {row["arm"] for row in rows[1:]} == {"student"}
    assert open_run("runs/both/student-seed10").recipe()["init_from"] == "runs/both/teacher-seed10/model"
    assert not Path("runs/toy").exists()


@pytest.mark.slow
def test_cells_run_once_and_a_failed_one_is_told(tmp_path, monkeypatch, capsys):
    """The second arm's batch is refused when the training begins: its recipe alone does not show that."""
    monkeypatch.chdir(tmp_path)
    short = {"max_steps": 2, "check_every": 2, "checkpoint_every": 2, "optim.warmup_steps": 0}
    arms = {
        "good": {"recipe": "smoke", "overrides": short},
        "bad": {"recipe": "smoke", "overrides": short | {"trackers": ["nobody"]}},
    }
    path = write(tmp_path, arms=arms, seeds=[10], success=[])
    assert main(["study", str(path), "--jobs", "2", "--to", "out"]) == 2
    assert "bad, seed 10" in capsys.readouterr().err
    rows = [json.loads(line) for line in Path("out/toy.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} == {"good"}
    assert {row["loops"] for row in rows} == {2}
    assert "Not run: bad seed 10." in Path("out/toy.md").read_text()
    before = Path("runs/toy/good-seed10/summary.json").stat().st_mtime_ns
    Path("toy.yaml").write_text(to_yaml(PLAIN | {"arms": {"good": arms["good"]}, "seeds": [10], "success": []}))
    assert main(["study", str(path), "--to", "out"]) == 0
    assert Path("runs/toy/good-seed10/summary.json").stat().st_mtime_ns == before


def test_a_success_may_judge_another_field_than_the_table_shows(tmp_path):
    asked = {"arm": "long", "over": "short", "value": "loss", "at_most": -1.0}
    _, study = read_study(write(tmp_path, success=[asked]))
    rows = rows_of(study, {"long": {10: 0.25, 11: 0.25}, "short": {10: 0.5, 11: 0.5}})
    rows = [row | {"loss": {"long": 1, "short": 3}[row["arm"]] * row["hops"]} for row in rows]
    said = verdict(study, study.success[0], rows)
    assert said.startswith("long, loss less loss of short: at most -1, every seed. **Met**: seeds 10: -3, 11: -3;")
    assert "| long | 2 | 0.2 | 0.2 |" in table_of(study, rows)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_pages_say_what_committed_rows_say(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, study = read_study(str(path))
    if Path(f"docs/results/{name}.jsonl").exists():
        assert check_study(name, study, Path("docs/results"), Path("runs")) == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_committed_study_can_run(path):
    _, study = read_study(str(path))
    check_arms(study)
    for arm in study.arms:
        parsed(measurement(study, arm, Path("runs")))


def test_every_block_on_a_page_is_of_a_study_that_names_the_page():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"^<!-- study ([\w.-]+) -->$", page.read_text(encoding="utf-8"), re.MULTILINE):
            _, study = read_study(str(ROOT / "studies" / f"{name}.yaml"))
            assert page.relative_to(ROOT).as_posix() in study.pages
