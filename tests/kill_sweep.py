"""Kill a training at every file event, run the same command again, and compare with one that nobody killed.

    python tests/kill_sweep.py [--every N] [--scenario NAME]

A file event is what Python audits below the output folder: a file opened to be written, a rename, a removal, a folder
made or removed. The process ends at once before the n-th of them (`os._exit`). What must hold afterwards:

    fresh       the second command ends with the rows and weights of a run that was not killed
    longer      the same, of a finished run that goes on with twice the steps
    replaced    `--overwrite true` over a finished run of another seed: as fresh, and until the new run has a
                checkpoint the old one is whole; files of the user's are there at every moment
    measured    the files of `Run.write` are all old or all new once the run is opened again

Prints a line per scenario and each difference; the exit code is 1 if there is one.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from datasets.utils.logging import disable_progress_bar  # noqa: E402

from looplab.runs.digests import weights_of  # noqa: E402
from looplab.runs.folder import open_run  # noqa: E402
from looplab.training.watch import OF_THE_HOUR  # noqa: E402
from train import main, read_recipe  # noqa: E402

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
SMOKE = ROOT / "recipes" / "smoke.yaml"
USERS = {"notes.md": "mine", "model/thesis.tex": "mine", "checkpoints/step-000000010/why.md": "mine"}


class Killer:
    """Ends the process before the file event of that number below `folder`; counts them where there is no number."""

    def __init__(self, folder: Path, number: int | None):
        self.folder, self.number, self.count = str(folder), number, 0

    def __call__(self, event: str, arguments: tuple):
        opens = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        if (opens or event in EVENTS) and self.folder in str(arguments[0]):
            if self.count == self.number:
                os._exit(9)
            self.count += 1


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Exit status of a fork that does `work`, and what it returned or raised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            said, status = str(work()), 0
        except BaseException:
            said, status = traceback.format_exc(), 1
        os.write(writer, said.encode()[-60_000:])
        os._exit(status)
    os.close(writer)
    said = b""
    while block := os.read(reader, 65_536):
        said += block
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


def train_in(folder: Path, *flags: str) -> None:
    main(
        read_recipe(SMOKE, [f"--output_dir={folder}", "--name=run", "--checkpoint_every=8", "--snapshots=[5]", *flags])
    )


def facts(folder: Path) -> str:
    """What a training leaves, but for times: rows, weights, names of files."""
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in OF_THE_HOUR} for row in rows]
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    weights = {str(path): weights_of(run / path) for path in ("model", "snapshots/step-000000005")}
    summary = json.loads((run / "summary.json").read_text())
    kept = {name: summary[name] for name in ("steps", "tokens", "gate", "learnable_depth")}
    return json.dumps([rows, names, weights, kept])


def give_users_files(folder: Path) -> None:
    for name, text in USERS.items():
        path = folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def users_files_are_there(folder: Path) -> str:
    lost = [name for name in USERS if not any(folder.rglob(Path(name).name))]
    return f"lost {lost}" if lost else ""


def old_run_is_whole(folder: Path) -> str:
    """'' if the old run (seed 0) is there, or the new one with a checkpoint."""
    place = folder / "run" if (folder / "run").is_dir() else folder / "run.replaced"
    if (place / "recipe.yaml").read_text().count("\nseed: 7\n"):
        return "" if any(place.glob("checkpoints/step-*/state.json")) else "the new run has no checkpoint"
    whole = (place / "model" / "model.safetensors").is_file() and (place / "summary.json").is_file()
    return "" if whole and (place / "grid.jsonl").is_file() else "the old run is not whole"


def write_measurement(folder: Path, word: str) -> None:
    run = open_run(folder / "run")
    run.write({name: json.dumps({"word": word}) + "\n" for name in ("evaluation.json", "loops.jsonl", "grid.jsonl")})


def measurement(folder: Path) -> str:
    run = open_run(folder / "run")
    words = {
        json.loads((run.folder / name).read_text())["word"]
        for name in ("evaluation.json", "loops.jsonl", "grid.jsonl")
    }
    run.check_record("grid.jsonl", "measure it again.")
    return f"{words}" if len(words) == 1 else f"mixed: {words}"


SCENARIOS = {
    # name: (what is there, the command, what must hold after the kill)
    "fresh": ((), (), None),
    "longer": ((), ("--max_steps=40",), None),
    "replaced": ((), ("--seed=7", "--overwrite=true"), old_run_is_whole),
}


def sweep(name: str, every: int, offset: int = 0) -> tuple[int, int, list[str]]:
    """Events there are, events killed at, and what went wrong."""
    _, flags, law = SCENARIOS[name]
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary, "start", "runs")
        start.mkdir(parents=True)
        if name != "fresh":
            in_child(lambda: train_in(start))
        if name == "replaced":
            give_users_files(start)
            write_measurement(start, "old")

        def trial(number: int | None) -> tuple[Path, int, str]:
            folder = Path(temporary, f"at-{number}", "runs")
            shutil.copytree(start, folder)

            def work():
                killer = Killer(folder, number)
                sys.addaudithook(killer)
                train_in(folder, *flags)
                count = killer.count
                return json.dumps([count, facts(folder)])

            return folder, *in_child(work)

        _, status, said = trial(None)
        assert status == 0, said
        events, expected = json.loads(said)
        numbers = range(offset % every, events, every)
        for number in numbers:
            folder, status, said = trial(number)
            if status != 9:
                wrong.append(f"{name} at {number}: not killed but {status}: {said[-500:]}")
                continue
            if law is not None and (problem := law(folder) or users_files_are_there(folder)):
                wrong.append(f"{name} at {number}: {problem}")
            status, said = in_child(lambda folder=folder: (train_in(folder, *flags), facts(folder))[1])
            if status or said != expected:
                wrong.append(f"{name} at {number}: {said[-1500:] if status else difference(said, expected)}")
            shutil.rmtree(folder.parent)
    return events, len(numbers), wrong


def difference(said: str, expected: str) -> str:
    parts = zip(("rows", "files", "weights", "summary"), json.loads(said), json.loads(expected), strict=True)
    return "; ".join(
        f"{part}: {sorted(set(map(str, a)) ^ set(map(str, b)))[:6] if part != 'summary' else (a, b)}"
        for part, a, b in parts
        if a != b
    )


def sweep_measured() -> tuple[int, int, list[str]]:
    """As `sweep`; at every event, since no training is in it."""
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        start = Path(temporary, "start")
        in_child(lambda: train_in(start))
        write_measurement(start, "old")

        def trial(number: int | None) -> tuple[Path, int, str]:
            folder = Path(temporary, f"at-{number}")
            shutil.copytree(start, folder)

            def work():
                killer = Killer(folder, number)
                sys.addaudithook(killer)
                write_measurement(folder, "new")
                return killer.count

            return folder, *in_child(work)

        events = int(trial(None)[2])
        for number in range(events):
            folder, status, said = trial(number)
            found = measurement(folder)
            if status != 9 or found.startswith("mixed"):
                wrong.append(f"measured at {number}: {status} {said} {found}")
            write_measurement(folder, "newer")
            if measurement(folder) != "{'newer'}":
                wrong.append(f"measured at {number}: cannot be written again")
    return events, events, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only at every N-th event")
    parser.add_argument("--scenario", nargs="+", choices=[*SCENARIOS, "measured"], default=[*SCENARIOS, "measured"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    failures = []
    for scenario in arguments.scenario:
        result = sweep_measured() if scenario == "measured" else sweep(scenario, arguments.every)
        print(f"{scenario}: {result[0]} file events, killed at {result[1]}, {len(result[2])} differences", flush=True)
        failures += result[2]
    print("\n".join(failures))
    sys.exit(bool(failures))
