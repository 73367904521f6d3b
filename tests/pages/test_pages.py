"""Every page of the project, README to docs: its code runs, its commands are accepted, what it names and links exists.

A page with Python is in RUNS, with what a reader has made before its first block, or in ELSEWHERE, with the test that
runs it where it needs more than this machine has. Nothing that a reader would type is changed.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import train
from data_builders import dataset_tokenizer, load_task
from data_builders.tokenizers import hop_tokenizer, train_byte_bpe
from looplab.cli import main, parser
from looplab.export.exporting import export
from looplab.runs.yaml_text import parse_yaml
from looplab.shipped import find_recipe
from looplab.tasks.base import METHODS, Task
from looplab.training.recipe import build_recipe
from modeling_looped import LoopedForCausalLM
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.connections_looped import CONNECTIONS
from modeling_looped.halting_looped import RULES
from modeling_looped.losses_looped import EXIT_LOSSES
from toy_runs import reset_accelerator
from toys import FP32, ROOT, make_config, make_model, write_pages

PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PARTS = ("docs", "tests", "recipes", "studies", "hub_cards", "looplab", "modeling_looped", "data_builders")
FILES = [*ROOT.glob("*.*"), *(path for part in PARTS for path in (ROOT / part).rglob("*.*"))]

INDICES = ("README.md", "docs/README.md")

every_page = pytest.mark.parametrize("page", PAGES)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, *languages: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), flags=re.S | re.M)
    return [block for language, block in fences if language in languages]


def prose_of(page: str) -> str:
    return re.sub(r"^```\w*\n.*?^```$", "", read(page), flags=re.S | re.M)


# ---- Python


def a_model_of_chains() -> dict:
    """runs/quickstart/model, with weights as they are drawn."""
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4, readout="last")
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, residual_init="normal")
    model.generation_config.max_new_tokens = 1
    for saved in (model, tokenizer):
        saved.save_pretrained("runs/quickstart/model")
    return {}


def a_calibrated_model_of_chains() -> dict:
    """The same, after `looped halting runs/quickstart --save`."""
    names = a_model_of_chains()
    path = Path("runs/quickstart/model/generation_config.json")
    rule = {"rule": "kl_entropy", "kl_threshold": 1.0, "max_entropy": 1.15}
    saved = json.loads(path.read_text()) | {"_from_model_config": False, "calibrated_halting": rule}
    path.write_text(json.dumps(saved))
    return names


def a_run_on(name: str, task: str, config: str, **graph) -> dict:
    """A finished run runs/NAME, with weights as they are drawn."""
    tokenizer = dataset_tokenizer(load_task(task, config, seed=0, **graph))
    for saved in (make_model(vocab_size=len(tokenizer), residual_init="normal"), tokenizer):
        saved.save_pretrained(f"runs/{name}/model")
    data = {"task": task, "config": config, "seed": 0, "overrides": graph}
    Path(f"runs/{name}/recipe.yaml").write_text(yaml.safe_dump({"name": name, "data": data}))
    loops = {"minimum": 1, "maximum": 4, "mean": 2}
    summary = {"parameters": 51264, "trained_hops": [1, 2, 3], "trained_loops": loops}
    Path(f"runs/{name}/summary.json").write_text(json.dumps(summary))
    return {}


def a_run_on_chains() -> dict:
    sizes = {"num_entities": 6, "num_relations": 3, "train_hops": 3, "max_hops": 5}
    return a_run_on("quickstart", "khop", "quickstart", **sizes, train_per_hop=20, gate_per_hop=5, test_per_hop=5)


def a_run_on_compositions() -> dict:
    sizes = {"num_entities": 12, "num_relations": 4, "out_degree": 4, "ood_share": 0.3, "phi": 1.0}
    return a_run_on("composition", "composition", "cpu", **sizes, id_holdout=0.2, pair_holdout=0.0)


def a_dense_model() -> dict:
    """A Llama of twenty layers."""
    tokenizer = train_byte_bpe(["The capital of France is Paris. The capital of Spain is Madrid."], 270)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=20, num_key_value_heads=2))
    for saved in (model, tokenizer):
        saved.save_pretrained("smollm2")
    return {}


def own_files() -> dict:
    [rows] = blocks_of("docs/guides/train_your_own_data.md", "json")
    Path("questions.jsonl").write_text(rows)
    Path("mine.csv").write_text("name,smiles\n" + "".join(f"m{n},{'C' * n}C(=O)Cl\n" for n in range(60)))
    return {}


def toy_molecules() -> dict:
    """The page's relative paths begin at the checkout."""
    Path("docs").symlink_to(ROOT / "docs")
    return {}


