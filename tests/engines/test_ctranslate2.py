"""CTranslate2 runs the stock model of `looped export --to transformers`, and keeps one copy of the looped weights."""

import pytest
import torch

from exports import rough_model, tokenizer_of
from looplab.export.exporting import export

ctranslate2 = pytest.importorskip("ctranslate2", reason="not installed here: make test-engines")


@torch.no_grad()
def test_it_keeps_one_copy_of_the_weights_and_gives_the_same_tokens(tmp_path):
    tokenizer = tokenizer_of("text")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(tokenizer)}
    model = rough_model(**sizes, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id)
    folders = {}
    for num_loops in (1, 9):
        done = export(model, tokenizer, tmp_path / f"llama-{num_loops}", "transformers", num_loops=num_loops)
        folders[num_loops] = tmp_path / f"ct2-{num_loops}"
        ctranslate2.converters.TransformersConverter(str(done.path)).convert(str(folders[num_loops]))
    shallow, deep = ((folder / "model.bin").stat().st_size for folder in folders.values())
    assert deep < shallow + 100_000  # names of 16 more layers, and no weights
    generator = ctranslate2.Generator(str(folders[9]), inter_threads=1, intra_threads=1)
    ids = tokenizer("A loop is", return_tensors="pt").input_ids
    made = model.generate(ids, num_loops=9, max_new_tokens=12, do_sample=False)[0].tolist()
    start = tokenizer.convert_ids_to_tokens(ids[0])
    found = generator.generate_batch([start], max_length=12, sampling_topk=1, include_prompt_in_result=False)
    assert found[0].sequences_ids[0] == made[len(start) :]
