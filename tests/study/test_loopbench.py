"""`looped loopbench`: nothing runs twice, the page says what the rows say, and names that nobody knows are refused."""

import json
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplab.cli import main
from looplab.runs.yaml_text import to_yaml
from looplab.study import cells, loopbench, measuring
from looplab.study.cells import task_of_arm
from looplab.study.loopbench_file import architecture_named, chosen_rates, pairs_of, read_bench, task_named, tuning
from looplab.study.loopbench_page import check_bench
from looplab.study.measuring import best_loops, reached
from looplab.study.study_file import digests_of
from looplab.tasks.hops import results as hop_results
from looplab.tasks.sequence import results as sequence_results
from toy_runs import reset_accelerator
from toys import ROOT

BENCHES = sorted((ROOT / "studies/benches").glob("*.yaml"))
FEW = {"train_per_grade": 20, "validation_per_grade": 4, "test_per_grade": 4}
TINY = {
    "question": "Does it run?",
    "recipe": "loopbench",
    "tasks": {
        "khop": {
            "data": {"task": "khop", "config": "quickstart", "readout": "last"}
            | {
                "overrides": {
                    "train_hops": 2,
                    "max_hops": 3,
                    "train_per_hop": 20,
                    "gate_per_hop": 4,
                    "test_per_hop": 4,
                }
            },
        },
        "parity": {
            "data": {"task": "sequence", "generator": "parity"}
            | {"overrides": {"train_grade": 3, "far_grades": [4]} | FEW},
        },
    },
    "architectures": {
        "unrolled": {
            "overrides": {"model": {"num_core_layers": 2, "num_loops": 1}}
            | {"depth": {"kind": "fixed", "mean": 1, "minimum": None, "maximum": None}},
            "measure": {"loops": [1], "kept": []},
        },
        "plain": {},
    },
    "rates": {
        name: {"optim": {"lr": lr, "warmup_steps": 0}, "max_steps": 2, "check_every": 2, "checkpoint_every": 2}
        for name, lr in (("middle", 3e-3), ("low", 1e-3))
    },
    "seeds": [10],
    "tuned_on": [100],
    "measure": {"loops": [1, 2, 4], "kept": [6], "limit": 4, "kept_limit": 2, "halting_limit": 2},
    "success": [{"arm": "parity.plain", "over": "parity.unrolled", "at_least": 0.0}],
}


def write(folder: Path, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(TINY | changes))
    return path


class Cells:
    """Runs in this process what a bench starts in others, and may be killed before the command number `last`."""

    def __init__(self, last: int | None = None):
        self.last, self.ran = last, []

    def __call__(self, command, log: TextIO, threads: int) -> None:
        module, *arguments = command
        if len(self.ran) == self.last:
            raise KeyboardInterrupt
        reset_accelerator()
        self.ran.append((Path(log.name).name, module))
        if module == "looplab.cli":
            assert main(arguments) == 0
        else:
            assert module == measuring.__name__
            measuring.main(*arguments)

    def put(self, monkeypatch) -> None:
        """In the place of the function that starts processes."""
        for module in (cells, loopbench):
            monkeypatch.setattr(module, "run_module", self)


