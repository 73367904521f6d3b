"""Laws of a run folder: nothing of the user's is lost, nothing old counts as new, nothing is half written.

A smoke run is trained once; each test works on a copy. The whole sweep of kills is `python tests/kill_sweep.py`.
"""

import json
import os
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_builders import dataset_byte_bpe
from forks import Fork
from looplab.cli import main as looped
from looplab.publish.publishing import check_measured
from looplab.runs.digests import sha256_of, weights_of
from looplab.runs.folder import Run, open_run
from looplab.runs.models import load_run_model
from looplab.runs.records import locked, owned, replaced_folder, settle
from looplab.runs.sections import defaults
from looplab.runs.seeds import SHARED, recipe_key
from looplab.runs.writing import write_whole
from looplab.runs.yaml_text import to_yaml
from looplab.tasks.hops.evaluation import evaluate_run, grid_table
from looplab.tasks.hops.records import EVALUATION, GRID
from looplab.tasks.hops.results import depth_text, markdown_table
from looplab.tasks.hops.run_figures import training_curves
from looplab.tasks.registry import TASKS, task_for
from looplab.training.recipe import Recipe, build_recipe, own_sections, read_recipe
from looplab.training.run_folder import FREE, RunFolder, files_in, read_state
from looplab.training.watch import OF_THE_HOUR
from toy_runs import reset_accelerator
from toys import ROOT, write_pages
from train import main

SMOKE, SMOKE_TEXT = ROOT / "recipes" / "smoke.yaml", ROOT / "recipes" / "smoke_text.yaml"


@pytest.fixture
def finished(trained):
    """A finished smoke run, for reading."""
    return trained("hops", "--name=run")


@pytest.fixture
def run(trained, tmp_path):
    """A finished smoke run of one's own."""
    return trained.copy(tmp_path, "hops", "--name=run")


def recipe_of(run: Path, *flags: str) -> Recipe:
    return read_recipe(SMOKE, [f"--output_dir={run.parent}", f"--name={run.name}", *flags])


