"""Kill one of two sharded processes at a random moment, run the same command again, and compare with a run that nobody
killed.

    python tests/kill_ranks.py [--kills N] [--seed SEED]

kill -9 hits rank 0 or rank 1 of `recipes/smoke.yaml` under recipes/accelerate/fsdp2.yaml, on CPUs, while it begins,
trains, or writes a checkpoint in the background, every third update. The other process ends because its peer is gone,
or is killed after PATIENCE seconds, as torchrun does. Afterwards the same command ends with the rows and the weights
of the run that was not killed. Prints each difference; the exit code is 1 if there is one.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from kill_sweep import difference, facts
from toy_runs import ended, processes, sharded
from toys import ROOT

PATIENCE = 30.0
FLAGS = (
    str(ROOT / "recipes" / "smoke.yaml"), "--name=run", "--checkpoint_every=3", "--snapshots=[5]",
    "--model.residual_dropout=0.2",
)  # fmt: skip


def train(folder: Path) -> list:
    return processes(2, folder, ROOT / "train.py", *FLAGS, f"--output_dir={folder}", **sharded())


def killed(folder: Path, draw: random.Random, longest: float) -> tuple[str, int]:
    """Train, and kill one process at a moment of [0, longest) seconds. Returns what was hit, and the rows by then."""
    forks, victim, moment = train(folder), draw.randrange(2), draw.uniform(0, longest)
    time.sleep(moment)
    forks[victim].process.kill()
    until = time.monotonic() + PATIENCE
    for fork in forks:
        fork.process.join(max(0.0, until - time.monotonic()))
        fork.process.kill()
        fork.process.join()
    metrics = folder / "run" / "metrics.jsonl"
    rows = metrics.read_text().count("\n") if metrics.exists() else 0
    return f"rank {victim} after {moment:.2f} s", rows


def sweep(kills: int, seed: int) -> tuple[list[int], list[str]]:
    """Rows that were written before each kill, and what went wrong."""
    draw, rows, wrong = random.Random(seed), [], []
    with tempfile.TemporaryDirectory() as temporary:
        for whole in (Path(temporary, "first"), Path(temporary, "whole")):  # the first waits for imports, too
            whole.mkdir()
            began = time.monotonic()
            ended(train(whole))
            longest = time.monotonic() - began
        expected = facts(whole)
        for number in range(kills):
            folder = Path(temporary, f"kill-{number}")
            folder.mkdir()
            said, so_far = killed(folder, draw, longest)
            rows.append(so_far)
            try:
                ended(train(folder))
                found = facts(folder)
            except (AssertionError, OSError, ValueError) as error:
                wrong.append(f"{said}: {error}")
                continue
            if found != expected:
                wrong.append(f"{said}: {difference(found, expected)}")
            shutil.rmtree(folder)
            print(f"{number + 1} of {kills}: {said}, {so_far} rows, {len(wrong)} differences so far", flush=True)
    return rows, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before, failures = sweep(arguments.kills, arguments.seed)
    print(f"{len(before)} kills, after {json.dumps(sorted(before))} rows, {len(failures)} differences")
    print("\n".join(failures))
    sys.exit(bool(failures))
