"""Code in the README and in docs/ runs, and what it names exists: peers' READMEs call functions that are not there."""

import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from families import make_frozen

from data_builders.tokenizers import hop_tokenizer, train_byte_bpe
from modeling_looped import LoopedForCausalLM
from toys import FP32, make_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.generation_config.max_new_tokens = 1
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "runs/quickstart/model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 5


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.S)


def test_the_example_of_a_frozen_model_runs(tmp_path, monkeypatch):
    tokenizer = train_byte_bpe(["The capital of France is Paris. The capital of Spain is Madrid."], 270)
    model = make_frozen("llama", dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    [block] = blocks_of("results/frozen.md")
    names = {}
    exec(compile(block.replace("window=(12, 15)", "window=(2, 4)"), "docs/results/frozen.md", "exec"), names)
    assert names["again"].loop.config.window == [2, 4]
    assert [path.name for path in (tmp_path / "smollm2-looped").glob("*.safetensors")] == []


def test_the_example_of_hyperloop_runs():
    [block] = blocks_of("results/hyperloop.md")
    names = {}
    exec(compile(block, "docs/results/hyperloop.md", "exec"), names)
    assert len(names["model"].model.connection.gates) == 3


def test_the_example_of_melt_runs():
    [block] = blocks_of("results/melt.md")
    exec(compile(block, "docs/results/melt.md", "exec"), {})  # it checks itself


def test_the_example_of_exits_and_drafts_runs(capsys):
    names = {}
    for block in blocks_of("results/drafts_and_halting.md"):
        exec(compile(block, "docs/results/drafts_and_halting.md", "exec"), names)
    assert torch.equal(names["text"].sequences, names["plain"])
    assert len(capsys.readouterr().out.splitlines()) == 3


# TRL 1.16 uses the old names of activation checkpointing; a CPU may have no bfloat16 to recommend.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.slow
def test_the_examples_of_clients_run(tmp_path, monkeypatch, capsys):
    """With a run of random weights, on the CPU, in as few steps as show it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=1)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "runs/quickstart/model")
    dataset = Dataset.from_list([{"text": f"e{i} r1 r2 e3"} for i in range(16)])
    sft, generator, server, export = blocks_of("guides/clients.md")
    for block in (sft.replace("max_steps=10", "max_steps=1, disable_tqdm=True, use_cpu=True, bf16=False"), generator):
        exec(compile(block, "docs/guides/clients.md", "exec"), {"dataset": dataset})
    assert "e7 r0 r3 r1" in capsys.readouterr().out
    exec(compile(server, "docs/guides/clients.md", "exec"), {})
    reloaded = LoopedForCausalLM.from_pretrained(tmp_path / "runs/quickstart/model")
    assert reloaded.generation_config.to_dict()["num_loops"] == 8
    names = {}
    exec(compile(export.replace("num_loops=8", "num_loops=2"), "docs/guides/clients.md", "exec"), names)
    ids = torch.tensor([[7, 8, 9, 10]])
    torch.testing.assert_close(names["program"].module()(ids), reloaded(ids, num_loops=2).logits, **FP32)
    [task] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guides/clients.md").read_text(), flags=re.S)
    assert yaml.safe_load(task)["doc_to_text"].endswith("<ans>")


def test_the_example_of_molecules_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(ROOT)
    [block] = blocks_of("results/molecules.md")
    names = {}
    exec(compile(block, "docs/results/molecules.md", "exec"), names)
    assert 2.0 < names["loss"].item() < 5.0
    assert names["written"].shape[1] > 1


def test_named_files_exist():
    names = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|txt|toml))`", README)
    names += re.findall(r"\]\(([\w./-]+)\)", README)
    made_by_a_run = {name for name in names if name.startswith("runs/")}
    assert [name for name in names if name not in made_by_a_run and not (ROOT / name).exists()] == []


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"make ([\w-]+)", README)) <= set(targets)