def contents(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, by its bytes or its target."""
    paths = {name: folder / name for name in files_in(folder)}
    return {name: os.readlink(p) if p.is_symlink() else sha256_of(p) for name, p in paths.items()}


def rows(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_THE_HOUR} for row in found]


# Kills, and two writers


@pytest.mark.slow
def test_a_killed_run_equals_one_that_was_not_killed(tmp_path):
    """At a sample of the file events; fresh, with more steps, over an old run, and while a measurement is written."""
    sweep = Fork(ROOT / "tests" / "kill_sweep.py", "--every", "131", log=tmp_path / "printed")
    assert sweep.status() == 0, sweep.printed()[-6000:]


NAMES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "modeling_looped.py",
    "notes.md",
    "deep/thesis.tex",
    "a.py",
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    old=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["as written", "changed", "link"]), min_size=1),
    new=st.sets(st.sampled_from(NAMES[:4])),
    events=st.integers(0, 12),
)
def test_a_folder_that_is_replaced_keeps_what_is_not_ours(tmp_path_factory, old, new, events):
    """Whatever lies in it, and whenever the process ends: what is not ours, or was changed, is there in the end."""
    home = tmp_path_factory.mktemp("replaced")
    folder = home / "model"
    for name, kind in old.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if kind == "link":
            (folder / name).symlink_to(home)
        else:
            (folder / name).write_text(kind)

    def ours(path: Path) -> bool:
        return (
            owned(f"model/{path.name}") and path.parent.name.startswith("model") and path.read_text() == "as written"
        )

    real, left = {"rename": os.rename, "unlink": os.unlink}, [events]

    def counted(name):
        def event(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real[name](*arguments, **options)

        return event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", counted("rename"))
        patch.setattr(os, "unlink", counted("unlink"))
        try:
            with replaced_folder(folder, ours) as partial:
                for name in new:
                    (partial / name).write_text("new")
        except KeyboardInterrupt:
            pass
    settle(folder, ours)
    found = [(folder / name).read_text() for name in files_in(folder) if not (folder / name).is_symlink()]
    links = [name for name in files_in(folder) if (folder / name).is_symlink()]
    kept = [
        kind for name, kind in old.items() if kind == "changed" or (kind == "as written" and name not in NAMES[:4])
    ]
    assert len(links) == list(old.values()).count("link")
    assert sorted(text for text in found if text == "changed") == [k for k in sorted(kept) if k == "changed"]
    assert found.count("as written") >= kept.count("as written")
    assert [p.name for p in home.iterdir() if not p.name.endswith(".partial")] == ["model"]


def test_two_trainings_do_not_write_to_one_run(run):
    """The second is refused with the first one's process and host. That a dead one holds nothing, every kill shows."""
    before = contents(run)
    with locked(run.parent / ".run.lock", "held"):
        holder = rf"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(ValueError, match=rf"another process trains in .*run \({holder}"):
            main(recipe_of(run, "--overwrite=true"))
    assert contents(run) == before
    assert main(recipe_of(run))["steps"] == 20


def test_many_builders_of_one_tokenizer_build_it_once(tmp_path):
    """Each of them gets it, whoever was first."""
    pages = datasets.Dataset.from_dict({"text": ["some words of a text, " * 20]})
    pages.save_to_disk(tmp_path / "cache")
    train = datasets.load_from_disk(tmp_path / "cache")
    barrier, found = threading.Barrier(8), []

    def build():
        barrier.wait()
        found.append(dataset_byte_bpe(train, 270).get_vocab())

    builders = [threading.Thread(target=build) for _ in range(8)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(found) == 8
    assert all(vocab == found[0] for vocab in found)
    assert [path.name for path in (tmp_path / "cache").glob("*byte_bpe*")] == ["byte_bpe-270"]


# What is the user's


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.lr=0.5"], r"optim\.lr: 0\.001 -> 0\.5"),
        (["--max_steps=40"], "has finished, but no checkpoints"),
        ([], None),
    ],
)
def test_a_finished_run_is_protected_without_its_checkpoints(run, flags, message):
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    if message is None:
        assert main(recipe_of(run)) == json.loads((run / "summary.json").read_text())
    else:
        with pytest.raises(ValueError, match=message):
            main(recipe_of(run, *flags))
    assert contents(run) == before


@pytest.mark.parametrize(
    "gone", [["checkpoints", "model"], ["checkpoints", "summary.json"], ["checkpoints", "model", "summary.json"]]
)
def test_results_without_a_model_are_protected_too(run, gone):
    (run / "grid.jsonl").write_text("{}\n")
    for name in {"checkpoints", *gone}:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    with pytest.raises(ValueError, match=r"has results, but no checkpoints to go on from.*--overwrite true"):
        main(recipe_of(run))
    assert contents(run) == before


USERS = ("notes.md", "model/thesis.tex", "checkpoints/step-000000010/why.md", "checkpoints/best/pytorch_model.bin",
         "figures/mine.png", "samples/mine.jsonl", "mine/recipe.yaml")  # fmt: skip


def test_overwriting_keeps_what_train_did_not_write(run):
    """Files of the user's stay in their places; a file of ours that the user changed stays beside the new one."""
    for name in USERS:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"mine: {name}")
    (run / "model" / "generation_config.json").write_text('{"num_loops": 9}')
    (run / "elsewhere").symlink_to(run.parent)
    main(recipe_of(run, "--seed=3", "--overwrite=true"))
    assert all((run / name).read_text() == f"mine: {name}" for name in USERS)
    assert (run / "model" / "generation_config.json.kept").read_text() == '{"num_loops": 9}'
    assert (run / "elsewhere").readlink() == run.parent
    assert json.loads((run / "summary.json").read_text())["seed"] == 3
    assert sorted(p.name for p in run.parent.iterdir()) == [".run.lock", "run"]
    main(recipe_of(run, "--seed=3", "--max_steps=30"))  # which writes model/ again
    assert (run / "model" / "thesis.tex").read_text() == "mine: model/thesis.tex"


def test_a_folder_of_the_users_may_become_a_run_where_no_name_is_taken(tmp_path):
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "thesis.tex").write_text("mine")
    main(recipe_of(mine, "--max_steps=1"))
    assert (mine / "model" / "thesis.tex").read_text() == "mine"
    assert (mine / "model" / "config.json").is_file()


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.jsonl", "run.json", "summary.json", "model/config.json", "figures/grid.png",
             "checkpoints/step-000000001/pytorch_model.bin"]
)  # fmt: skip
def test_a_folder_that_is_no_run_is_not_written_over(tmp_path, name, overwrite):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("title: my own\n")
    with pytest.raises(ValueError, match=rf"{name} would be overwritten, and .*mine is no run of train.py"):
        main(recipe_of(tmp_path / "mine", f"--overwrite={overwrite}"))
    assert contents(tmp_path / "mine") == {name: sha256_of(path)}


