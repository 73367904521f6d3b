"""The wheel by itself: built from a copy of the repository, and installed where the path leads to none of it."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from toys import ROOT

pytestmark = pytest.mark.slow
PACKAGES = {"modeling_looped", "data_builders", "looplab"}
FOLDERS = {"recipes", "studies", "hub_cards", "models", "docs"}  # of the repository, which the wheel has in looplab/
LAUNCH = "accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no -m"
COMMANDS = [
    "looped train smoke",
    f"{LAUNCH} looplab.train recipes/smoke.yaml --name launched",
    "looped eval runs/smoke --loops 1 2",
    "looped ask runs/smoke",
    "looped train smoke_text --max_steps 2",
    "looped train molecules/smoke_molecules --max_steps 2",
    "looped publish runs/smoke --repo-id user/name --space --dry-run",
]


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a program, which must succeed; what it prints is kept."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, **options)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A virtual environment with the wheel and, beside it, the libraries of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "copy").mkdir()
    read = [*PACKAGES, *FOLDERS, *(path.name for path in ROOT.iterdir() if path.is_file())]  # by the build
    for name in read:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / "copy" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "dist", folder / "copy")
    shutil.rmtree(folder / "copy")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    [wheel] = (folder / "dist").iterdir()
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # Of folders named in a .pth file, Python reads no .pth files: an editable install of this project does not count.
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages(folder / "env") / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    return folder / "env"


def site_packages(environment: Path) -> Path:
    [found] = environment.glob("lib/python*/site-packages")
    return found


def test_the_wheel_has_three_names_and_everything_in_them(installed):
    site = site_packages(installed)
    [info] = site.glob("looped_transformers-*.dist-info")
    assert {path.name for path in site.iterdir()} == {*PACKAGES, info.name, "libraries.pth"}
    assert list(info.rglob("LICENSE"))
    for name in PACKAGES:
        assert (site / name / "py.typed").exists()
    for name in PACKAGES | FOLDERS:
        files = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if path.is_file()}
        if name == "docs":  # pictures stay behind
            files = {path for path in files if path.suffix in (".md", ".smi", ".jsonl")}
        home = site if name in PACKAGES else site / "looplab"
        there = {path.relative_to(home) for path in (home / name).rglob("*")}
        assert {path for path in files if "__pycache__" not in path.parts} <= there


def test_the_wheel_trains_measures_asks_and_publishes_from_any_folder(installed, tmp_path):
    # The environment may lie in somebody's repository, whose commit is not ours.
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    run("git", "init", "-q", installed.parent)
    run("git", "-C", installed.parent, *author, "commit", "-q", "--allow-empty", "-m", "Theirs")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = installed / "bin" / "python"
    # The scripts of libraries belong to the environment they are installed in.
    scripts = {
        "looped": [installed / "bin" / "looped"],
        "accelerate": [python, "-m", "accelerate.commands.accelerate_cli"],
    }

    def call(line: str) -> str:
        program, *words = line.split()
        return run(*scripts[program], *words, cwd=tmp_path, env=variables).stdout

    version = call("looped --version").split()[-1]
    code = "import looplab as l, modeling_looped as m; print(l.__file__, l.__version__, m.__version__)"
    where, *versions = run(python, "-c", code, cwd=tmp_path, env=variables).stdout.split()
    assert Path(where).is_relative_to(installed)
    assert versions == [version, version]
    assert version[0].isdigit()
    assert "\nquickstart " in call("looped recipes")
    for line in COMMANDS:
        said = call(line)
    assert "README.md" in said
    losses = [
        [row["loss"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if "loss" in row]
        for file in (tmp_path / "runs" / "smoke" / "metrics.jsonl", tmp_path / "runs" / "launched" / "metrics.jsonl")
    ]
    assert losses[0] == losses[1]
    summary = json.loads((tmp_path / "runs" / "smoke" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["commit"]) == (20, None)
