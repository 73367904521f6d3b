"""docs/guides/teach_pretrained.md from its first line to its last, with a tiny dense model for the fetched one."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from chat_toys import CHATML
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from data_builders import train_byte_bpe
from looplab.cli import main
from looplab.pretrained.parts import PARTS, part_folder
from modeling_looped import LoopedForCausalLM
from toys import ROOT

PAGE = ROOT / "docs/guides/teach_pretrained.md"


def a_stand_in(folder: Path) -> None:
    """A Llama of six layers where `looped fetch smollm2` leaves its model."""
    tokenizer = train_byte_bpe(["system user assistant Add. 0 1 2 3 4 5 6 7 8 9 + "], 270)
    tokenizer.chat_template = CHATML
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **ends))
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    (folder / "source.json").write_text(json.dumps({"wheel_sha256": PARTS["smollm2"].sha256}))


def looped(line: str) -> str:
    """What a command line prints. `$(..)` is what the command in it prints, as in a shell."""
    line = re.sub(r"\$\(looped (.*?)\)", lambda found: looped(found[1]).strip(), line)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(shlex.split(line)) == 0, line
    return printed.getvalue()


# TRL 1.16 and PEFT 0.21 use the old names of activation checkpointing.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_pretrained_model_is_taught_as_the_guide_says(tmp_path, monkeypatch, capsys):
    """Every block as printed but `pip`: converted, trained, merged, asked and measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    a_stand_in(part_folder("smollm2"))
    names, told = {}, ""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), names)
        for line in block.replace("\\\n", " ").splitlines() if language == "sh" else ():
            told += looped(line.removeprefix("looped ")) if line.startswith("looped ") else ""
    assert {language for language, _ in blocks} == {"python", "sh"}
    start, taught = (LoopedForCausalLM.from_pretrained(f"runs/smollm2_{name}") for name in ("looped", "sums"))
    changed = {
        name
        for (name, before), after in zip(start.named_parameters(), taught.parameters(), strict=True)
        if not before.equal(after)
    }
    assert changed == {name for name, _ in taught.named_parameters() if re.search(r"core\..*_proj|connection", name)}
    assert taught.generation_config.num_loops == 4
    assert len(set(names["collator"].depth(update) for update in range(20))) == 4
    grades = re.findall(r"^ +([2-5]) +200 \|(.*?)\|", told, flags=re.M)
    assert [grade for grade, _ in grades] == ["2", "3", "4", "5"]
    assert all(len(shares.split()) == 3 for _, shares in grades)