@pytest.mark.parametrize("name", ["", "checkpoints", "model", "snapshots", "tokenizer", "metrics.jsonl"])
def test_nothing_is_written_through_a_link(run, tmp_path, name):
    target = tmp_path / "elsewhere"
    if os.path.lexists(run / name):
        os.rename(run / name, target)
    else:
        target.mkdir()
    before = contents(target) if target.is_dir() else sha256_of(target)
    (run / name if name else run).symlink_to(target)
    with pytest.raises(ValueError, match=r"is a link, and a run is not written through one"):
        main(recipe_of(run, "--max_steps=30"))
    assert (contents(target) if target.is_dir() else sha256_of(target)) == before


@pytest.mark.parametrize(
    "flag",
    ["--optim.lr=-1", "--model.foo=3", "--depth.minimum=9", "--data.config=none", "--model.num_attention_heads=3",
     "--curriculum.start_hops=9", "--batch_size=0", "--data.pad_to=3", "--init_from=nowhere"],
)  # fmt: skip
def test_a_recipe_that_cannot_run_overwrites_nothing(run, flag):
    before = contents(run)
    with pytest.raises((ValueError, OSError)):
        main(recipe_of(run, flag, "--overwrite=true"))
    assert contents(run) == before
    assert not (run.parent / ".run.new").exists()


# What goes on


def other_value(value):
    """Another value of the same kind."""
    if isinstance(value, list | dict):
        return [*value, 1] if isinstance(value, list) else value | {"x": 1}
    return (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in defaults(Recipe, own_sections("khop"))
        if name not in ("name", "output_dir", "overwrite", "data.overrides")
    ],
)
def test_only_budget_and_logging_may_change(finished, tmp_path, name):
    """For every field of a recipe: it is free, and said in the metrics, or the run is another one."""
    run = tmp_path / "run"
    run.mkdir()
    values = yaml.safe_load((finished / "recipe.yaml").read_text())
    *sections, leaf = name.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[leaf] = (
        [*place[leaf], 1]
        if isinstance(place[leaf], list)
        else {"x": 1}
        if name == "model"
        else other_value(place[leaf])
    )
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    folder = RunFolder(recipe_of(run), is_main=True)
    if name in FREE:
        assert list(folder.compared()) == [name]
    else:
        with pytest.raises(ValueError, match=rf"holds a run of another recipe \(.*{name}"):
            folder.compared()


def as_older_versions_wrote(recipe: dict) -> dict:
    """recipe.yaml with the fields of all tasks of that time, and `check_every` in the curriculum."""
    old = recipe | {"data": dict(recipe["data"]), "curriculum": {"check_every": recipe["check_every"]}}
    del old["check_every"]
    for name, value in SHARED.items():
        section, _, leaf = name.partition(".")
        old[section].setdefault(leaf, recipe[section].get(leaf, value))
    return old


@pytest.mark.parametrize("file", ["smoke", "smoke_text", "molecules/smoke_molecules"])
def test_a_run_of_an_older_version_has_the_same_recipe(tmp_path, file):
    """recipe.yaml had the fields of all tasks: they say nothing new, to a run that goes on and to groups of seeds."""
    recipe = read_recipe(ROOT / "recipes" / f"{file}.yaml", [f"--output_dir={tmp_path}", "--name=run"])
    values, run = recipe.resolved(), tmp_path / "run"
    keys = []
    for written in (values, as_older_versions_wrote(values) | {"seed": 2}):
        write_whole(run / "recipe.yaml", to_yaml(written))
        assert read_recipe(run / "recipe.yaml").resolved() == values | {"seed": written["seed"]}
        keys.append(recipe_key(Run(run)))
    assert keys[0] == keys[1]
    for name, value in (("max_steps", 40), ("check_every", 11)):
        folder = RunFolder(build_recipe(asdict(recipe) | {"seed": 2, name: value}), is_main=True)
        if name in FREE:
            assert folder.compared() == {"max_steps": [recipe.max_steps, 40]}
        else:
            with pytest.raises(ValueError, match=r"another recipe \(check_every: 10 -> 11\)"):
                folder.compared()


