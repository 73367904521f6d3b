"""CTranslate2 runs the unrolled Llama of `looped export --to transformers`, and keeps its weights once."""

import json

import numpy as np
import pytest
import torch

from exports import rough_model, tokenizer_of
from looplab.export.exporting import export
from toys import FP32, make_ids

ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed here: make test-engines")

SHAPES = {"plain": {}, "prelude and coda": {"num_prelude_layers": 1, "num_coda_layers": 2}}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hops", "molecules"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_holds_one_copy_of_layers_that_are_written_eight_times(shape, kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    model = rough_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SHAPES[shape])
    folder = export(model, tokenizer, tmp_path / "llama", "transformers", num_loops=8).path
    converted = tmp_path / "ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
    settings = json.loads((converted / "config.json").read_text())
    if settings["bos_token"] is None:  # it loads no model without one, and the tokenizer of hops has none
        settings["bos_token"] = settings["eos_token"]
        (converted / "config.json").write_text(json.dumps(settings))

    weights = 4 * model.num_parameters()  # bytes
    names = 20_000  # bytes at most: of every tensor of every layer call the name, and of which it is the same
    assert (converted / "model.bin").stat().st_size < weights + names
    assert (folder / "model.safetensors").stat().st_size > 3 * weights  # the file that it was made from

    generator = ctranslate2.Generator(str(converted), intra_threads=1)
    ids = make_ids(1, 9) % len(tokenizer)
    found = torch.from_numpy(np.array(generator.forward_batch(ids.tolist())))
    torch.testing.assert_close(found, model(ids, num_loops=8).logits, **FP32)
