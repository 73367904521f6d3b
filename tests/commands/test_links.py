"""A link in the place of what a command writes is not followed: what lies behind it stays as it is."""

import json
import shutil
from pathlib import Path

import pytest

from command_lines import VERBS
from looplab.cli import main
from looplab.tasks.molecules.sizes import Sizes
from looplab.tasks.molecules.task import MoleculeTask
from looplab.tasks.registry import TASKS
from toy_runs import edit_json

# What is written, by verb: the command line, with {here} for a folder that holds copies of the toy runs.
WRITING = {
    "eval": [
        "eval {here}/hops --limit 1 --loops 1 --max-loops 1",
        "eval {here}/text --limit 1 --loops 1",
        "eval {here}/molecules --limit 4 --loops 1",
    ],
    "memory": ["memory {here}/text --limit 1"],
    "dynamics": ["dynamics {here}/text --limit 1 --loops 2"],
    "lens": ["lens {here}/hops --limit 4 --loops 1 --snapshot all"],
    "plot": ["plot {here}/hops", "plot {here}/molecules --output {here}/drawn", "plot {here}/text {here}/text2"],
    "quantize": ["quantize {here}/text --calibration-rows 1"],
    "frozen": ["frozen {here}/study.yaml --stages cost"],
    "bench": ["bench --quick --no-compile --output {here}/bench"],
    "convert": ["convert {here}/llama {here}/looped"],
    "tokenize": [
        "tokenize {here}/text/data/test.parquet --tokenizer {here}/text/model --held-out-documents 1 --processes 1 "
        "--to {here}/tokens"
    ],
    "export": ["export {here}/hops --to gguf", "export {here}/hops --to mlx"],
}
# halting, harness, study and loopbench write single files, by the same function; fetch a folder that must not exist,
# as convert does; what train writes is looked at in tests/training/test_run_folder.py.
OTHERS = {"train", "recipes", "table", "ask", "demo", "publish", "serve", "halting", "harness", "fetch"}
OTHERS |= {"study", "loopbench", "plan", "phi"}
AGAIN = {"convert", "export"}  # what needs its output gone before it runs again


def test_every_command_is_looked_at():
    assert set(WRITING) | OTHERS == set(VERBS)


@pytest.fixture
def here(toy_runs, tmp_path, monkeypatch):
    for name in ("hops", "text", "molecules", "llama"):
        shutil.copytree(toy_runs / name, tmp_path / "here" / name, symlinks=True)
    shutil.copytree(toy_runs / "text", tmp_path / "here" / "text2")
    study = (toy_runs / "study.yaml").read_text().replace(str(toy_runs), str(tmp_path / "here"))
    (tmp_path / "here" / "study.yaml").write_text(study)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(TASKS, "molecules", MoleculeTask(Sizes(batch=4, max_tokens=8, reference=0)))
    return tmp_path / "here"


def stamps(folder: Path) -> dict[Path, tuple]:
    return {
        path: (path.is_dir(), path.lstat().st_ino, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when bench measures
@pytest.mark.parametrize("line", [line for lines in WRITING.values() for line in lines])
def test_a_link_is_not_followed(here, tmp_path, line):
    before = stamps(here)
    assert main(line.format(here=here).split()) == 0
    after = stamps(here)
    changed = [path for path, stamp in after.items() if before.get(path) != stamp and not stamp[0]]
    written = [path for path in changed if path.name != "lock"]  # a lock is opened again, not through a link
    made = [path for path, stamp in after.items() if path not in before and stamp[0]]
    assert written

    # Files: each is a link to a file elsewhere.
    victims = tmp_path / "victims"
    victims.mkdir()
    if line.split()[0] not in AGAIN:
        for number, path in enumerate(written):
            path.rename(victims / str(number))
            path.symlink_to(victims / str(number))
        kept = contents(victims)
        assert main(line.format(here=here).split()) == 0
        assert contents(victims) == kept
        assert not all(path.is_symlink() for path in written)

    # Folders: each that the command made is a link to a folder elsewhere.
    for number, path in enumerate(sorted(path for path in made if path.parent not in made)):
        victim = victims / f"folder{number}"
        shutil.move(path, victim)
        path.symlink_to(victim)
        kept = contents(victim)
        status = main(line.format(here=here).split())
        assert contents(victim) == kept or path == Path(line.split()[-1].format(here=here))  # the user named it
        assert status in (0, 2)
        path.unlink()
        shutil.move(victim, path)


def index_of(name):
    """An index of weights that names another file."""
    return lambda run: (run / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}})
    )


def code_of(module):
    return lambda run: edit_json(run / "model" / "config.json", auto_map={"AutoConfig": f"{module}.Secret"})


def link(name):
    def put(run):
        (run / name).unlink(missing_ok=True)
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).symlink_to(run.parent / "secret.py")

    return put


LEAKS = {
    **{f"weights {name}": index_of(name) for name in ("../../secret.py", "../summary.json", "{here}/secret.py")},
    **{f"code {module}": code_of(module) for module in ("../../secret", "{here}/secret")},
    **{
        name: link(name)
        for name in ("grid.jsonl", "figures/grid.png", "model/config.json", "model/modeling_looped.py")
    },
}


@pytest.mark.parametrize("leak", LEAKS)
def test_nothing_is_published_that_a_run_only_points_to(here, capsys, leak):
    """Of a run that somebody else made: its files may name, or be links to, what is the user's own."""
    (here / "secret.py").write_text("secret = 1\n")
    LEAKS[leak](here / "hops")
    for path in (here / "hops" / "model").glob("*.json"):
        if not path.is_symlink():
            path.write_text(path.read_text().replace("{here}", str(here)))
    line = ["publish", str(here / "hops"), "--repo-id", "user/x", "--dry-run"]
    assert main(line) == 2
    assert "secret" not in capsys.readouterr().out


def test_a_run_without_such_files_is_published(here):
    assert main(["publish", str(here / "hops"), "--repo-id", "user/x", "--dry-run"]) == 0