def test_a_run_of_an_older_version_goes_on(run, tmp_path):
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(as_older_versions_wrote(values)))
    main(recipe_of(run, "--max_steps=24"))
    main(recipe_of(tmp_path / "whole", "--max_steps=24"))
    assert [row for row in rows(run) if "recipe_changed" not in row] == rows(tmp_path / "whole")
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == values | {"max_steps": 24}


def test_a_run_with_a_larger_budget_goes_on_as_if_it_had_always_had_it(run, tmp_path):
    """Of 20 steps and 40, with a schedule that does not follow the budget; the metrics say where."""
    main(recipe_of(run, "--max_steps=40"))
    whole = tmp_path / "whole"
    main(recipe_of(whole, "--max_steps=40"))
    changes = [row for row in rows(run) if "recipe_changed" in row]
    assert changes == [{"step": 20, "recipe_changed": {"max_steps": [20, 40]}}]
    assert [row for row in rows(run) if row not in changes] == rows(whole)
    assert weights_of(run / "model") == weights_of(whole / "model")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["max_steps"] == 40
    before = contents(run)
    main(recipe_of(run, "--max_steps=40"))
    assert {n: d for n, d in contents(run).items() if n != "summary.json"} == {
        n: d for n, d in before.items() if n != "summary.json"
    }


