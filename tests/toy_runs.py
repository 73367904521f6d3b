"""Tiny runs that are trained once for all tests, and the folder that commands are tried on.

The folder of `make_toy_runs`:

hops, text, molecules, sequence   runs of two steps; all but molecules are evaluated
llama                   a dense model with its tokenizer
study.yaml              a recipe for `looped frozen`, of that model
"""

import json
import shutil
import socket
from pathlib import Path

import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import LlamaConfig, LlamaForCausalLM

import train
from data_builders.tokenizers import hop_tokenizer
from forks import Fork
from looplab.cli import main
from looplab.runs.folder import Run, open_run
from toys import ROOT, SIZES, write_pages

SHORT = ["--max_steps=2", "--check_every=2", "--checkpoint_every=2", "--optim.warmup_steps=0"]
SPLITS = "--data.overrides={document_characters: 500, validation_share: 0.1, test_share: 0.1}"
RECIPES = {
    "hops": "smoke.yaml",
    "text": "smoke_text.yaml",
    "molecules": "molecules/smoke_molecules.yaml",
    "sequence": "smoke_sequence.yaml",
}


def reset_accelerator() -> None:
    """The next run of this process chooses its precision anew, which accelerate keeps for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


class TrainedRuns:
    """`trained("text", "--seed=1")` is the folder of the smoke recipe with that flag, which is trained once.

    The text is that of the toy pages, in three splits. The folder is there to be looked at; a test that writes takes
    `trained.copy(folder, "text", "--seed=1")`, a copy below `folder`.
    """

    def __init__(self, home: Path):
        self.home, self.folders, self.times = home, {}, {}
        self.data = {
            "hops": [],
            "text": [f"--data.files={write_pages(home / 'pages')}", "--data.vocab_size=280", SPLITS],
            "molecules": [f"--data.files=[{ROOT}/docs/molecules/toys.smi]"],
            "sequence": [f"--data.files=[{ROOT}/docs/guides/reversals.jsonl]"],
        }

    def recipe(self, task: str, *flags: str) -> train.Recipe:
        return train.read_recipe(ROOT / "recipes" / RECIPES[task], [*self.data[task], *flags])

    def __call__(self, task: str, *flags: str) -> Path:
        if (task, *flags) not in self.folders:
            recipe = self.recipe(task, f"--output_dir={self.home / str(len(self.folders))}", *flags)
            train.main(recipe)
            reset_accelerator()
            self.folders[task, *flags] = Path(recipe.output_dir) / recipe.name
            self.times |= times_of(self.folders[task, *flags])
        return self.folders[task, *flags]

    def copy(self, folder: Path, task: str, *flags: str) -> Path:
        run = self(task, *flags)
        return Path(shutil.copytree(run, folder / run.name))

    def check_unchanged(self) -> None:
        """No test has written into what all of them look at."""
        now = {path: time for folder in self.folders.values() for path, time in times_of(folder).items()}
        assert now.items() ^ self.times.items() == set()


def times_of(folder: Path) -> dict[Path, int]:
    """When each file below `folder` was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def make_toy_runs(folder: Path, trained: TrainedRuns) -> None:
    """Write all of it."""
    flags = {"hops": ["--snapshots=[1]"], "text": ["--model.loop_embedding=learned", "--model.max_num_loops=4"]}
    for task in RECIPES:
        trained.copy(folder, task, f"--name={task}", *SHORT, *flags.get(task, []))
    assert main(["eval", str(folder / "hops"), "--loops", "1", "2", "--max-loops", "3"]) == 0
    assert main(["eval", str(folder / "text"), "--loops", "1", "2"]) == 0
    assert main(["eval", str(folder / "sequence"), "--loops", "1", "2"]) == 0
    write_llama(folder / "llama")
    study = {"name": "study", "model": str(folder / "llama"), "output_dir": str(folder / "studies")}
    study |= {"sweep": {"arc_easy": 4}, "confirm": {"arc_easy": 4}, "grid": [{"num_loops": 2}]}
    study |= {"cost": {"loops": [2], "prompt": 4, "new_tokens": 2, "rounds": 1}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))


def write_llama(folder: Path) -> None:
    """A dense Llama of six layers and a tokenizer."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_core_layers", "num_loops")}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6)).save_pretrained(folder)
    hop_tokenizer(num_entities=20, num_relations=4).save_pretrained(folder)


def written_run(folder: Path, recipe: dict, **files: dict | list[dict]) -> Run:
    """A run that nobody trained: `summary={..}` becomes its summary.json, and `grid=[{..}, ..]` its grid.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, content in files.items():
        if isinstance(content, dict):
            (folder / f"{name}.json").write_text(json.dumps(content))
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return open_run(folder)


def edit_json(path: Path, **fields) -> None:
    """Put fields over those of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rows_of(path: Path) -> list[dict]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(run: Path, key: str = "loss") -> list[tuple]:
    """(step, value) of the rows of metrics.jsonl that have `key`."""
    return [(row["step"], row[key]) for row in rows_of(run / "metrics.jsonl") if key in row]


def failure(capfd, *arguments) -> str:
    """What a failing `looped` command says, without progress bars; it must be one line."""
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("looped "))
    return line


def launch_environment(file: Path, *flags: str) -> dict[str, str]:
    """What `accelerate launch --config_file FILE FLAGS` puts into the environment of its processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(file), *flags, "train.py"])
    # A misspelt field of fsdp_config would be set and never read.
    assert set(yaml.safe_load(file.read_text()).get("fsdp_config", {})) <= set(vars(arguments))
    return prepare_multi_gpu_env(_validate_launch_command(arguments)[0])


def sharded(*flags: str, **more: str) -> dict[str, str]:
    """The environment of processes that recipes/accelerate/fsdp2.yaml and flags start, with `more` put over it."""
    environment = launch_environment(ROOT / "recipes" / "accelerate" / "fsdp2.yaml", *flags)
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    kept = {name: value for name, value in environment.items() if name.startswith(prefixes)}
    return kept | more


def processes(number: int, folder: Path, script: Path, *arguments: str, **environment: str) -> list[Fork]:
    """A script in so many processes on CPUs, which speak over gloo at a port that is free.

    folder: gets what each of them prints.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"} | environment
    ranks = map(str, range(number))
    return [
        Fork(script, *arguments, log=folder / f"rank-{rank}.log", RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in ranks
    ]


def ended(forks: list[Fork], *statuses: int) -> list[Fork]:
    """`forks` once they have ended; all with success, unless `statuses` says otherwise."""
    assert [fork.status() for fork in forks] == list(statuses or [0] * len(forks)), "\n".join(
        fork.printed()[-2000:] for fork in forks
    )
    return forks


def train_in(number: int, folder: Path, recipe: str, *flags: str, **environment: str) -> list[Fork]:
    """train.py in so many processes, see `processes`."""
    return processes(number, folder, ROOT / "train.py", str(ROOT / "recipes" / recipe), *flags, **environment)


def train_in_two(folder: Path, recipe: str, *flags: str, **environment: str) -> None:
    """train.py in two processes, which must succeed."""
    ended(train_in(2, folder, recipe, *flags, **environment))