@pytest.mark.slow
def test_a_killed_bench_goes_on_and_runs_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    command = ["loopbench", "tiny.yaml", "--to", "out"]
    # Of khop: four rates; then training and measuring of the first cell, and the kill comes before the second.
    first, rest, again = Cells(last=6), Cells(), Cells()
    first.put(monkeypatch)
    assert main(command) == 130
    kept = Path("out/tiny.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in kept][-1] == "khop.plain.low"
    assert len(kept) == 5
    rest.put(monkeypatch)
    assert main(command) == 0
    done = [*first.ran, *rest.ran]
    assert len(done) == len(set(done)) == 4 * 2 + 2 * 4  # trainings at a rate; trainings and measurements
    rows = [json.loads(line) for line in Path("out/tiny.jsonl").read_text().splitlines()]
    assert set(kept) <= {json.dumps(row) for row in rows}
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (f"{task}.{name}{rate}", seed)
        for task in TINY["tasks"]
        for name in TINY["architectures"]
        for rate, seed in ((".middle", 100), (".low", 100), ("", 10))
    ]
    again.put(monkeypatch)
    assert main([*command, "--jobs", "2"]) == 0
    assert again.ran == []

    row = rows[-1]
    assert row["architecture"] == "plain"
    assert row["kept"].keys() <= {"6"}
    assert row["grades"].keys() == {"3", "4"}  # one and two bits have too few rows to be tested
    page = Path("out/tiny.md")
    assert "4 of 4 cells ran" in page.read_text()
    check = [*command, "--check"]
    assert main(check) == 0
    page.write_text(page.read_text().replace("4 of 4", "3 of 4"))
    assert main(check) == 2
    assert "does not say what" in capsys.readouterr().err
    # A shorter training: the rows of the rates are old, and so is the rest.
    write(tmp_path, rates={name: rate | {"max_steps": 1} for name, rate in TINY["rates"].items()})
    assert main([*command, "--draw"]) == 0
    assert "0 of 4 cells ran" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "khpo"], ["no task khpo", "khop", "parity", "reasoning_gym"]),
        (["--tasks", "reasoning_gym"], ["reasoning_gym/DATASET"]),
        (["--tasks", "smoke_text"], ["no grades"]),
        (["--architectures", "hypre"], ["no architecture hypre", "unrolled", "plain", "inject_add"]),
        (["--seeds", "100"], ["seed 100 is in tuned_on"]),
    ],
)
def test_a_wrong_name_is_refused_before_anything_runs(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    assert main(["loopbench", "tiny.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert [word for word in said if word not in error] == []
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


def test_an_unknown_bench_is_refused_with_the_names(capsys):
    assert main(["loopbench", "loopbnech", "--check"]) == 2
    assert "there are loopbench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {}}, "fill in `tasks`"),
        ({"rates": {}}, "fill in `rates`"),
        ({"seeds": [100]}, "tuned_on"),
        ({"tasks": {"a": {"recpie": 1}}}, "recpie"),
        ({"architectures": {"a/b": {}}}, "plain folder name"),
        ({"architectures": {"a": {"measure": {"lops": [1]}}}}, "lops"),
        ({"measure": {"loops": [0]}}, "loops"),
        ({"tasks": TINY["tasks"] | {"a": {"without": ["plian"]}}}, "plian"),
        ({"architectures": TINY["architectures"] | {"a": {"without": ["plain"]}}}, "architectures.a.without"),
        ({"success": [{"arm": "parity.plain"}]}, "success"),
        (
            {"tasks": {"a": {"without": ["plain"]}}, "success": [{"arm": "a.plain", "at_least": 0.5}]},
            "a.plain",
        ),
    ],
)
def test_mistakes_in_the_file(changes, said, tmp_path):
    with pytest.raises(ValueError, match=r"tiny\.yaml") as error:
        read_bench(str(write(tmp_path, **changes)))
    assert said in str(error.value)


def test_a_study_and_a_recipe_are_no_bench():
    for path in ("studies/far_hops.yaml", "recipes/smoke.yaml"):
        with pytest.raises(ValueError, match="a file of `looped loopbench` is expected"):
            read_bench(str(ROOT / path))


def test_names_beyond_the_file(tmp_path):
    _, bench = read_bench(str(write(tmp_path)))
    assert task_named(bench, "reasoning_gym/gcd").data == {"task": "sequence", "generator": "reasoning_gym/gcd"}
    quickstart = task_named(bench, "quickstart")
    assert quickstart.data["config"] == "quickstart"
    assert quickstart.overrides["curriculum"]["start_hops"] == 3
    assert architecture_named(bench, "inject_concat").overrides == {"model": {"loop_connection": "inject_concat"}}
    assert architecture_named(bench, "quickstart").overrides["model"]["sliding_window"] == 2
    study = tuning(bench, pairs_of(bench, ["reasoning_gym/gcd", "quickstart", "addition"], ["plain", "inject_concat"]))
    assert "reasoning_gym-gcd.inject_concat.low" in study.arms
    assert {task_of_arm(study, arm).name for arm in study.arms} == {"sequence", "khop"}


def test_a_task_is_run_without_the_architectures_that_it_cannot_have(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tasks = TINY["tasks"] | {"parity": TINY["tasks"]["parity"] | {"without": ["plain"]}}
    _, bench = read_bench(str(write(tmp_path, tasks=tasks, success=[])))
    assert [pair.arm for pair in pairs_of(bench, ["khop", "parity"], ["unrolled", "plain"])] == [
        "khop.unrolled", "khop.plain", "parity.unrolled"
    ]  # fmt: skip
    assert main(["loopbench", "tiny.yaml", "--tasks", "parity", "--architectures", "plain"]) == 2
    assert "name other architectures" in capsys.readouterr().err


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_every_pair_of_a_committed_bench_can_run(path):
    _, bench = read_bench(str(path))
    pairs = pairs_of(bench, bench.tasks, bench.architectures)
    study = tuning(bench, pairs)
    assert all(task_of_arm(study, f"{pair.arm}.{next(iter(bench.rates))}").has("graded") for pair in pairs)
    arms = {pair.arm for pair in pairs}
    assert {arm for asked in bench.success for arm in (asked.arm, asked.over or asked.arm)} <= arms


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_the_committed_page_says_what_the_committed_rows_say(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, bench = read_bench(str(path))
    if Path(f"docs/results/{name}.jsonl").exists():
        assert check_bench(name, bench, Path("docs/results"))


def test_the_rate_is_the_best_of_rows_that_count(tmp_path):
    _, bench = read_bench(str(write(tmp_path)))
    [pair] = pairs = pairs_of(bench, ["khop"], ["plain"])
    digests = digests_of(tuning(bench, pairs))

    def row(rate: str, right: float, **changes) -> dict:
        arm = f"{pair.arm}.{rate}"
        return {"arm": arm, "seed": 100, "recipe": digests[arm], "right": right} | changes

    middle = row("middle", 0.5)
    assert chosen_rates(bench, pairs, []) == {}
    assert chosen_rates(bench, pairs, [middle, row("low", 0.6)]) == {pair.arm: "low"}
    assert chosen_rates(bench, pairs, [row("low", 0.5), middle]) == {pair.arm: "middle"}  # the first of equals
    assert chosen_rates(bench, pairs, [middle, row("low", 0.6, recipe="old")]) == {pair.arm: "middle"}
    _, alone = read_bench(str(write(tmp_path, rates={"low": {}})))
    assert chosen_rates(alone, pairs, []) == {pair.arm: "low"}


def test_halting_is_that_of_the_best_rule_beside_the_oracle_on_solved_rows():
    """Two rules, three difficulties of which the last is not solved: on both kinds of records."""
    loops = {"kl": (2, 4, 9), "latent": (3, 5, 9)}
    chosen = [
        {"measure": "chosen", "rule": rule, "loops": count, "own_loops": own, "solvable": own < 8}
        for rule, counts in loops.items()
        for count, own in zip(counts, (1, 3, 8), strict=True)
    ]
    oracle = [{"measure": "oracle", "rule": "fixed", "loops": own, "solvable": own < 8} for own in (1, 3, 8)]
    best = [{"measure": "best", "rule": "latent", "loops": 0}]
    assert hop_results.halting_loops(chosen + best) == (4, 2)
    assert sequence_results.halting_loops(chosen + oracle + best) == (4, 2)
    assert hop_results.halting_loops(chosen) is sequence_results.halting_loops(chosen + oracle) is None


@given(st.dictionaries(st.integers(1, 30), st.floats(0, 1), min_size=1), st.floats(0, 1))
def test_reach_is_the_last_grade_before_the_first_that_fails(grades, threshold):
    grades = dict(sorted(grades.items()))
    found = reached(grades, threshold)
    good = [grade for grade in grades if all(grades[g] >= threshold for g in grades if g <= grade)]
    assert found == (max(good) if good else None)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, unique_by=lambda pair: pair[0]))
def test_the_loop_count_is_the_fewest_of_the_best(means):
    rows = [{"split": "validation", "loops": n, "grade": 1, "right": right, "trained": True} for n, right in means]
    rows += [{"split": "test", "loops": n, "grade": 1, "right": 1 - right, "trained": True} for n, right in means]
    chosen = best_loops(rows, [n for n, _ in means])
    right = dict(means)
    assert right[chosen] >= max(right.values()) - measuring.TIE
    assert all(right[n] < max(right.values()) - measuring.TIE for n in right if n < chosen)
