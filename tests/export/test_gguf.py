"""`looped export --to gguf`, read by others: the reader of the package gguf, and the loader of transformers.

tests/engines/test_llama_cpp.py has what llama.cpp itself makes of the files.
"""

import gguf
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from exports import GELU, GGUF_LOOPING, TOKENIZERS, rough_model, tokenizer_of
from looplab.export.exporting import export
from looplab.export.gguf_tokenizer import LLAMA3, QWEN2, read_vocabulary
from toys import FP32, make_ids, make_model

# transformers reads no rope of its own from these files, no head size of a qwen3, and no share of a head that a
# stablelm rotates.
READ_BY_TRANSFORMERS = {
    "llama": {"num_prelude_layers": 1, "num_coda_layers": 2},
    "llama, untied": {"num_coda_layers": 1, "tie_word_embeddings": False},
    "qwen3": {"qk_norm": True, "num_coda_layers": 1, "head_dim": 128},
    "starcoder2": GELU,
}


def read(path) -> tuple[dict, dict]:
    """The keys of a GGUF file, and its tensors in float32."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return keys, {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}


@torch.no_grad()
@pytest.mark.parametrize("shape", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_model_from_the_file(shape, tmp_path):
    model, ids = rough_model(**READ_BY_TRANSFORMERS[shape]), make_ids(2, 11)
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf", num_loops=4)
    assert done.architecture == shape.split(",")[0]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="new.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    torch.testing.assert_close(loaded(ids).logits, model(ids, num_loops=4).logits, **FP32)


@pytest.mark.parametrize("shape", GGUF_LOOPING)
def test_a_looping_file_is_a_llama_of_one_loop_with_two_more_keys(shape, tmp_path):
    """The tensors are those of a llama, which transformers reads above; each layer is there once."""
    model = rough_model(**GGUF_LOOPING[shape])
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf", num_loops=5)
    keys, tensors = read(done.path)
    assert keys["general.architecture"] == "nanbeige"
    assert keys["nanbeige.num_loops"] == 5
    assert keys["nanbeige.skip_loop_final_norm"] == (not model.config.norm_between_loops)  # absent, it would be False
    assert keys["nanbeige.block_count"] == model.config.num_core_layers
    norm = model.model.core_norm if model.config.norm_between_loops else model.model.norm
    assert tensors["output_norm.weight"].equal(norm.weight.data)
    assert ("output.weight" in tensors) is (not model.config.tie_word_embeddings)
    for index, layer in enumerate(model.model.core):
        assert tensors[f"blk.{index}.ffn_down.weight"].equal(layer.mlp.down_proj.weight.data)
        rows = layer.self_attn.q_proj.weight.data.unflatten(0, (-1, 2, model.config.head_dim // 2))
        together = tensors[f"blk.{index}.attn_q.weight"].unflatten(0, (len(rows), -1, 2))
        assert together[:, :, 0].equal(rows[:, 0])
        assert together[:, :, 1].equal(rows[:, 1])
    # What llama.cpp divides the plain frequencies by gives those of the model.
    channels = model.config.head_dim
    plain = 10_000.0 ** (-torch.arange(0, channels, 2) / channels)
    found = plain / tensors["rope_freqs.weight"]
    if model.config.position_embedding == "none":
        assert found.max() < 1e-29
    else:
        torch.testing.assert_close(found, model.model.positions.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("quantize", "kinds"), [("f16", {"F16"}), ("q8_0", {"Q8_0", "F16"}), ("q4_0", {"Q4_0", "Q8_0", "F16"})]
)
def test_rows_that_no_group_divides_stay_float16(quantize, kinds, tmp_path):
    model = make_model(hidden_size=64, intermediate_size=80)
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf", quantize)
    stored = {tensor.name: (tensor.tensor_type.name, tensor.shape) for tensor in GGUFReader(done.path).tensors}
    assert {kind for name, (kind, shape) in stored.items() if len(shape) == 2} == kinds
    assert {kind for name, (kind, shape) in stored.items() if len(shape) == 1} == {"F32"}
    if "q" in quantize:
        assert {name for name, (kind, _) in stored.items() if kind == "F16"} == {
            f"blk.{i}.ffn_down.weight" for i in range(2)
        }
        assert stored["token_embd.weight"][0] == "Q8_0"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_id_of_a_tokenizer_is_left_to_llama_cpp(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    size = len(tokenizer) + 3  # a model may have embeddings that no token uses
    model = make_model(vocab_size=size, eos_token_id=tokenizer.eos_token_id)
    done = export(model, tokenizer, tmp_path / "new.gguf", "gguf")
    assert any("use llama-server" in remark for remark in done.remarks) is (kind == "hops")
    keys, _ = read(done.path)
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == len(keys["tokenizer.ggml.token_type"]) == size
    assert [tokenizer.convert_tokens_to_ids(token) for token in tokens[:-3]] == list(range(size - 3))
    ends = {keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    assert tokenizer.eos_token_id in ends
    assert keys["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert keys["tokenizer.ggml.add_bos_token"] is (kind == "molecules")
    assert keys["tokenizer.ggml.add_eos_token"] is (kind == "hops")  # "<ans>", where the answer is read
    assert keys["tokenizer.ggml.merges"]
    asked = tokenizer("", add_special_tokens=True).input_ids
    before = [keys["tokenizer.ggml.bos_token_id"]] if keys["tokenizer.ggml.add_bos_token"] else []
    after = [keys["tokenizer.ggml.eos_token_id"]] if keys["tokenizer.ggml.add_eos_token"] else []
    assert [*before, *after] == asked


def make_tokenizer(model=None, pre=None, normalizer=None, post=None, **special) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<b>", *alphabet])}
    tokenizer = Tokenizer(model or BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if post is not None:
        tokenizer.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", **special})


def split(pattern: str):
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def twice(token: str):
    return processors.TemplateProcessing(single=f"{token} {token} $A", special_tokens=[(token, 1)])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
WORDS = {"<eos>": 0, "a": 1, "b": 2}
KNOWN = {
    "trillion": {},
    "smollm": {"pre": DIGITS},
    "llama-bpe": {"pre": split(LLAMA3), "model": BPE({"<eos>": 0, "a": 1}, [], ignore_merges=True)},
    "qwen2": {"pre": split(QWEN2), "normalizer": normalizers.NFC()},
}
UNKNOWN = {
    "does not know how it cuts": {"pre": split(r"\d+")},
    "cuts a text into words": {"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "changes the text first": {"normalizer": normalizers.Lowercase()},
    "neither byte-level BPE nor": {"model": BPE({"<eos>": 0, "a": 1, "<unk>": 2}, [], unk_token="<unk>")},
    "neither at spaces nor as SMILES": {"model": WordLevel(WORDS), "pre": pre_tokenizers.Whitespace()},
    "a word of it has a space": {"model": WordLevel(WORDS | {"a b": 3}), "pre": pre_tokenizers.WhitespaceSplit()},
    "more than a token before or after": {"post": twice("<b>")},
    "has an eos_token_id": {"eos_token": None},
    "tokens up to": {"vocab_size": 100},
    "on three tokens at most": {"end": [0, 1, 2, 3]},
}


@pytest.mark.parametrize("name", KNOWN)
def test_llama_cpp_is_told_how_a_text_is_cut(name):
    assert read_vocabulary(make_tokenizer(**KNOWN[name]), 300, []).pattern == name


@pytest.mark.parametrize("said", UNKNOWN)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(said):
    case = dict(UNKNOWN[said])
    size, end = case.pop("vocab_size", 300), case.pop("end", [])
    with pytest.raises(ValueError, match=f"cannot be written to GGUF: .*{said}.*; export to mlx"):
        read_vocabulary(make_tokenizer(**case), size, end)


def test_more_layers_than_llama_cpp_has_are_refused(tmp_path):
    """It would end the process."""
    for fields, most in (({}, 256), ({"num_coda_layers": 2}, 255)):
        model, path = make_model(**fields), tmp_path / "new.gguf"
        with pytest.raises(ValueError, match="beyond 512"):
            export(model, tokenizer_of("hops"), path, "gguf", num_loops=most + 1)
        assert not list(tmp_path.iterdir())
    export(make_model(), tokenizer_of("hops"), path, "gguf", num_loops=256)


def test_a_file_that_is_there_stays(tmp_path):
    path = tmp_path / "new.gguf"
    path.write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        export(make_model(), tokenizer_of("hops"), path, "gguf")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("target", ["gguf", "mlx", "transformers"])
def test_it_is_written_whole_or_not_at_all(target, tmp_path):
    with pytest.raises(NotImplementedError):
        export(make_model().to("meta"), tokenizer_of("hops"), tmp_path / "new", target)
    assert not list(tmp_path.iterdir())


def test_transformers_reads_the_tokenizer_from_the_file(tmp_path):
    tokenizer = tokenizer_of("text")
    model = make_model(vocab_size=len(tokenizer), num_coda_layers=1, eos_token_id=tokenizer.eos_token_id)
    export(model, tokenizer, tmp_path / "new.gguf", "gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="new.gguf")
    text = "A loop of 12 layers, don't you think?  "
    assert theirs(text).input_ids == tokenizer(text).input_ids
