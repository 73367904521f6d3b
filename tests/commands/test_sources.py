"""A model is taken wherever a run is: by its run folder, a saved folder, a name of this package, or its id on the Hub.

Every kind of name meets every verb on every task that has it; what is said is what the run itself says.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from poison import KINDS as POISONS
from poison import poison

from hub_server import TOKEN, USER, LocalHub
from looplab.cli import main
from looplab.runs.folder import open_run
from looplab.runs.sources import find, opened_run
from looplab.tasks.molecules.evaluation import evaluate_run
from looplab.tasks.molecules.sizes import Sizes
from looplab.tasks.registry import TASKS
from toy_runs import RECIPES, failure

# huggingface_hub 2.4 sends large files in a way that its httpx2 no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
    pytest.mark.slow,
]

KINDS = ("folder", "shipped", "Hub")
# What each verb is told so that it is quick; {to} is where its files go.
QUICK = {
    "eval": ["--limit", "2", "--loops", "1", "2"],
    "memory": ["--limit", "1"],
    "table": [],
    "plot": ["--output", "{to}"],
    "lens": ["--limit", "4", "--no-probes", "--to", "{to}"],
    "ask": ["--loops", "1", "2"],
    "quantize": ["--calibration-rows", "1", "--to", "{to}"],
    "demo": [],
    "publish": ["--repo-id", "tester/again", "--dry-run"],
}
# Seconds and more, or with times in what they say; plots of molecules need samples, which are not published.
SLOW = [("eval", "molecules"), ("lens", "molecules"), ("memory", "hops"), ("plot", "molecules")]


def cases():
    number = 0
    for verb, options in QUICK.items():
        for task in RECIPES:
            a_task = next(each for each in TASKS.values() if each.kind == task)
            if a_task.options(verb) is not None and (verb, task) not in SLOW:
                kind, number = KINDS[number % len(KINDS)], number + 1  # in turn
                takes = [
                    option for option in options if option != "--no-probes" or "no_probes" in a_task.options(verb)
                ]
                yield pytest.param(verb, task, kind, takes, id=f"{verb} {task}, {kind}")


def every_name():
    for task in RECIPES:
        for kind in KINDS:
            yield pytest.param(task, kind, id=f"{task}, {kind}")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = LocalHub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def named(toy_runs, hub, tmp_path_factory):
    """named(task, kind): what a user writes for the toy run of a task that was published."""
    home = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr("looplab.runs.sources.shipped", home.joinpath)
        names = {}
        for task in RECIPES:
            run = shutil.copytree(toy_runs / task, home / "runs" / task)
            if task == "molecules":
                sizes = Sizes(batch=10, max_tokens=10, reference=0)
                evaluate_run(open_run(run), limit=10, loops=[1, 3], sizes=sizes)
            assert main(["publish", str(run), "--repo-id", f"{USER}/toy-{task}"]) == 0
            for place in (home / "saved" / f"toy-{task}", home / "models" / f"toy-{task}"):
                for name, content in hub.files("model", f"{USER}/toy-{task}").items():
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(content)
            names[task] = {
                "run": str(run),
                "folder": str(home / "saved" / f"toy-{task}"),
                "shipped": f"toy-{task}",
                "Hub": f"{USER}/toy-{task}",
            }
        named = {(task, kind): name for task, kinds in names.items() for kind, name in kinds.items()}
        patch.setattr("looplab.publish.demo.load_app", lambda _: Page())
        yield lambda task, kind: named[task, kind]


class Page:
    """What `looped demo` sees of the real page, whose server would leave its sockets open; it loads the models."""

    CSS = THEME = ""

    def make_page(self, folder: Path):
        settings = json.loads((folder / "demo.json").read_text())
        for part in settings.values():
            if isinstance(part, dict):
                model, _ = self.load(part.pop("model"))
                print(type(model).__name__, part)
        return self

    def launch(self, **options):
        pass


def words_of(text: str, name: str, to: Path) -> str:
    """Without the name, and without what is said of the place of files."""
    for each in (str(to), name, Path(name).name):
        text = re.sub(rf"{re.escape(each)}\b *", "MODEL ", text)
    return re.sub(r"\n(written to|not kept).*", "", re.sub(r"-{3,}", "---", text))


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("verb", "task", "kind", "options"), list(cases()))
def test_a_model_says_the_same_as_its_run(named, tmp_path, monkeypatch, capfd, verb, task, kind, options):
    said = {}
    for name in (named(task, kind), str(shutil.copytree(named(task, "run"), tmp_path / "toy-run"))):
        here = tmp_path / f"at_{len(said)}"
        here.mkdir()
        monkeypatch.chdir(here)
        line = options[:-2] if name.endswith("/toy-run") and "--to" in options else options
        before = files_below(find(name).folder)
        capfd.readouterr()
        status = main([part.format(to=here / "to") for part in [verb, name, *line]])
        printed = capfd.readouterr()
        assert status == 0, printed.err
        said[name] = words_of(printed.out, name, here / "to")
        if not name.endswith("/toy-run"):
            assert files_below(find(name).folder) == before
            assert [path.name for path in here.iterdir()] == (["to"] if "{to}" in options else [])
    of_model, of_run = said.values()
    assert of_model == of_run


@pytest.mark.parametrize(("task", "kind"), list(every_name()))
def test_a_model_is_opened_as_its_run(named, tmp_path, task, kind):
    run = open_run(named(task, "run"))
    name = named(task, kind)
    kept = tmp_path / "kept"
    for to in (None, str(kept), str(kept)):  # the second time it goes on
        with opened_run(name, to) as opened:
            assert (opened.task(), opened.summary(), opened.weights) == (run.task(), run.summary(), run.weights)
            assert (opened.recipe(), opened.metrics()) == (run.recipe(), run.metrics())
            for record in TASKS[run.task()].records:
                assert opened.has(record) == run.has(record)
                if run.has(record):
                    assert opened.read(record) == run.read(record)
                    opened.check_record(record.name, "", strict=True)
            assert str(opened) == (name if to is None else to)
            place = opened.folder
    assert not [path for path in (kept, *kept.rglob("*")) if path.is_symlink()]
    with opened_run(name) as opened:
        place = opened.folder
        assert place.is_dir()
    assert not place.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_kept_only_where_they_are_asked_for(named, tmp_path, monkeypatch, capfd, kind):
    monkeypatch.chdir(tmp_path)
    name, to = named("text", kind), str(tmp_path / "to")
    assert "--to" in failure(capfd, "lens", named("hops", kind))
    assert "--to" in failure(capfd, "quantize", name)
    assert "--to" in failure(capfd, "halting", name, "--save")
    assert "--output" in failure(capfd, "plot", name)
    assert list(tmp_path.iterdir()) == []
    assert main(["eval", name, "--loops", "1", "2", "--to", to]) == 0
    assert f"written to {to}/text.jsonl" in capfd.readouterr().out
    assert main(["table", to]) == 0  # it is a run now
    assert failure(capfd, "eval", named("hops", kind), "--to", to).endswith("name a new folder.")
    assert failure(capfd, "eval", to, "--to", str(tmp_path / "new")).endswith("leave --to out.")
    assert failure(capfd, "eval", name, "--to", str(tmp_path)).endswith("name a new folder.")


def test_a_published_model_is_drawn_without_samples(named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", named("molecules", "Hub"), "--output", "figures"]) == 0
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"training.png", "validity.png"} <= drawn
    assert "molecules.png" not in drawn


def test_what_lies_in_a_run_belongs_to_it(named, tmp_path):
    run = shutil.copytree(named("hops", "run"), tmp_path / "run")
    with opened_run(str(run / "model")) as opened:
        assert (opened.folder, opened.given) == (run, None)
    with opened_run(str(run / "snapshots" / "step-000000001")) as opened:  # weights of its own
        assert opened.task() == "khop"
        assert not opened.has(next(iter(TASKS["khop"].records)))
        assert opened.weights != open_run(run).weights


def test_a_name_that_is_none_is_one_sentence(named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/quickstart", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "recipe.yaml").write_text("name: quickstart\n")
    for wrong, said in (
        ("toy-hop", "there is no run folder toy-hop; did you mean toy-hops?"),
        ("runs/quikstart", "there is no run folder runs/quikstart; did you mean runs/quickstart?"),
        ("quikstart", "there is no run folder quikstart; did you mean runs/quickstart?"),
        ("zzz", "there is no run folder zzz; name a run, a folder with a model, USER/NAME on the Hub, toy-hops"),
        (f"{USER}/nothing", f"the Hub has no model {USER}/nothing, or it is private"),
        ("other", "other is not a run folder: it has no recipe.yaml; nor a model: it has no config.json."),
        (str(tmp_path / "zzz"), "there is no run folder"),
    ):
        for verb in ("ask", "serve"):
            assert said in failure(capfd, verb, wrong)


def test_only_a_looped_model_is_downloaded(named, hub, toy_runs, capfd):
    """What the Hub has of another model is not, and what is broken off goes on."""
    with_files(hub, "llama", toy_runs / "llama")
    assert "is a llama, not a looped model" in failure(capfd, "ask", f"{USER}/llama")
    assert not [line for line in hub.requests if "llama" in line and "safetensors" in line]
    with_files(hub, "empty", toy_runs / "llama", but="config.json")
    assert "has no config.json" in failure(capfd, "ask", f"{USER}/empty")
    hub.faults.append(lambda request: "hang up")
    assert main(["ask", named("hops", "Hub")]) == 0  # it was downloaded before
    assert "no model tester/never was downloaded before" in failure(capfd, "ask", f"{USER}/never")
    hub.faults.clear()


@pytest.mark.parametrize("poisoned", POISONS)
@pytest.mark.parametrize("kind", KINDS)
def test_code_beside_a_model_is_not_run(named, hub, tmp_path, monkeypatch, kind, poisoned):
    folder = Path(shutil.copytree(named("text", "folder"), tmp_path / f"evil-{kind}-{poisoned}".lower()))
    mark, name = poison(folder, poisoned), str(folder)
    if kind == "Hub":
        with_files(hub, folder.name, folder)
        name = f"{USER}/{folder.name}"
    elif kind == "shipped":
        monkeypatch.setattr("looplab.runs.sources.shipped", lambda _: tmp_path)
        name = folder.name
    for verb in (["eval", name, "--loops", "1"], ["eval", name, "--loops", "1", "--to", str(tmp_path / "to")]):
        assert main(verb) == (0 if poisoned == "code" else 2)
        assert not mark.exists()


def with_files(hub, name: str, folder: Path, but: str = "") -> None:
    """A model on the Hub with these files."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(f"{USER}/{name}")
    api.upload_folder(repo_id=f"{USER}/{name}", folder_path=folder, ignore_patterns=[but])
