"""The guides in docs/: their examples run, and the files, tests and names they send a reader to exist."""

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.state import AcceleratorState

import train
from data_builders import hop_tokenizer
from looplab.cli import main
from looplab.recipe import build_recipe
from looplab.yaml_text import parse_yaml
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.configuration_looped import LoopedConfig
from modeling_looped.connections_looped import CONNECTIONS
from modeling_looped.halting_looped import RULES
from toys import make_config, make_model, write_pages

ROOT = Path(__file__).parents[1]
GUIDES = ("train_your_own_data.md", "add_a_system.md", "tune_loops.md", "demo.md")


def blocks_of(page: str, language: str = "python") -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / "guides" / page).read_text(), flags=re.S | re.M)
    return [block for name, block in fences if name == language]


def run_blocks(page: str, blocks: list[str]) -> dict:
    """The names that the blocks leave, run one after the other."""
    names = {}
    for block in blocks:
        exec(compile(block, f"docs/guides/{page}", "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, with a datasets cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", GUIDES)
def test_what_a_guide_names_exists(page):
    text = (ROOT / "docs" / "guides" / page).read_text()
    files = re.findall(r"`((?:docs|tests|recipes|hub_cards|looplab|modeling_looped|data_builders)/[\w./-]*)`", text)
    files += [f"docs/guides/{name}" for name in re.findall(r"\]\(([\w./-]+)\)", text)]
    assert [name for name in files if not (ROOT / name).exists()] == []
    code = "\n".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in code] == []


@pytest.mark.parametrize("page", GUIDES)
def test_the_commands_of_a_guide_exist(page):
    commands = re.findall(r"^looped (\w+)", "\n".join(blocks_of(page, "")), flags=re.M)
    assert commands or page == "add_a_system.md"
    for command in commands:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0


# ---- train_your_own_data.md


@pytest.mark.slow
def test_text_of_your_own_trains_and_is_evaluated(folder):
    [recipe] = blocks_of("train_your_own_data.md", "yaml")
    write_pages(folder / "notes" / "2026")
    (folder / "notes.yaml").write_text(recipe)
    shorter = ["--max_steps", "2", "--batch_size", "4", "--data.vocab_size", "300", "--checkpoint_every", "2"]
    train.main(train.read_recipe("notes.yaml", shorter))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["eval", "runs/notes"]) == 0
    rows = [json.loads(line) for line in Path("runs/notes/text.jsonl").read_text().splitlines()]
    assert {row["loops"] for row in rows} >= {1, 2, 4, 8}


def test_a_recipe_with_a_dataset_and_a_wider_graph_is_accepted():
    [recipe] = blocks_of("train_your_own_data.md", "yaml")
    page = (ROOT / "docs" / "guides" / "train_your_own_data.md").read_text()
    [dataset] = re.findall(r"`data.overrides: (\{.*\})`", page)
    [wider] = re.findall(r'--data.overrides "(\{.*\})"', page)
    values = parse_yaml(recipe, "the guide")
    values["data"] |= {"files": None, "overrides": yaml.safe_load(dataset)}
    assert build_recipe(values).data.overrides["column"] == "text"
    assert train.read_recipe(ROOT / "recipes" / "quickstart.yaml", ["--name", "wide", "--data.overrides", wider])


def test_facts_of_your_own_are_learnt(folder, capsys):
    [rows] = blocks_of("train_your_own_data.md", "json")
    (folder / "questions.jsonl").write_text(rows)
    facts, _ = blocks_of("train_your_own_data.md")
    run_blocks("train_your_own_data.md", [facts])
    assert capsys.readouterr().out.split()[-1] == "e2"
    assert (folder / "family" / "modeling_looped.py").exists()


def test_molecules_of_your_own_are_read(folder, capsys):
    (folder / "mine.csv").write_text("name,smiles\n" + "".join(f"m{n},{'C' * n}C(=O)Cl\n" for n in range(60)))
    _, molecules = blocks_of("train_your_own_data.md")
    names = run_blocks("train_your_own_data.md", [molecules])
    assert sum(len(split) for split in names["molecules"].values()) == 60
    assert "'Cl'" in capsys.readouterr().out


# ---- add_a_system.md


def test_the_new_connection_and_the_new_rule_work(capsys):
    names = run_blocks("add_a_system.md", blocks_of("add_a_system.md"))
    used = names["output"].loops_used
    assert used.shape == (2, 3)
    assert 1 <= used.min() < 16


def test_the_named_verbs_are_those_of_every_object():
    page = (ROOT / "docs" / "guides" / "add_a_system.md").read_text()
    table = {
        kind: re.findall(r"`(\w+)`", verbs)
        for kind, verbs in re.findall(r"^\| ([\w ]+) \| `\w+\.py` \| (.*?) \|", page, flags=re.M)
    }
    connections = [
        CONNECTIONS[name](make_config(loop_connection=name, **({"max_num_loops": 3} if name == "hyper" else {})))
        for name in CONNECTIONS
    ]
    objects = {
        "loop connection": connections,
        "KV sharing": [SHARINGS[name](make_config(kv_sharing=name)) for name in SHARINGS],
        "halting rule": [rule() for rule in RULES.values()],
    }
    assert set(table) == set(objects)
    for kind, verbs in table.items():
        assert verbs
        assert [(one, verb) for one in objects[kind] for verb in verbs if not callable(getattr(one, verb))] == []
    for name in ("loop_connection", "kv_sharing"):
        assert f"`{name}`" in page
        assert name in LoopedConfig.__annotations__


# ---- tune_loops.md


def test_the_examples_of_tuning_run(folder, capsys):
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4, readout="last")
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, residual_init="normal")
    model.generation_config.max_new_tokens = 1
    for saved in (model, tokenizer):
        saved.save_pretrained("runs/quickstart/model")
    names = run_blocks("tune_loops.md", blocks_of("tune_loops.md"))
    assert names["again"].generation_config.to_dict()["num_loops"] == 16
    assert names["again"].generation_config.to_dict()["halting"]["max_entropy"] == 1.15
    assert capsys.readouterr().out.rpartition("tensor(")[2].count("16") == 3  # "fixed" runs all loops in every row
