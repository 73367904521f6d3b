"""Python in a model's folder that leaves a mark when it runs."""

from pathlib import Path

import torch

from toy_runs import edit_json

KINDS = ("code", "tokenizer", "model", "pickle")

EVIL = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class EvilConfig(LlamaConfig):
    model_type = "evil"

class EvilForCausalLM(LlamaForCausalLM):
    config_class = EvilConfig

class EvilTokenizer(PreTrainedTokenizerFast):
    pass

def generate(model, **kwargs):
    raise NotImplementedError
"""


class Pickled:
    """What a pickle runs when it is read."""

    def __init__(self, code: str):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def poison(folder: Path, kind: str) -> Path:
    """Code in a model's folder that leaves a mark when it runs; returns the file that it makes then."""
    mark = folder.parent / "it_ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()\n"
    if kind == "code":  # of a looped model: the copy of its classes, and what generate would look for
        for path in folder.glob("*.py"):
            path.write_text(code + path.read_text())
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code + EVIL)
    else:
        (folder / "evil.py").write_text(code + EVIL)
    if kind == "tokenizer":
        auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
        edit_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    if kind == "model":
        auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
        edit_json(folder / "config.json", model_type="evil", architectures=["EvilForCausalLM"], auto_map=auto_map)
    if kind == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": Pickled(code)}, folder / "pytorch_model.bin")
    return mark