def check_readme(names: dict, printed: str) -> None:
    answers = dict(line.split() for line in printed.splitlines())
    assert list(answers) == ["1", "2", "4", "8", "16"]
    assert answers["1"] != answers["8"] == answers["16"] == "e13"


def check_frozen(names: dict, printed: str) -> None:
    assert names["again"].loop.config.window == [12, 15]
    assert list(Path("smollm2-looped").glob("*.safetensors")) == []


def check_drafts(names: dict, printed: str) -> None:
    assert torch.equal(names["text"].sequences, names["plain"])


def check_clients(names: dict, printed: str) -> None:
    reloaded = LoopedForCausalLM.from_pretrained("runs/quickstart/model")
    assert reloaded.generation_config.to_dict()["num_loops"] == 8
    ids = torch.tensor([[7, 8, 9, 10]])
    torch.testing.assert_close(names["program"].module()(ids), reloaded(ids, num_loops=8).logits, **FP32)


def check_own_data(names: dict, printed: str) -> None:
    assert printed.splitlines()[0] == "e2"
    assert Path("family/modeling_looped.py").exists()
    assert sum(len(split) for split in names["molecules"].values()) == 60
    assert "'Cl'" in printed


def check_tuning(names: dict, printed: str) -> None:
    saved = names["again"].generation_config.to_dict()
    assert (saved["num_loops"], saved["halting"]["max_entropy"]) == (16, 1.15)
    assert names["calibrated"].generation_config.calibrated_halting == names["settled"]
    assert printed.rpartition("tensor(")[2].count("16") == 3  # "fixed" runs all loops in every row


def check_new_rule(names: dict, printed: str) -> None:
    assert names["output"].loops_used.shape == (2, 3)
    assert 1 <= names["output"].loops_used.min() < 16


def check_slots(names: dict, printed: str) -> None:
    slots = [int(line.split()[3]) for line in printed.splitlines()]
    assert slots == [4, 8, 14, 3, 3]  # and of a window of 4 tokens, however long the text


def check_space(names: dict, printed: str) -> None:
    assert json.loads(Path("space/demo.json").read_text())["hops"]["model"] == "user/khop-looped"


def check_inside(names: dict, printed: str) -> None:
    lines = printed.splitlines()
    assert lines[0].startswith("the bridge is best read at core")
    assert len([line for line in lines if line.startswith("[")]) == 10  # five sets of positions, patched and swapped


def check_molecules(names: dict, printed: str) -> None:
    assert 2.0 < names["loss"].item() < 5.0
    assert names["written"].shape[1] > 1


def check_credit(names: dict, printed: str) -> None:
    assert names["trainer"].state.global_step == 2
    assert LoopedForCausalLM.from_pretrained("runs/credit/model").config.vocab_size == len(names["tokenizer"])


