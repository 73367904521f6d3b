"""A run folder that was moved: every verb that reads the run works in its new place, or says what to pass."""

import json
import shutil
from pathlib import Path

import pytest

from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.tasks import data as task_data
from looplab.tasks.molecules.evaluation import evaluate_run
from looplab.tasks.molecules.sizes import Sizes
from looplab.tasks.registry import TASKS
from looplab.train import main as train
from looplab.training.recipe import read_recipe
from toy_runs import RECIPES, SPLITS, edit_json, failure, reset_accelerator, rows_of
from toys import ROOT, write_pages

pytestmark = pytest.mark.slow
SHORT = ["--name=run", "--max_steps=2", "--check_every=2", "--checkpoint_every=2", "--optim.warmup_steps=0"]
TEXT = [SPLITS, "--data.vocab_size=280", "--data.sequence_length=64"]
FLAGS = {
    "hops": [],
    "text": ["--data.files=[pages/*.txt]", *TEXT],
    "rows": ["--data.files=null", "--data.overrides={dataset: {path: saved, split: train}, validation_split: dev, "
             "document_characters: 500, test_share: 0.1}", *TEXT[1:]],
    "molecules": ["--data.files=[toys.smi]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """began(kind): (a run that was trained in a folder with its data, by relative names; its recipe's flags)."""
    runs, home = {}, tmp_path_factory.mktemp("began")

    def begin(kind: str) -> Path:
        if kind not in runs:
            folder = home / kind
            with pytest.MonkeyPatch.context() as patch:
                write_data(kind, folder)
                patch.chdir(folder)
                train(read_recipe(recipe_of(kind), [*FLAGS[kind], *SHORT]))
                reset_accelerator()
            runs[kind] = folder
        return runs[kind]

    return begin


def recipe_of(kind: str) -> Path:
    return ROOT / "recipes" / RECIPES["text" if kind == "rows" else kind]


def write_data(kind: str, folder: Path) -> None:
    import datasets

    folder.mkdir()
    shutil.copy(ROOT / "docs" / "molecules" / "toys.smi", folder)
    write_pages(folder / "pages")
    if kind == "rows":
        texts = [path.read_text() for path in sorted((folder / "pages").iterdir())]
        splits = {"train": texts[:30], "dev": texts[28:]}
        saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": t}) for name, t in splits.items()})
        saved.save_to_disk(folder / "saved")


@pytest.fixture
def moved(began, tmp_path, monkeypatch):
    """moved(kind): the run in another folder; the one where it was trained is gone, its data and caches with it."""
    import datasets

    def move(kind: str) -> Path:
        run = Path(shutil.copytree(began(kind) / "runs" / "run", tmp_path / "there" / "run"))
        edit_json(run / "run.json", folder=str(tmp_path / "gone"))
        (tmp_path / "cwd").mkdir()
        (tmp_path / "cwd" / "toys.smi").write_text("CCO\n")  # of the same name, and other data
        write_pages(tmp_path / "cwd" / "pages", pages=3, seed=5)
        monkeypatch.chdir(tmp_path / "cwd")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        return run

    return move


def call(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0
    reset_accelerator()


COMMANDS = {
    "eval": ["--limit", "4", "--loops", "1", "2"],
    "table": [],
    "plot": [],
    "ask": [],
    "memory": ["--chunks", "0", "--limit", "2"],
    "quantize": ["--calibration-rows", "4"],
    "publish": ["--repo-id", "user/name", "--dataset", "--dataset-license", "mit", "--dry-run"],
}


# These take long, and read the data as `eval` does.
UNASKED = {("hops", "memory"), ("rows", "memory"), ("molecules", "eval")}


@pytest.mark.parametrize("kind", ["hops", "text", "rows", "molecules"])
def test_every_verb_works_where_a_run_was_moved(moved, kind, capfd):
    """From any folder, without the data; then the run goes on there with the losses it would have had."""
    run = moved(kind)
    task = TASKS[open_run(run).task()]
    if kind == "molecules":
        evaluate_run(open_run(run), limit=4, loops=[1], sizes=Sizes(batch=4, max_tokens=8, reference=0))
    for verb, options in COMMANDS.items():
        if task.options(verb) is not None and (kind, verb) not in UNASKED:
            call(verb, run, *options, *(["--max-loops", "2"] if (kind, verb) == ("hops", "eval") else []))
    before = rows_of(run / "metrics.jsonl")
    call("train", run, "--max_steps", "4")
    after = rows_of(run / "metrics.jsonl")
    assert after[: len(before)] == before
    assert after[-1]["step"] == 4
    assert open_run(run).recipe()["data"] == read_recipe(run).resolved()["data"]
    capfd.readouterr()


def test_a_run_that_goes_on_elsewhere_equals_one_that_stayed(began, moved):
    run, home = moved("text"), began("text")
    call("train", run, "--max_steps", "4")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        stayed = Path(shutil.copytree(home / "runs" / "run", home / "stayed" / "run"))
        call("train", recipe_of("text"), *FLAGS["text"], *SHORT, "--max_steps=4", "--output_dir=stayed")
    losses = [[row["loss"] for row in rows_of(each / "metrics.jsonl") if "loss" in row] for each in (run, stayed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
