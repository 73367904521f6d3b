"""The command line, on a run that train.py made: every command runs, and a user's mistake is one sentence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from looplab.cli import main
from looplab.instruments.halting_settings import setting_of
from looplab.runs.folder import Run, open_run
from looplab.tasks.hops.records import HALTING
from toy_runs import failure
from toys import ROOT

COMMANDS = ("eval", "halting", "plot", "table", "ask", "demo", "bench", "quantize", "publish", "memory")


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The smoke recipe, trained for 20 steps and evaluated."""
    run = trained.copy(tmp_path_factory.mktemp("runs"), "hops")
    assert main(["eval", str(run), "--loops", "1", "2", "5", "--max-loops", "6"]) == 0
    return run


@pytest.fixture
def run(evaluated, tmp_path):
    """A copy of that run to break."""
    return Path(shutil.copytree(evaluated, tmp_path / "smoke"))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_shown_without_importing_anything_heavy(command):
    program = (
        "import sys\n"
        "from looplab.cli import main\n"
        "try:\n"
        f"    main([*{command.split()!r}, '--help'])\n"
        "except SystemExit as end:\n"
        "    assert not {'torch', 'transformers', 'datasets', 'evaluate', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "    raise\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: looped {command}".strip())
    if not command:
        assert all(name in done.stdout for name in COMMANDS)


def test_eval_writes_the_grid(evaluated):
    rows = [json.loads(line) for line in (evaluated / "grid.jsonl").read_text().splitlines()]
    assert {row["loops"] for row in rows} == {1, 2, 5}
    assert {row["hops"] for row in rows if row["split_kind"] == "ood"} == {4, 5, 6, 7, 8}
    trained_hops = json.loads((evaluated / "summary.json").read_text())["trained_hops"]
    assert all(row["trained"] == (row["hops"] in trained_hops) for row in rows)
    assert json.loads((evaluated / "evaluation.json").read_text()) == {"chance": 1 / 8, "limit": None}
    assert not list(evaluated.glob("*.tmp"))


def test_eval_follows_held_out_rows_over_every_loop(evaluated):
    rows = [json.loads(line) for line in (evaluated / "loops.jsonl").read_text().splitlines()]
    grid = {
        (row["split_kind"], row["hops"], row["loops"]): row["accuracy"]
        for row in map(json.loads, (evaluated / "grid.jsonl").read_text().splitlines())
    }
    for split in ("validation", "test"):
        cells = {(row["hops"], row["loops"]) for row in rows if row["split"] == split}
        assert cells == {(hops, loops) for hops in range(2, 9) for loops in range(1, 7)}
    for row in rows:
        if row["split"] == "test" and row["loops"] in (1, 2, 5):
            assert row["accuracy"] == pytest.approx(grid[row["split_kind"], row["hops"], row["loops"]])


def test_eval_prints_the_grid_and_keeps_to_the_limit(run, capsys):
    assert main(["eval", str(run), "--loops", "2", "--limit", "3"]) == 0
    assert "Accuracy in % (chance 12.5)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "grid.jsonl").read_text().splitlines()]
    assert {row["n"] for row in rows} == {3}


def test_a_failed_eval_leaves_the_old_grid(run, capfd):
    before = (run / "grid.jsonl").read_text()
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "are damaged" in failure(capfd, "eval", run)
    assert (run / "grid.jsonl").read_text() == before


def test_plot_prints_the_paths_it_wrote(run, capsys):
    assert main(["plot", str(run)]) == 0
    paths = capsys.readouterr().out.split()
    assert paths == [str(run / "figures" / f"{name}.png") for name in ("grid", "training", "hops", "loops")]
    assert all(Path(path).stat().st_size > 10_000 for path in paths)


def test_table_prints_a_markdown_line_per_recipe(run, capsys):
    assert main(["table", str(run)]) == 0
    header, rule, line = capsys.readouterr().out.splitlines()
    assert header.startswith("| runs | seeds | learnable depth | loops | hops >= 60 % |")
    assert set(rule) == set("|- ")
    assert line.startswith("| smoke | 1 |")


def test_halting_says_so_where_a_run_solves_nothing(run, capfd):
    assert "reaches 60 % at no hop count" in failure(capfd, "halting", run, "--max-loops", "2", "--limit", "40")
    assert not (run / "halting.jsonl").exists()


def test_save_keeps_the_best_rule_or_refuses(run, capfd):
    saved, statuses = run / "model" / "generation_config.json", []
    for hops in (4, 8):
        before, weights = saved.read_text(), open_run(run).weights
        status = main(["halting", str(run), "--max-loops", "6", "--max-hops", str(hops), "--limit", "1", "--save"])
        printed = capfd.readouterr()
        best = [row for row in open_run(run).read(HALTING) if row["measure"] == "best"]
        statuses.append(status)
        if status:
            assert best == []
            assert f"no halting rule is saved for {run}: none loses at most a point" in printed.err
            assert saved.read_text() == before
            continue
        [rule] = [setting_of(row).halting for row in best]
        assert json.loads(saved.read_text()) == json.loads(before) | {"calibrated_halting": rule}
        assert str(rule) in printed.out
        assert "the rule with the fewest loops that loses at most a point" in printed.out
        assert Run(run).weights == weights
        Run(run).check_record("grid.jsonl", "", strict=True)
    assert statuses == [0, 2]


def test_ask_shows_the_true_chain_and_an_answer_per_loop_count(evaluated, capsys):
    assert main(["ask", str(evaluated), "e3 r1 r0", "--loops", "1", "4"]) == 0
    question, chain, header, *answers = capsys.readouterr().out.splitlines()
    assert question == "question  e3 r1 r0"
    assert chain.startswith("chain     e3 -r1-> e")
    assert chain.endswith("(2 hops)")
    assert header.split() == ["loops", "answer", "probability"]
    assert [line.split()[0] for line in answers] == ["1", "4"]
    assert all(0 < float(line.split()[2]) <= 100 for line in answers)


def test_ask_without_a_question_takes_one_hop_beyond_the_training(evaluated, capsys):
    assert main(["ask", str(evaluated), "--loops", "2"]) == 0
    trained_hops = json.loads((evaluated / "summary.json").read_text())["trained_hops"]
    assert f"({max(trained_hops) + 1} hops)" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_writes_every_kind_of_row(evaluated, tmp_path, capsys):
    assert main(["bench", "--quick", "--contexts", "6", "--memory-loops", "2", "--output", str(tmp_path)]) == 0
    assert "gated KV trained in chunks" in capsys.readouterr().out
    assert main(["bench", "--quick", "--no-compile", "--output", str(tmp_path), "--run", str(evaluated)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert {row["measure"] for row in rows} == {"training", "decode", "kv_bytes", "hyper", "speculation", "halting"}
    assert all(row["machine"] and row["threads"] == 1 and row["matmul_peak_gflops"] > 0 for row in rows)
    for row in rows:
        if row["measure"] in ("training", "decode", "hyper", "speculation"):
            assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        if row["measure"] == "halting":
            assert row["fixed_layer_calls"] == row["rows"] * row["loops"]  # one core layer
            assert row["layer_calls"] == pytest.approx(row["rows"] * row["loops_used"])
    table = capsys.readouterr().out
    words = ("GFLOP/s", "tokens/s", "bytes/token", "gated streams", "all accepted", "calls saved")
    assert all(word in table for word in words)


def test_an_unknown_run_is_one_sentence_with_the_nearest_name(evaluated, capfd):
    for command in ("eval", "halting", "plot", "table"):
        wrong = evaluated.parent / "smokee"
        expected = f"looped {command}: there is no run folder {wrong}; did you mean {evaluated}?"
        assert failure(capfd, command, wrong) == expected
    assert "no run folder" in failure(capfd, "ask", "nowhere/at-all", "e1 r1")
    assert "no run folder" in failure(capfd, "bench", "--quick", "--run", "nowhere")


@pytest.mark.parametrize(
    ("missing", "command", "message"),
    [
        ("recipe.yaml", "eval", "is not a run folder: it has no recipe.yaml"),
        ("summary.json", "eval", "has no summary.json: the training has not finished"),
        ("model/config.json", "eval", "has no model/config.json: the training has not finished"),
        ("grid.jsonl", "plot", "has no grid.jsonl: run `looped eval"),
        ("metrics.jsonl", "plot", "has no metrics.jsonl: nothing was trained here"),
    ],
)
def test_a_missing_file_names_the_command_that_makes_it(run, capfd, missing, command, message):
    (run / missing).unlink()
    assert message in failure(capfd, command, run)


def test_a_half_written_file_is_named(run, capfd):
    (run / "summary.json").write_text('{"trained_hops": [1, ')
    assert f"{run / 'summary.json'} cannot be read" in failure(capfd, "eval", run)


def test_an_unknown_word_in_a_question_is_named_with_examples(evaluated, capfd):
    message = failure(capfd, "ask", evaluated, "e3 r99")
    assert "unknown words ['r99']" in message
    assert "questions look like: e" in message


def test_a_loop_count_below_one_is_refused_before_any_work(evaluated, capfd):
    with pytest.raises(SystemExit) as end:
        main(["eval", str(evaluated), "--loops", "0"])
    assert end.value.code == 2
    assert "must be an integer from 1 to 10000, got '0'" in capfd.readouterr().err