def check_new_task(names: dict, printed: str) -> None:
    from looplab.tasks.registry import TASKS

    del TASKS["parity"]
    assert re.search(r"runs/parity: 20 steps, held-out accuracy \{'2': [\d.]+\}", printed)
    assert re.search(r"\{'1': [\d.]+, '2': [\d.]+, '4': [\d.]+\}", printed)
    assert {"run/parity.json", "figures/parity.png", "run/metrics.jsonl"} <= set(re.findall(r"\S+/\S+", printed))
    lines = [line for line in blocks_of("docs/guides/add_a_task.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 60


def an_exported_model() -> dict:
    """NAME-mlx, which `looped export` has made."""
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    export(make_model(vocab_size=len(tokenizer)), tokenizer, Path("NAME-mlx"), "mlx")
    return {}


def check_exported(names: dict, printed: str) -> None:
    assert names["model"].model.num_loops == 16
    assert names["tokenizer"].encode("e1 r0")


def nothing(*_) -> dict:
    return {}


# Page -> what a reader has made or defined before its first block, and what must hold of the names that the blocks
# leave and of what they print, where running is not enough.
RUNS: dict[str, tuple[Callable[[], dict], Callable[[dict, str], object]]] = {
    "README.md": (nothing, check_readme),
    "docs/design/forward_pass.md": (nothing, check_slots),
    "docs/guides/add_a_system.md": (nothing, check_new_rule),
    "docs/guides/add_a_task.md": (nothing, check_new_task),
    "docs/guides/clients.md": (a_model_of_chains, check_clients),
    "docs/guides/demo.md": (a_run_on_chains, check_space),
    "docs/guides/mechanism.md": (a_run_on_compositions, check_inside),
    "docs/guides/train_your_own_data.md": (own_files, check_own_data),
    "docs/guides/tune_loops.md": (a_calibrated_model_of_chains, check_tuning),
    "docs/guides/drafts_and_halting.md": (nothing, check_drafts),
    "docs/guides/frozen.md": (a_dense_model, check_frozen),
    "docs/guides/generators.md": (nothing, lambda names, told: None),
    "docs/guides/engines.md": (an_exported_model, check_exported),
    "docs/guides/hyperloop.md": (nothing, nothing),
    "docs/guides/melt.md": (nothing, nothing),
    "docs/guides/molecules.md": (toy_molecules, check_molecules),
    "docs/guides/reinforce.md": (nothing, check_credit),
}
SLOW = {"docs/guides/clients.md"}  # exports eight loops, fine-tunes with TRL
# Page -> the test that runs it, and why it is not run here.
ELSEWHERE = {
    "docs/guides/publish.md": ("test_what_is_published_works_where_this_repository_does_not_exist", "needs a Hub"),
    "docs/guides/teach_pretrained.md": (
        "test_a_pretrained_model_is_taught_as_the_guide_says",
        "its commands make what its code takes",
    ),
}


@every_page
def test_a_page_with_python_is_run_or_says_where(page):
    if blocks_of(page, "python"):
        assert (page in RUNS) != (page in ELSEWHERE)
    else:
        assert page not in RUNS.keys() | ELSEWHERE.keys()
    if page in ELSEWHERE:
        assert f"def {ELSEWHERE[page][0]}(" in "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))


# TRL 1.16 uses the old names of activation checkpointing; a CPU may have no bfloat16 to recommend.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in RUNS]
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before, check = RUNS[page]
    names = before()
    capsys.readouterr()
    for block in blocks_of(page, "python"):
        exec(compile(block, page, "exec"), names)
    check(names, capsys.readouterr().out)


def loads_of(block: str):
    """Calls in a block that load what lies in a folder or on the Hub, with that place where it is written out."""
    tree = ast.parse(block)
    values = {
        node.targets[0].id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and hasattr(node.targets[0], "id")
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        places = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "model")]
        if re.fullmatch(r"Auto\w+\.from_pretrained|pipeline", name):
            written = [getattr(place, "value", values.get(getattr(place, "id", None))) for place in places]
            yield call, [place for place in written if isinstance(place, str)]


@every_page
def test_code_that_is_copied_alone_loads_our_models(page):
    """A reader may copy one block into a Python that has never imported this package."""
    for block in blocks_of(page, "python"):
        if "import modeling_looped" in block or "from modeling_looped" in block:
            continue
        for call, places in loads_of(block):
            if any(re.match(r"runs/|user/|models/", place) for place in places):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                given = "".join(value for name, value in keywords.items() if name is None)
                assert keywords.get("trust_remote_code") == "True" or ("trust_remote_code" in block and given), block


PIP_INSTALLS = re.compile(r"pip install ((?:-c \S+ |-\w+ )*)(?:\\?['\"])?([\w./-]+)(?:\\?\[([\w,]+)\\?\])?")
ON_PYPI = {"gguf", "trackio"}  # beside this project, which pip finds where it is installed already, and its folder


def test_what_is_to_be_installed_exists():
    """In pages, messages and cards. No other name: anybody may register one on PyPI that a page has invented."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    found = 0
    for path in FILES:
        if path.suffix not in (".py", ".md", ".yaml", ".txt", ".ipynb") or path.is_relative_to(ROOT / "tests"):
            continue
        for _, name, extras in PIP_INSTALLS.findall(path.read_text(encoding="utf-8")):
            found += 1
            name = name.rstrip(".") or "."  # of a sentence
            assert name in (".", project["name"], "requirements.txt") or name in ON_PYPI, (path, name)
            for extra in extras.split(",") if extras and "{" not in extras else []:
                assert extra in project["optional-dependencies"], (path, extra)
    assert found > 8


def test_the_time_of_the_quickstart_stands_in_one_place():
    """Of all that readers see but the log and the changes; three places had three times."""
    told = []
    for path in FILES:
        if path.suffix in (".md", ".yaml", ".py") and not path.is_relative_to(ROOT / "tests"):
            for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
                if re.search(r"quickstart", paragraph) and re.search(r"\bminutes?\b", paragraph):
                    told.append((path.name, paragraph))
    assert {name for name, _ in told} - {"LOG.md", "CHANGELOG.md"} <= {"README.md"}, told
    assert len([name for name, _ in told if name == "README.md"]) <= 1, told


# ---- commands

SHELL = ("sh", "bash")
# Programs of others.
OTHERS = {"pip", "curl", "hf", "lm_eval", "git", "cd", "docker", "llama-completion", "llama-server"}


def commands_of(page: str) -> list[list[str]]:
    lines = "\n".join(blocks_of(page, *SHELL)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def recipe_of(page: str, words: list[str]) -> tuple[Path | str, list[str]]:
    """The recipe that a command line trains, a file or the YAML of the page, and its flags."""
    place = 2 if words[0] == "looped" else words.index("train.py") + 1
    path = find_recipe(words[place])
    return path if path.exists() else "\n".join(blocks_of(page, "yaml")), words[place + 1 :]


@every_page
def test_every_block_says_what_it_is(page):
    """A block that names no language is one that no test looks at."""
    languages = re.findall(r"^```(\w*)\n.*?^```$", read(page), flags=re.S | re.M)
    assert set(languages) <= {"python", "yaml", "json", "text", *SHELL}


@every_page
def test_the_commands_of_a_page_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), flags=re.M))
    for words in commands_of(page):
        if words[:2] == ["looped", "train"] or "train.py" in words:
            recipe, flags = recipe_of(page, words)
            if isinstance(recipe, Path):
                train.read_recipe(recipe, flags)
            else:
                build_recipe(parse_yaml(recipe, page))
        elif words[0] == "looped":
            parser().parse_args(words[1:])  # ends with SystemExit where it does not take them
        elif words[0] == "make":
            assert set(words[1:]) <= targets
        else:
            assert words[0] in OTHERS | {"python"}, words
    assert set(re.findall(r"`make ([\w-]+)", prose_of(page))) <= targets


VERBS = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))


def wrong_commands(text: str) -> list[str]:
    """Commands of `looped` in backticks whose verb or options do not exist; they may go on in another line."""
    wrong = []
    for span in re.findall(r"`looped ([a-z][^`]*)`", re.sub(r"\n[ #]*", " ", text)):
        verb, *words = span.split()
        known = {name for action in VERBS[verb]._actions for name in action.option_strings} if verb in VERBS else None
        given = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        # What `looped train` does not know are fields of the recipe.
        wrong += [span] if known is None or (verb != "train" and not given <= known) else []
    return wrong


def test_the_commands_in_prose_comments_and_messages_exist():
    """In pages, recipes, cards, docstrings and what the commands print: whatever names a verb of `looped`."""
    texts = [path for path in FILES if path.suffix in (".py", ".md", ".yaml") and path.name not in ("LOG.md",)]
    told = {path: path.read_text(encoding="utf-8") for path in texts if not path.is_relative_to(ROOT / "tests")}
    assert {path.name: wrong for path, text in told.items() if (wrong := wrong_commands(text))} == {}
    assert wrong_commands("`looped evla RUN`, `looped\n# eval RUN --lops 3`") == ["evla RUN", "eval RUN --lops 3"]
    assert sum(text.count("`looped ") for text in told.values()) > 200


@every_page
def test_yaml_and_json_can_be_read(page):
    for block in blocks_of(page, "yaml"):
        assert all(yaml.safe_load_all(block))
    for block in blocks_of(page, "json"):
        assert all(json.loads(line) for line in block.splitlines())


@pytest.mark.slow
def test_text_of_your_own_trains_and_is_evaluated(tmp_path, monkeypatch):
    """The recipe of the guide, in few steps, and the commands below it."""
    page = "docs/guides/train_your_own_data.md"
    monkeypatch.chdir(tmp_path)
    write_pages(tmp_path / "notes" / "2026")
    [recipe] = blocks_of(page, "yaml")
    Path("notes.yaml").write_text(recipe)
    shorter = ["--max_steps", "2", "--batch_size", "4", "--data.vocab_size", "300", "--checkpoint_every", "2"]
    train.main(train.read_recipe("notes.yaml", shorter))
    reset_accelerator()
    [measure] = [words for words in commands_of(page) if words[:2] == ["looped", "eval"]]
    assert main(measure[1:]) == 0
    rows = [json.loads(line) for line in Path("runs/notes/text.jsonl").read_text().splitlines()]
    assert {row["loops"] for row in rows} >= {1, 2, 4, 8}


@pytest.mark.slow
def test_questions_of_your_own_are_trained_on_and_answered(tmp_path, monkeypatch):
    """The recipe of the guide, in few steps, and the commands below it that end by themselves on a model so young."""
    page = "docs/guides/your_task.md"
    monkeypatch.chdir(tmp_path)
    [recipe] = blocks_of(page, "yaml")
    Path("reversals.yaml").write_text(recipe)
    train.main(train.read_recipe("reversals.yaml", ["--max_steps", "2", "--batch_size", "8"]))
    reset_accelerator()
    commands = [words for words in commands_of(page) if words[0] == "looped"]
    assert {words[1] for words in commands} >= {"eval", "plot", "ask", "publish", "export", "halting", "serve"}
    for words in commands:
        if words[1] not in ("train", "halting", "serve"):
            assert main(words[1:]) == 0, words


def test_the_dataset_that_a_guide_names_is_accepted():
    page = "docs/guides/train_your_own_data.md"
    [recipe] = blocks_of(page, "yaml")
    [(dataset, overrides)] = re.findall(r"`data.dataset: (\{.*\})` with `overrides: (\{.*\})`", prose_of(page))
    values = parse_yaml(recipe, page)
    values["data"] |= {"files": None, "dataset": yaml.safe_load(dataset), "overrides": yaml.safe_load(overrides)}
    assert build_recipe(values).data.overrides["column"] == "text"


# ---- names, links, tables

KINDS = "py|md|yaml|toml|txt|cff"
MADE_BY_A_READER = {
    "notes.yaml", "my_tasks/hops.yaml", "looplab/tasks/parity/task.py", "hub_cards/model_parity.md",
    "tests/tasks/parity/", "norm.md", "norm.png", "norm.jsonl", "loopbench.md",
}  # fmt: skip
MADE_BY_A_RUN = {"recipe.yaml", "docs/api/html/"}


def spellings(name: str) -> list[str]:
    """`{a,b}` written out, as a shell does."""
    if not (braces := re.search(r"\{([^{}]*)\}", name)):
        return [name]
    start, end = braces.span()
    return [one for word in braces[1].split(",") for one in spellings(name[:start] + word + name[end:])]


@every_page
def test_the_files_and_tests_that_a_page_names_exist(page):
    spans = re.findall(r"`([^`\n]+)`", prose_of(page))
    pattern = rf"(?:{'|'.join(PARTS)})/[\w./*{{}},-]*|[\w*{{}},./-]+\.(?:{KINDS})"
    named = [span for span in spans if re.fullmatch(pattern, span)]
    for name in {one for span in named for one in spellings(span)} - MADE_BY_A_READER - MADE_BY_A_RUN:
        assert (ROOT / name).is_dir() or any(file.match(name) for file in FILES), name
    code = [path.read_text() for path in ROOT.glob("tests/**/*.py")]
    for file, function in re.findall(r"`tests/([\w/]+\.py)::(\w+)`", read(page)):
        assert (ROOT / "tests" / file).exists(), file
        assert f"def {function}(" in (ROOT / "tests" / file).read_text()
    for function in re.findall(r"`(test_\w+)`", read(page)):
        assert any(f"def {function}(" in text for text in code), function


def test_what_names_a_page_names_one_that_exists():
    """In code, recipes and tests: a page that moved leaves comments behind that lead nowhere."""
    texts = {
        path: path.read_text(encoding="utf-8") for path in FILES if path.suffix in (".py", ".yaml", ".toml", ".md")
    }
    named = {(path, name) for path in texts for name in re.findall(r"\bdocs/[\w/]+\.\w+", texts[path])}
    assert len(named) > 50
    assert [(str(path), name) for path, name in named if not (ROOT / name).exists()] == []


def anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")


@every_page
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert place in {anchor(heading) for heading in headings}, target


def test_the_index_links_every_page():
    linked = re.findall(r"^\| \[.*?\]\(([\w/]+\.md)\) \| .+ \|$", read("docs/README.md"), flags=re.M)
    assert sorted(f"docs/{page}" for page in linked) == [page for page in PAGES if page not in INDICES]


@pytest.mark.parametrize("page", [*PAGES, "LOG.md"])
def test_tables_are_whole(page):
    """Below an empty line the rest of a table renders as text with bars; a row of other length loses its cells."""
    blocks = [block.strip() for block in re.split(r"\n\s*\n", prose_of(page))]
    for lines in (block.split("\n") for block in blocks if block.startswith("|")):
        assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", lines[1].strip()) if len(lines) > 1 else False, lines[0]
        widths = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines}
        assert len(widths) == 1, lines[0]


@every_page
def test_whoever_trusts_a_folder_is_told_what_that_means(page):
    assert "trust_remote_code=True" not in read(page) or "somebody else" in read(page)


# Of the words that the glossary rules out, those that mean nothing else on these pages.
RULED_OUT = ("iteration", "recurrent step", "lane", "experiment")


def test_pages_keep_to_the_words_of_the_glossary():
    glossary = "docs/design/glossary.md"
    ruled_out = re.findall(r"^\|.*\|(.*)\|$", read(glossary), flags=re.M)
    pattern = re.compile(rf"\b({'|'.join(RULED_OUT)})s?\b", flags=re.I)
    assert {word for cell in ruled_out for word in pattern.findall(cell)} == set(RULED_OUT)
    found = {page: pattern.findall(prose_of(page)) for page in PAGES if page != glossary}
    assert {page: words for page, words in found.items() if words} == {}


# ---- single pages


def test_the_first_commands_of_readme_print_what_stands_under_them(tmp_path):
    """As printed, from a folder where nothing of the project lies."""
    [(command, output)] = re.findall(
        r"^```sh\n(looped .*?)^```\n\n```text\n(.*?)^```$", read("README.md"), re.S | re.M
    )
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command], cwd=tmp_path, env=os.environ | {"PATH": programs}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, output), done.stderr
    assert list(tmp_path.iterdir()) == []
    answers = [line.split() for line in output.splitlines()[3:]]
    assert [("correct" in answer) for answer in answers] == [False] * 3 + [True] * 2


def test_the_map_names_every_folder_and_file_that_there_is():
    folders = {
        path.parent for part in ("modeling_looped", "data_builders", "looplab") for path in (ROOT / part).rglob("*.py")
    }
    named = {name.rstrip("/") for name in re.findall(r"`([\w/]+/)`", read("docs/design/code_map.md"))}
    assert {str(folder.relative_to(ROOT)) for folder in folders} - {"looplab", "looplab/tasks"} <= named
    files = {path.name for path in (ROOT / "modeling_looped").glob("*_looped.py")}
    assert files <= set(re.findall(r"`(?:modeling_looped/)?(\w+\.py)`", read("docs/design/forward_pass.md")))


def test_the_methods_of_a_task_are_those_of_the_page():
    """The table of docs/design/tasks_and_systems.md against what the verbs of `looped` ask of a task."""
    lines = re.findall(
        r"^\| ([`\w, ]+) \| `(?:looped )?([\w.]+)` \|", read("docs/design/tasks_and_systems.md"), re.MULTILINE
    )
    methods = {verb: set(re.findall(r"\w+", names)) for names, verb in lines}
    assert methods.pop("train") == {"training"}
    assert set(methods) == set(METHODS)
    for verb, names in methods.items():
        assert set(METHODS[verb]) <= names
        assert all(callable(getattr(Task, name)) for name in names)


def test_the_named_verbs_are_those_of_every_object():
    """The table of docs/guides/add_a_system.md against all connections, policies, rules and objectives there are."""
    page = read("docs/guides/add_a_system.md")
    table = {
        kind: re.findall(r"`(\w+)`", verbs)
        for kind, verbs in re.findall(r"^\| ([\w ]+) \| `\w+\.py` \| (.*?) \|", page, flags=re.M)
    }
    streams = {"hyper": {"max_num_loops": 3}}
    objects = {
        "loop connection": [
            kind.of(config)(config)
            for name, kind in CONNECTIONS.items()
            for config in [make_config(loop_connection=name, **streams.get(name, {}))]
        ],
        "KV policy": [kind(make_config(kv_sharing=name)) for name, kind in SHARINGS.items()],
        "halting rule": [rule() for rule in RULES.values()],
        "objective": [kind(make_config(exit_gate=True)) for kind in EXIT_LOSSES.values()],
    }
    assert set(table) == set(objects)
    for kind, verbs in table.items():
        assert verbs
        assert [(one, verb) for one in objects[kind] for verb in verbs if not callable(getattr(one, verb))] == []


# ---- results

# The page of a study is drawn from its rows, and tests/study/test_study.py holds it to them.
STUDIES = {path.stem for path in (ROOT / "studies").rglob("*.yaml")}
RESULTS = [page for page in PAGES if page.startswith("docs/results/") and Path(page).stem not in STUDIES]
# By formulas, which tests/training/test_recipes.py and tests/planning/test_plan.py compute again.
COMPUTED = ("docs/results/paper_scale.md", "docs/results/plans.md")


def numbers(text: str) -> set[str]:
    return {number.rstrip(",").replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


@pytest.mark.parametrize("page", ["README.md", *RESULTS])
def test_every_number_in_a_table_of_results_stands_in_the_log(page):
    """What a page says was measured once, and the log says how: the numbers of a cell are in one place of it."""
    if page in COMPUTED:
        return
    log = read("LOG.md")
    places = [numbers(line) for line in re.findall(r"^\|.*$", log, flags=re.M)]
    places += [numbers(paragraph) for paragraph in re.split(r"\n\s*\n|^[-|]", log, flags=re.M)]
    own = re.sub(r"^<!-- study .*?^<!-- end of study -->", "", prose_of(page), flags=re.S | re.M)
    tables = re.sub(r"`[^`]*`|\]\([^)]*\)", "", "\n".join(re.findall(r"^\|.*$", own, flags=re.M)))
    for cell in {cell.strip() for cell in re.split(r"[|\n]", tables)}:
        assert any(numbers(cell) <= place for place in places), cell


@pytest.mark.parametrize("page", RESULTS)
def test_results_begin_with_the_command_and_lead_to_the_log(page):
    text = read(page)
    assert 0 < text.index("```sh") < text.index("\n|")
    assert re.search(r"\]\(\.\./\.\./LOG\.md#", text)
