"""What llama.cpp makes of the files of `looped export --to gguf`. `make test-engines` builds it, which takes minutes.

Keys and values are kept in float32 and flash attention is off, so that only rounding is left; by default llama.cpp
keeps them in float16.
"""

import copy

import gguf
import numpy as np
import pytest
import torch

from exports import GGUF_GELU, GGUF_LOOPING, GGUF_UNROLLED, TOKENIZERS, rough_model, texts_of, tokenizer_of
from looplab.export.exporting import export
from looplab.export.gguf_file import KINDS
from toys import FP32, make_ids

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not built here: make test-engines")

TOKENS = 33
F32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}


@pytest.fixture
def load():
    """Load a file, by default or at another depth; all are closed at the end."""
    opened = []

    def load(path, num_loops=None, **settings):
        override = None if num_loops is None else {"nanbeige.num_loops": num_loops}
        llama = llama_cpp.Llama(
            str(path),
            n_ctx=64,
            n_threads=1,
            n_threads_batch=1,
            kv_overrides=override,
            verbose=False,
            **{**F32, "logits_all": True, **settings},
        )
        opened.append(llama)
        return llama

    yield load
    for llama in opened:
        llama.close()


def logits(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)]))


def greedy(llama, ids: list[int], new_tokens: int) -> list[int]:
    made = []
    for token in llama.generate(ids, temp=0.0):
        made.append(token)
        if len(made) == new_tokens:
            return made
    raise AssertionError("it ended by itself")


@torch.no_grad()
@pytest.mark.parametrize("shape", GGUF_LOOPING)
def test_the_depth_is_set_when_the_file_is_loaded(shape, load, tmp_path):
    model, ids = rough_model(**GGUF_LOOPING[shape]), make_ids(1, TOKENS)
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf", num_loops=5)
    assert done.loops_there
    for num_loops, override in {5: None, 1: 1, 3: 3, 6: 6, 16: 16}.items():
        llama = load(done.path, override)
        expected = model(ids, num_loops=num_loops).logits[0]
        torch.testing.assert_close(logits(llama, ids[0].tolist()), expected, **FP32)
        made = model.generate(ids[:, :5], num_loops=num_loops, max_new_tokens=12, do_sample=False)
        assert greedy(llama, ids[0, :5].tolist(), 12) == made[0, 5:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("shape", GGUF_UNROLLED)
def test_unrolled_layers_have_the_depth_they_were_written_with(shape, load, tmp_path):
    model, ids = rough_model(**GGUF_UNROLLED[shape]), make_ids(1, TOKENS)
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf", num_loops=4)
    assert not done.loops_there
    found = logits(load(done.path), ids[0].tolist())
    torch.testing.assert_close(found, model(ids, num_loops=4).logits[0], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("shape", GGUF_GELU)
def test_the_gelu_of_llama_cpp_is_a_table_of_float16(shape, load, tmp_path):
    model, ids = rough_model(**GGUF_GELU[shape]), make_ids(1, TOKENS)
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf", num_loops=4)
    found, expected = logits(load(done.path), ids[0].tolist()), model(ids, num_loops=4).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_goes_in_and_comes_out_as_with_the_model(kind, load, tmp_path):
    tokenizer = tokenizer_of(kind)
    eos = tokenizer.eos_token_id
    model = rough_model(vocab_size=len(tokenizer) + 3, eos_token_id=eos, bos_token_id=tokenizer.bos_token_id)
    model.get_input_embeddings().weight.data[len(tokenizer) :] = 0  # ids without a token, which are never written
    llama = load(export(model, tokenizer, tmp_path / "new.gguf", "gguf").path)
    special = set(tokenizer.all_special_ids)
    for text in texts_of(kind):
        ids = tokenizer(text).input_ids
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
        words = [token for token in ids if token not in special]
        joined = tokenizer.decode(words) if kind == "text" else "".join(tokenizer.convert_ids_to_tokens(words))
        assert llama.detokenize(words).decode(errors="replace") == joined
    for text in texts_of(kind)[:6]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] > 50 or "<" in text:
            continue
        made = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
        if eos not in made:
            assert greedy(llama, ids[0].tolist(), 6) == made
        words = [token for token in made if token not in special]
        joined = tokenizer.decode(words) if kind == "text" else "".join(tokenizer.convert_ids_to_tokens(words))
        if "\ufffd" in joined:  # bytes that are no text, of which a toy writes many: the call waits for their end
            continue
        # The high-level call tokenizes, generates, ends and decodes.
        said = llama(text, max_tokens=6, temperature=0.0)["choices"][0]["text"]
        assert said == joined or special & set(made)


def rounded(model, quantize: str):
    """The model with the numbers that a file of it holds."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            kind = KINDS["q8_0" if quantize == "q4_0" and "embed_tokens" in name else quantize][0]
            stored = gguf.quants.quantize(parameter.data.numpy(), kind)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(stored, kind).copy()).view_as(parameter)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("quantize", "least"), [("f16", 0.99999), ("q8_0", 0.999), ("q4_0", 0.999)])
def test_fewer_bits_cost_at_any_depth_what_they_cost_the_weights(quantize, least, load, tmp_path):
    """llama.cpp also rounds what it multiplies with these weights, to 8 bits."""
    model, ids = rough_model(hidden_size=64, intermediate_size=96), make_ids(1, TOKENS)
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf", quantize)
    expected = rounded(model, quantize)
    for num_loops in (1, 6, 16):
        found = logits(load(done.path, num_loops), ids[0].tolist())
        near = torch.cosine_similarity(found, expected(ids, num_loops=num_loops).logits[0], dim=-1)
        assert near.mean() > least


@torch.no_grad()
def test_the_default_cache_of_llama_cpp_rounds_to_float16(load, tmp_path):
    model, ids = rough_model(), make_ids(1, TOKENS)
    done = export(model, tokenizer_of("hops"), tmp_path / "new.gguf", "gguf")
    half = {"type_k": llama_cpp.GGML_TYPE_F16, "type_v": llama_cpp.GGML_TYPE_F16}
    found = logits(load(done.path, **half), ids[0].tolist())
    torch.testing.assert_close(found, model(ids).logits[0], rtol=0, atol=2e-2)
