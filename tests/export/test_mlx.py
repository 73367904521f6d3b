"""`looped export --to mlx`: mlx-lm, on the CPU, gives the logits and the tokens of the model."""

import json

import numpy as np
import pytest
import torch

from exports import MLX_LOOPING, MLX_UNROLLED, TOKENIZERS, rough_model, texts_of, tokenizer_of
from looplab.export.exporting import export
from toys import FP32, make_ids

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx has no wheel for Windows: pip install 'looped-transformers[mlx]'")
mx = pytest.importorskip("mlx.core")

# transformers warns of a configuration of mlx's: it knows neither the architecture nor the older names of rope.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")


def logits(loaded, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(loaded(mx.array(ids.numpy())).astype(mx.float32)))


@torch.no_grad()
@pytest.mark.parametrize("shape", MLX_LOOPING)
def test_the_depth_is_set_when_the_folder_is_loaded(shape, tmp_path):
    model, ids = rough_model(**MLX_LOOPING[shape]), make_ids(2, 11)
    done = export(model, tokenizer_of("hops"), tmp_path / "new", "mlx", num_loops=5)
    assert (done.architecture, done.layers, done.loops_there) == ("nanbeige", model.config.num_core_layers, True)
    for num_loops, settings in {5: {}, **{k: {"num_loops": k} for k in (1, 3, 6, 16)}}.items():
        loaded, _ = mlx_lm.load(str(done.path), model_config=settings)
        torch.testing.assert_close(logits(loaded, ids), model(ids, num_loops=num_loops).logits, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("shape", MLX_UNROLLED)
def test_unrolled_layers_have_the_depth_they_were_written_with(shape, tmp_path):
    model, ids = rough_model(**MLX_UNROLLED[shape]), make_ids(2, 11)
    done = export(model, tokenizer_of("hops"), tmp_path / "new", "mlx", num_loops=4)
    assert not done.loops_there
    loaded, _ = mlx_lm.load(str(done.path))
    torch.testing.assert_close(logits(loaded, ids), model(ids, num_loops=4).logits, **FP32)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_goes_in_and_comes_out_as_with_the_model(kind, tmp_path):
    tokenizer, new_tokens = tokenizer_of(kind), 6
    eos = tokenizer.eos_token_id
    model = rough_model(vocab_size=len(tokenizer), eos_token_id=eos, bos_token_id=tokenizer.bos_token_id)
    done = export(model, tokenizer, tmp_path / "new", "mlx")
    loaded, theirs = mlx_lm.load(str(done.path))
    for text in texts_of(kind)[:12]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert theirs.encode(text) == ids[0].tolist()
        made = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()
        said = list(mlx_lm.stream_generate(loaded, theirs, ids[0].tolist(), max_tokens=new_tokens))
        assert [each.token for each in said] == made
        words = made[: made.index(eos)] if eos in made else made
        expected = tokenizer.decode(words) if kind == "text" else "".join(tokenizer.convert_ids_to_tokens(words))
        if "\ufffd" not in expected:  # bytes that are no text, of which a toy writes many
            assert "".join(each.text for each in said) == expected.removeprefix(" ")  # mlx-lm begins with no space
    if kind != "text":
        with pytest.raises(Exception, match="WordLevel"):  # a word that nobody knows is an error there, too
            theirs.encode("e1 x" if kind.startswith("hops") else "Xx")


@torch.no_grad()
@pytest.mark.parametrize(("quantize", "bits", "least"), [("f16", 16, 0.9999), ("q8_0", 10, 0.999), ("q4_0", 6, 0.9)])
def test_fewer_bits_are_near_and_small(quantize, bits, least, tmp_path, capsys):
    model, ids = rough_model(hidden_size=64, intermediate_size=96, norm_between_loops=True), make_ids(2, 11)
    done = export(model, tokenizer_of("hops"), tmp_path / "new", "mlx", quantize)
    capsys.readouterr()
    loaded, _ = mlx_lm.load(str(done.path), model_config={"num_loops": 6})
    expected = model(ids, num_loops=6).logits
    assert torch.cosine_similarity(logits(loaded, ids), expected, dim=-1).mean() > least
    weights = sum(file.stat().st_size for file in done.path.glob("*.safetensors"))
    assert weights < 1.15 * model.num_parameters() * bits / 8 + 4000  # the head of the file
    assert json.loads((done.path / "config.json").read_text())["model_type"] == "nanbeige"