def test_a_stage_that_the_last_check_passed_begins_when_the_run_goes_on(tmp_path):
    flags = ("--curriculum.threshold=0.01", "--curriculum.start_hops=2", "--curriculum.restart_optimizer=true")
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    main(recipe_of(parts, *flags, "--max_steps=10"))
    main(recipe_of(parts, *flags, "--max_steps=20"))
    main(recipe_of(whole, *flags))
    assert [row for row in rows(parts) if "recipe_changed" not in row] == rows(whole)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """text(*flags): a recipe on the pages in tmp_path/pages, which are there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = write_pages(tmp_path / "pages")
    flags = [
        f"--output_dir={tmp_path}",
        "--name=run",
        f"--data.files={files}",
        "--max_steps=2",
        "--checkpoint_every=1",
    ]
    return lambda *more: read_recipe(SMOKE_TEXT, [*flags, "--data.vocab_size=280", *more])


def test_data_that_change_are_refused_and_named(text, tmp_path):
    """Whatever changed: nothing is written, and with the files of the beginning the run goes on with its tokenizer."""
    main(text())
    run, pages = tmp_path / "run", tmp_path / "pages"
    before = contents(run)
    page = pages / "page003.txt"
    words = page.read_text()
    for change, restore, message in (
        (
            lambda: (pages / "zz.txt").write_text("A new page.\n" * 9),
            lambda: (pages / "zz.txt").unlink(),
            r"new file: zz\.txt",
        ),
        (page.unlink, lambda: page.write_text(words), r"gone file: page003\.txt"),
        (
            lambda: page.write_text(words + "\n\nmore words"),
            lambda: page.write_text(words),
            r"changed file: page003\.txt",
        ),
    ):
        change()
        with pytest.raises(ValueError, match=rf"the data of .*run have changed since it began \({message}"):
            main(text("--max_steps=4"))
        with pytest.raises(ValueError, match=r"restore the files its recipe names"):
            looped_or_raise("eval", run)
        restore()
        assert contents(run) == before
        reset_accelerator()
    shutil.rmtree(tmp_path / "cache")  # and with it the tokenizer
    assert main(text("--max_steps=4"))["steps"] == 4


def looped_or_raise(verb: str, run: Path) -> None:
    task_for(verb, [open_run(run)]).evaluate(open_run(run), limit=2)


def test_weights_that_a_run_began_with_are_those_it_goes_on_with(finished, tmp_path):
    start = Path(shutil.copytree(finished / "model", tmp_path / "start"))
    flags = (f"--init_from={start}", "--model={}", "--max_steps=1")
    run = tmp_path / "second"
    main(recipe_of(run, *flags))
    change_weights(start)
    with pytest.raises(ValueError, match=r"the weights in .*start \(init_from\) are not the ones .*second began with"):
        main(recipe_of(run, *flags[:2], "--max_steps=2"))


STATES = [
    "null", "[]", "3", "{}", '"text"', "", "{", "\x00", "[" * 100_000,
    lambda r: r | {"state": None}, lambda r: r | {"state": []},
    lambda r: r | {"sha256": {}}, lambda r: r | {"sha256": []},
    lambda r: {"state": r["state"]}, lambda r: {"sha256": r["sha256"]},
    lambda r: r | {"sha256": r["sha256"] | {"gone.bin": "0"}}, lambda r: r | {"sha256": {n: 3 for n in r["sha256"]}},
    lambda r: r | {"state": r["state"] | {"unknown": 1}}, lambda r: r | {"state": r["state"] | {"step": 19}},
    *(lambda r, name=name: r | {"state": {n: v for n, v in r["state"].items() if n != name}}
      for name in ("step", "gate")),
    *(lambda r, name=name, value=value: r | {"state": r["state"] | {name: value}}
      for name in ("stage", "step", "tokens", "seconds", "gate", "finished") for value in (None, "x", [], {"a": []})),
]  # fmt: skip


@pytest.mark.parametrize("damage", range(len(STATES)))
def test_a_state_of_another_shape_is_no_checkpoint(finished, tmp_path, damage):
    checkpoint = Path(shutil.copytree(finished / "checkpoints" / "step-000000020", tmp_path / "step-000000020"))
    assert read_state(checkpoint).step == 20
    state = checkpoint / "state.json"
    record, make = json.loads(state.read_text()), STATES[damage]
    state.write_text(make if isinstance(make, str) else json.dumps(make(record)))
    with pytest.raises(ValueError, match=r"state\.json|gone\.bin is missing|is damaged"):
        read_state(checkpoint)


def test_a_run_falls_back_behind_a_damaged_state(run, caplog):
    before = rows(run)
    (run / "checkpoints" / "step-000000020" / "state.json").write_text("null")
    main(recipe_of(run, "--checkpoint_every=4"))
    assert "step-000000020 is incomplete or corrupt" in caplog.text
    assert [row for row in rows(run) if "recipe_changed" not in row] == before
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000000016", "step-000000020"]


@pytest.mark.parametrize("line", ["3", "null", "{", '{"step": "x"}', "\x00", "[]"])
def test_lines_of_the_metrics_that_are_no_rows_are_dropped(run, line):
    before = rows(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    main(recipe_of(run))
    assert rows(run) == before


# What old measurements count for

MEASURED = {record.name: record for task in TASKS.values() for record in task.records}


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def shard_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == shard}, model / shard, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize("name", MEASURED)
def test_a_measurement_of_other_weights_is_refused(run, name):
    """Until it is measured again; in whatever files the same weights are, they are the same."""
    open_run(run).write({name: "{}\n"})
    record = MEASURED[name]
    assert open_run(run).read(record) in ({}, [{}])
    shard_weights(run / "model")
    assert open_run(run).read(record) in ({}, [{}])
    shutil.copy(run / "checkpoints" / "step-000000020" / "state.json", run / "notes")
    for path in (run / "model").glob("model-*.safetensors"):
        tensors = load_file(path)
        save_file({n: t + 1 for n, t in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{name} was made with other weights than model/ has now: run `looped {record.verb}"
    ):
        open_run(run).read(record)
    open_run(run).write({name: "{}\n"})
    assert open_run(run).read(record) in ({}, [{}])


def test_a_run_that_goes_on_leaves_its_old_measurements_behind(run):
    """Those of a run from before there were digests, too."""
    for name in ("grid.jsonl", "lens.jsonl"):
        (run / name).write_text("{}\n")
    (run / "run.json").unlink()
    assert open_run(run).read(GRID) == [{}]
    main(recipe_of(run, "--max_steps=30"))
    for name in ("grid.jsonl", "lens.jsonl"):
        with pytest.raises(ValueError, match=rf"{name} was made with other weights"):
            open_run(run).check_record(name, "measure again.")


@pytest.mark.parametrize("name", ["grid.jsonl", "figures/grid.png"])
def test_only_what_is_known_to_be_of_the_weights_is_published(run, name):
    check_measured(open_run(run))
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("{}\n")
    with pytest.raises(
        ValueError, match=rf"it is not known which weights .*{name} was made with: run `looped (eval|plot)"
    ):
        check_measured(open_run(run))


def test_a_run_from_before_there_were_digests_is_read_and_says_so_once(run, caplog):
    (run / "grid.jsonl").write_text("{}\n")
    (run / "run.json").unlink()
    for _ in range(3):
        assert open_run(run).read(GRID) == [{}]
    assert caplog.text.count("it is not known which weights") == 1
    check_measured(open_run(run))


DAMAGES = ["", "null", "[]", "3", '"x"', "{", "{}", "\x00\x01", "name: x", '{"steps": "x"}', "[" * 100_000, "\udce9"]
NAMED = ("recipe.yaml", "summary.json", "metrics.jsonl", "run.json", "records/index.json")


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A run as it was before there were digests, evaluated: whatever is in its files is read."""
    run = trained.copy(tmp_path_factory.mktemp("evaluated"), "hops", "--name=run")
    evaluate_run(open_run(run), loops=[1, 4], limit=2, max_loops=4)
    shutil.rmtree(run / "records")
    (run / "run.json").unlink()
    return run


