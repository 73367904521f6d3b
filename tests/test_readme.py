"""The README's code runs, and what it names exists: peers' READMEs call functions and files that are not there."""

import re
from pathlib import Path

from data_builders.tokenizers import hop_tokenizer
from toys import make_model

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


def test_named_files_exist():
    names = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|txt|toml))`", README)
    names += re.findall(r"\]\(([\w./-]+)\)", README)
    made_by_a_run = {name for name in names if name.startswith("runs/")}
    assert [name for name in names if name not in made_by_a_run and not (ROOT / name).exists()] == []


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert set(re.findall(r"make (\w+)", README)) <= set(targets)
