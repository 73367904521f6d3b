"""What a saved folder is worth where this repository does not exist."""

import json
import subprocess
import sys

import pytest
import torch

from data_builders.tokenizers import hop_tokenizer
from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForSequenceClassification, LoopedModel
from toys import FP32, make_config, make_ids, make_model, shipped_with

SHIPPED = shipped_with("configuration_looped", "modeling_looped")

STRANGER = """
import sys, warnings
warnings.simplefilter("error")
sys.path = [p for p in sys.path if "site-packages" in p or "lib/python" in p]  # no working folder, no checkout
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]  # nor an editable install
folder = sys.argv[1]
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
try:
    import modeling_looped
    raise SystemExit("the repository is importable: the test shows nothing")
except ModuleNotFoundError:
    pass
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
deeper = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_loops=7, dtype=torch.bfloat16)
assert deeper.config.num_loops == 7 and deeper.dtype == torch.bfloat16
assert AutoModelForCausalLM.from_config(config, trust_remote_code=True).config.num_loops == config.num_loops
classifier = AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(["e1 r2 r0", "e3 r1"], return_tensors="pt", padding=True)
out = {}
for loops in (1, 3, 6):
    out[loops] = model.generate(**batch, num_loops=loops, max_new_tokens=3, do_sample=False).tolist()
halted = model.generate(**batch, num_loops=9, halting={"rule": "kl", "kl_threshold": 1e9}, max_new_tokens=3,
                        do_sample=False, return_dict_in_generate=True)
assert halted.loops_used.unique().tolist() == [2]
class AtOnce(model.rule_class):
    def step(self, memory, state, readout):
        return None, torch.ones(state.shape[:2], dtype=torch.bool)
assert model(**batch, num_loops=9, halting=AtOnce()).loops_used.unique().tolist() == [1]
model.save_pretrained(folder + "/again")
import os, json
print(json.dumps({"tokens": out, "shipped": sorted(f for f in os.listdir(folder + "/again") if f.endswith(".py"))}))
"""


def save_with_tokenizer(folder, **fields):
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.slow
def test_a_stranger_loads_and_generates(tmp_path):
    model, tokenizer = save_with_tokenizer(tmp_path / "model")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.strip().splitlines()[-1])
    assert set(report["shipped"]) == SHIPPED
    batch = tokenizer(["e1 r2 r0", "e3 r1"], return_tensors="pt", padding=True)
    for loops in (1, 3, 6):
        here = model.generate(**batch, num_loops=loops, max_new_tokens=3, do_sample=False)
        assert report["tokens"][str(loops)] == here.tolist()


def test_the_folder_holds_the_code_and_nothing_else(tmp_path):
    save_with_tokenizer(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == SHIPPED | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    }


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_class", [LoopedForCausalLM, LoopedModel, LoopedForSequenceClassification])
def test_save_and_load_give_the_same_model(tmp_path, tie, model_class):
    """List-typed tied keys fail on save in transformers 5 (trap 17); MoR cannot be rebuilt from its own checkpoint
    (trap 33)."""
    torch.manual_seed(0)
    model = model_class(make_config(tie_word_embeddings=tie, num_prelude_layers=1, loop_connection="inject_concat"))
    model.eval().save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]), name
    assert model(make_ids())[0].equal(loaded(make_ids())[0])
    if model_class is LoopedForCausalLM:
        shared = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
        assert shared == tie


def test_loading_options(tmp_path):
    make_model().save_pretrained(tmp_path)
    reference = LoopedForCausalLM.from_pretrained(tmp_path)(make_ids()).logits
    mapped = LoopedForCausalLM.from_pretrained(tmp_path, device_map="cpu", attn_implementation="eager")
    torch.testing.assert_close(mapped(make_ids()).logits, reference, **FP32)
    assert LoopedForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert LoopedForCausalLM.from_pretrained(tmp_path, num_loops=9).config.num_loops == 9


def test_a_checkpoint_that_lost_half_its_bytes_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|header|offset|buffer"):
        LoopedForCausalLM.from_pretrained(tmp_path)


def test_a_misspelt_field_in_a_config_file_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_loops"', '"num_lops"'))
    with pytest.raises(ValueError, match="did you mean 'num_loops'"):
        LoopedConfig.from_pretrained(tmp_path)


def test_special_ids_are_the_tokenizers(tmp_path):
    """Ouro ships 0 for bos, eos and pad alike, so generation never stops (trap 38)."""
    _, tokenizer = save_with_tokenizer(tmp_path, eos_token_id=1)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    for config in (loaded.config, loaded.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id == 0
        assert config.eos_token_id == tokenizer.eos_token_id == 1
    assert loaded.config.vocab_size == len(tokenizer)