def said_by(work) -> str:
    """'' where work goes well, or the sentence of a ValueError; another error is a failure."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def read_and_draw(run: Path) -> None:
    """What `looped table` and `looped plot` read."""
    markdown_table([open_run(run)])
    grid_table(open_run(run).read(GRID), open_run(run).read(EVALUATION)["chance"], open_run(run).trained_loops())
    depth_text(open_run(run))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMED, *MEASURED])
def test_a_damaged_record_is_named(evaluated, tmp_path, name):
    """Whatever is in it: every reader goes on without the file, or names it and says what to do."""
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    path = run / name
    path.parent.mkdir(exist_ok=True)
    for damage in DAMAGES:
        path.write_bytes(damage.encode(errors="surrogateescape"))
        reads = [Run.recipe, Run.task, Run.summary, Run.metrics, Run.trained_loops]
        reads.append(lambda run: run.read(MEASURED.get(name, GRID)))
        said = [said_by(lambda read=read: read(open_run(run))) for read in reads]
        said.append(said_by(lambda: read_and_draw(run)))
        assert all(str(run) in sentence and sentence.endswith((".", "?")) for sentence in said if sentence), said


def altered(value):
    """The value with one part of it gone or of another kind, in every way."""
    if isinstance(value, list):
        yield from ([*value[:i], new, *value[i + 1 :]] for i, item in enumerate(value[:2]) for new in altered(item))
        yield []
    if isinstance(value, dict):
        for name in value:
            yield {n: v for n, v in value.items() if n != name}
            yield from (value | {name: new} for new in altered(value[name]))
    yield from (new for new in (None, "x", [], {}, 7, True) if type(new) is not type(value))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "grid.jsonl", "loops.jsonl", "metrics.jsonl"])
def test_a_record_that_lacks_a_part_ends_in_a_sentence(evaluated, tmp_path, name):
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    path, lines = run / name, name.endswith("jsonl")
    text = path.read_text()
    values = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    read = training_curves_of if name == "metrics.jsonl" else read_and_draw
    changed = list(altered(values))
    assert len(changed) > 15
    for new in changed:
        rows = isinstance(new, list) and lines
        path.write_text("".join(json.dumps(row) + "\n" for row in new) if rows else json.dumps(new))
        said = said_by(lambda: read(run))
        assert not said or str(run) in said, said


def training_curves_of(run: Path) -> None:
    training_curves(open_run(run))


@pytest.mark.parametrize(
    "command", [["table"], ["plot"], ["publish", "--dry-run", "--repo-id", "u/n"], ["eval"], ["ask"]]
)
def test_commands_on_a_damaged_summary_end_with_two(evaluated, tmp_path, command):
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    (run / "summary.json").write_text('{"trained_loops": 3}')
    assert looped([command[0], str(run), *command[1:]]) == 2


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched", "config"])
def test_a_model_that_is_not_whole_is_loaded_nowhere(run, tmp_path, damage):
    """A tensor less, a tensor more, one of another shape, one layer more in config.json."""
    file, config = run / "model" / "model.safetensors", run / "model" / "config.json"
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if "mlp" in n)
    if damage == "config":
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"num_core_layers": 3}))
    elif damage == "unexpected":
        tensors["model.core.7.mlp.weight"] = torch.zeros(2)
    elif damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights do not fit its config\.json"):
        load_run_model(open_run(run))
    with pytest.raises(ValueError, match=r"its weights do not fit its config\.json"):
        check_measured(open_run(run))
    with pytest.raises(ValueError, match=r"init_from: the weights in .* do not fit its config\.json"):
        main(recipe_of(tmp_path / "second", f"--init_from={run / 'model'}", "--model={}"))
    assert asdict(recipe_of(tmp_path / "third"))["name"] == "third"
