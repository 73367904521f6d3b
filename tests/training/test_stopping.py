"""A run that its scheduler ends saves at once and says so by its exit status; the same command goes on."""

import os
import signal

import pytest
from kill_ranks import sweep

from forks import Fork
from looplab.training.stopping import REQUEUE, listening
from toy_runs import ended, measured, sharded, train_in
from toys import ROOT
from train import main

LONG = ["--max_steps=150", "--checkpoint_every=400", "--check_every=400", "--model.residual_dropout=0.2"]


def steps_saved(run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def wait_for_rows(forks: list[Fork], run, number: int) -> None:
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < number:
        assert all(fork.process.is_alive() for fork in forks), forks[0].printed()
        forks[0].process.join(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_the_first_signal_asks_and_the_second_ends(number):
    before = signal.getsignal(number)
    with listening() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.is_set()
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not(number, hops, tmp_path):
    command = [
        ROOT / "train.py",
        str(ROOT / "recipes" / "smoke.yaml"),
        f"--output_dir={tmp_path}",
        "--name=run",
        *LONG,
    ]
    fork = Fork(*map(str, command), log=tmp_path / "printed")
    wait_for_rows([fork], tmp_path / "run", 8)
    os.kill(fork.process.pid, number)
    ended([fork], REQUEUE)
    (step,) = steps_saved(tmp_path / "run")
    assert 8 <= step < 150
    assert f"saved after {step} steps" in fork.printed()
    assert not (tmp_path / "run" / "model").exists()
    main(hops("run", *LONG))
    main(hops("whole", *LONG))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


@pytest.mark.slow
def test_all_sharded_processes_stop_at_the_update_where_one_is_asked(tmp_path):
    flags = [f"--output_dir={tmp_path}", *LONG, "--max_steps=40"]
    forks = train_in(2, tmp_path, "smoke.yaml", "--name=run", *flags, **sharded())
    wait_for_rows(forks, tmp_path / "run", 5)
    os.kill(forks[1].process.pid, signal.SIGUSR1)
    ended(forks, REQUEUE, REQUEUE)
    assert len(steps_saved(tmp_path / "run")) == 1
    for name in ("run", "whole"):
        ended(train_in(2, tmp_path, "smoke.yaml", f"--name={name}", *flags, **sharded()))
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


def test_checkpoints_by_the_clock_change_nothing_else(hops, tmp_path):
    """And as many are kept as the recipe says."""
    main(hops("clock", "--checkpoint_every=20", "--checkpoint_seconds=1e-9", "--keep_checkpoints=3"))
    main(hops("bare", "--checkpoint_every=20", "--save_total_limit=1"))
    assert len(steps_saved(tmp_path / "clock")) == 3  # the clock is read one update late
    assert steps_saved(tmp_path / "bare") == [20]
    assert measured(tmp_path / "clock") == measured(tmp_path / "bare")


RESTARTED = """
import os, signal, sys, threading, time
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
import train

def work(recipe, flags, metrics):
    print("restarts:", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        def end():
            while not Path(metrics).exists() or Path(metrics).read_text().count("\\n") < 9:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=end, daemon=True).start()
    train.main(train.read_recipe(recipe, flags))

torchrun = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="fork", rdzv_backend="c10d",
    rdzv_endpoint="localhost:0", run_id="toy", monitor_interval=0.1,
)
recipe, metrics, *flags = sys.argv[1:]
elastic_launch(torchrun, work)(recipe, flags, metrics)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_process_was_killed(tmp_path):
    """`torchrun --max-restarts 1`, whose processes are forks: they need not import transformers."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    flags = [f"--output_dir={tmp_path}", "--checkpoint_every=4"]
    metrics = str(tmp_path / "killed" / "metrics.jsonl")
    recipe = str(ROOT / "recipes" / "smoke.yaml")
    environment = sharded(ACCELERATE_USE_CPU="true", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    launch = Fork(script, recipe, metrics, *flags, "--name=killed", log=tmp_path / "printed", **environment)
    ended([launch])
    assert "restarts: 1" in launch.printed()
    ended(train_in(2, tmp_path, "smoke.yaml", *flags, "--name=whole", **sharded()))
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing():
    """The whole sweep is `python tests/kill_ranks.py`."""
    rows, wrong = sweep(kills=2, seed=4)
    assert len(rows) == 2
    assert wrong == []
