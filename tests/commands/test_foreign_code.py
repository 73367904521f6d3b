"""Python in somebody else's folder does not run unasked: by no command, of the model, tokenizer, generation or pickle.

The commands, and what each of them reads, are taken from the parser.
"""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from poison import KINDS, poison
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from command_lines import READ, VERBS, arguments_of, command, readable
from looplab.cli import main
from toy_runs import SHORT
from toys import ROOT

# So that each is quick; what is not here needs nothing.
QUICK = {
    "eval": ["--limit", "1", "--loops", "1", "--max-loops", "1"],
    "lens": ["--no-probes", "--limit", "4"],
    "memory": ["--limit", "1"],
    "quantize": ["--calibration-rows", "1"],
    "bench": ["--quick", "--no-compile"],
    "publish": ["--dry-run"],
    "frozen": ["--stages", "cost"],
}


def cases():
    for verb in VERBS:
        for action in arguments_of(verb):
            for kind in KINDS if action.metavar in READ else ():
                yield pytest.param(verb, action, kind, id=f"{readable(command(verb, action, '...'))}, {kind}")


class Page:
    """What `looped demo` sees of the real page, whose server would leave its sockets open."""

    CSS = THEME = ""

    def load(self, model):
        return AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)

    def make_page(self, folder: Path):
        self.load(json.loads((folder / "demo.json").read_text())["hops"]["model"])
        return self

    def launch(self, **options):
        pass


@pytest.fixture
def places(toy_runs, tmp_path, monkeypatch):
    """The toy runs, and a copy of them whose models are to be poisoned; servers end at once."""
    monkeypatch.setattr("looplab.publish.demo.load_app", lambda _: Page())
    monkeypatch.setattr("looplab.publish.serving.Server.run", lambda *_, **__: None)
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    return {"runs": toy_runs, "new": tmp_path / "new"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when bench measures
@pytest.mark.parametrize(("verb", "action", "kind"), list(cases()))
def test_no_command_runs_it(places, tmp_path, verb, action, kind):
    task = "text" if verb == "quantize" else "hops"
    source = {"RUN": task, "MODEL": f"{task}/model"}.get(action.metavar, "llama")
    poisoned = shutil.copytree(places["runs"] / source, tmp_path / "poisoned")
    mark = poison(poisoned / "model" if action.metavar == "RUN" else poisoned, kind)
    if action.metavar == "RECIPE":
        study = yaml.safe_load((places["runs"] / "study.yaml").read_text())
        poisoned = tmp_path / "study.yaml"
        poisoned.write_text(yaml.safe_dump(study | {"model": str(tmp_path / "poisoned"), "output_dir": str(tmp_path)}))
    line = [part.format(**places) for part in [*command(verb, action, str(poisoned)), *QUICK.get(verb, [])]]
    status = main(line)
    assert not mark.exists()
    assert status in (0, 2)
    if kind == "code" and action.metavar in ("RUN", "MODEL") and verb not in ("halting", "harness", "table", "plot"):
        assert status == 0  # our own models need no code of the folder


@pytest.mark.parametrize("field", ["init_from", "data.tokenizer", "distill.teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_train_runs_none_of_what_a_recipe_names(places, trained, tmp_path, field, kind):
    mark = poison(Path(shutil.copytree(places["runs"] / "text" / "model", tmp_path / "poisoned" / "model")), kind)
    flags = [f"--output_dir={tmp_path}", *SHORT, *trained.data["text"], f"--{field}={tmp_path}/poisoned/model"]
    flags += {
        "init_from": ["--model={}", "--data.vocab_size=null"],
        "data.tokenizer": ["--data.vocab_size=null"],
        "distill.teacher": ["--model.kv_sharing=first"],
    }[field]
    said = ""
    try:
        train.main(train.read_recipe(ROOT / "recipes" / "smoke_text.yaml", flags))
    except ValueError as error:
        said = str(error)
    assert not mark.exists()
    if kind == "pickle" and field != "data.tokenizer":
        assert f"{tmp_path}/poisoned/model" in said


def test_it_would_run_if_asked_to(toy_runs, tmp_path, capsys):
    """The marks above are real; and a command that was told to trust the folder runs its code."""
    for kind in KINDS:
        folder = Path(shutil.copytree(toy_runs / "llama", tmp_path / kind / "llama"))
        mark = poison(folder, kind)
        if kind == "model":
            assert main(["harness", str(folder), "--task", "arc_easy"]) == 2
            assert "--trust-remote-code" in capsys.readouterr().err
            assert not mark.exists()
            assert main(["harness", str(folder), "--task", "arc_easy", "--trust-remote-code"]) == 2
            assert "--trust-remote-code" not in capsys.readouterr().err
        elif kind == "tokenizer":
            AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        elif kind == "pickle":
            torch.load(folder / "pytorch_model.bin", weights_only=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.load_custom_generate(folder, trust_remote_code=True)
        assert mark.exists()


def test_every_automatic_class_is_told_whom_to_trust():
    """Where nothing is said, transformers asks on the terminal."""
    calls = 0
    for path in [ROOT / "train.py", *(ROOT / "looplab").rglob("*.py"), *(ROOT / "data_builders").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):
                calls += 1
                (trust,) = (word.value for word in node.keywords if word.arg == "trust_remote_code")
                assert not (isinstance(trust, ast.Constant) and trust.value), f"{path}:{node.lineno}"
    assert calls > 5
