"""A run folder that was moved: every verb that reads the run works in its new place, or says what to pass."""

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


FILES = {"text": "pages/*.txt", "molecules": "toys.smi", "rows": None}


@pytest.mark.parametrize("kind", ["text", "rows", "molecules"])
def test_a_run_without_its_data_says_what_to_pass(began, moved, kind, capfd, monkeypatch):
    """Where the data are too large to be kept. What is passed is compared; other data are named."""
    run, home = moved(kind), began(kind)
    shutil.rmtree(run / "data")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    shutil.rmtree("pages")
    Path("toys.smi").unlink()
    verb = ["eval", run, "--limit", "4", "--loops", "1"]
    said = failure(capfd, *verb)
    assert f"the data of {run} are not on this machine, and it keeps no copy of them" in said
    assert "--data.files FILE [FILE ...], or by --data.overrides" in said
    with pytest.raises(ValueError, match=r"Say where they are by --data\.files"):
        train(read_recipe(run, ["--max_steps=4"]))
    reset_accelerator()
    if kind == "rows":
        now, fields = f"{{dataset: {{path: {home}/saved}}}}", "--data.overrides"
        flag = f"--data.overrides.dataset.path={home}/saved"
    else:
        now, fields = f"{home}/{FILES[kind]}", "--data.files"
        flag = f"--data.files=[{now}]"
    if kind != "molecules":
        call(*verb, fields, now)
    train(read_recipe(run, [flag, "--max_steps=4"]))
    reset_accelerator()
    [change] = [row["recipe_changed"] for row in rows_of(run / "metrics.jsonl") if "recipe_changed" in row]
    assert {name.partition(".")[0] for name in change} == {"data", "max_steps"}
    shutil.rmtree(run / "data")
    again = open_run(run)  # which knows the new place
    again.check_data(TASKS[again.task()].Data.of(again).splits_of(again))


def test_other_files_under_the_new_name_are_refused_by_name(began, moved, tmp_path, capfd):
    run = moved("text")
    pages = Path(shutil.copytree(began("text") / "pages", tmp_path / "elsewhere"))
    (pages / "page003.txt").write_text("Something else.\n" * 9)
    assert "changed file: page003.txt" in failure(capfd, "quantize", run, "--data.files", pages / "*.txt")
    with pytest.raises(ValueError, match=r"changed file: page003\.txt"):
        train(read_recipe(run, [f"--data.files=[{pages}/*.txt]", "--max_steps=4"]))


def test_a_run_on_this_machine_reads_its_files_from_any_folder_and_sees_a_change(began, tmp_path, monkeypatch, capfd):
    """The copy takes the place of files that are gone, not of files that have changed."""
    home = Path(shutil.copytree(began("text"), tmp_path / "home"))
    run = home / "runs" / "run"
    edit_json(run / "run.json", folder=str(home))
    shutil.rmtree(run / "data")
    monkeypatch.chdir(tmp_path)
    call("eval", run, "--limit", "4", "--loops", "1")
    shutil.copytree(began("text") / "runs" / "run" / "data", run / "data")
    (home / "pages" / "new.txt").write_text("One more page.\n" * 40)
    assert "restore the files its recipe names" in failure(capfd, "eval", run)
    with pytest.raises(ValueError, match=r"new file: new\.txt"):
        train(read_recipe(run, ["--max_steps=4"]))


def test_only_small_data_of_files_are_kept_and_a_damaged_copy_is_named(began, moved, tmp_path, monkeypatch, capfd):
    assert {path.name for path in (began("text") / "runs" / "run" / "data").iterdir()} == {
        "train.parquet", "validation.parquet", "test.parquet",
    }  # fmt: skip
    assert not (began("hops") / "runs" / "run" / "data").exists()
    run = moved("text")
    (run / "data" / "test.parquet").write_bytes(b"PAR1")
    assert f"{run}/data is damaged" in failure(capfd, "eval", run)
    monkeypatch.setattr(task_data, "KEPT_BYTES", 1000)
    monkeypatch.chdir(began("text"))
    train(read_recipe(recipe_of("text"), [*FLAGS["text"], *SHORT, f"--output_dir={tmp_path}", "--name=large"]))
    assert not (tmp_path / "large" / "data").exists()


def test_a_moved_run_names_no_folder_of_the_machine_it_comes_from(began, moved, capfd):
    """Nor does what is published of it; nor are its data published without --dataset."""
    from looplab.publish.publishing import model_upload
    from looplab.tasks.card import Names

    run = began("text") / "runs" / "run"
    assert str(began("text")) not in (run / "recipe.yaml").read_text()
    moved_run = moved("text")
    edit_json(moved_run / "run.json", folder="/home/moved-from")
    call("eval", moved_run, "--limit", "4", "--loops", "1")
    files = model_upload(open_run(moved_run), Names("user/name", "mit")).files
    texts = {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in files.items()}
    assert "run/run.json" in texts
    assert [path for path, text in texts.items() if b"moved-from" in text] == []
    assert not any("parquet" in path for path in texts)
