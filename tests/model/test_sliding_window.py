"""Laws of a sliding window: what a layer sees, what caches keep, and that nothing else changes.

That cached equals uncached, at any depth and with every policy, is stated with and without a window in test_cache.py,
test_chunks.py, test_speculation.py and, for random models, in test_properties.py.
"""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from modeling_looped import LoopedConfig, LoopedForCausalLM
from toys import FP32, KV_SHARINGS, SIZES, make_config, make_ids, make_model, open_gates

every_sharing = pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
every_window = pytest.mark.parametrize("window", [2, 3, 5])


@every_window
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("sections", [(0, 1, 0, 1), (0, 1, 0, 2), (1, 1, 0, 1), (0, 1, 1, 2), (0, 2, 0, 1)])
def test_each_layer_call_looks_back_by_a_window_and_no_further(window, attn, sections):
    """By gradient, from the last token: after n layer calls exactly the last n (window - 1) + 1 tokens are seen."""
    prelude, core, coda, loops = sections
    names = ("num_prelude_layers", "num_core_layers", "num_coda_layers", "num_loops")
    model = make_model(attn=attn, sliding_window=window, **dict(zip(names, sections, strict=True)))
    embeds = model.get_input_embeddings()(make_ids(2, 20)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, -1].sum().backward()
    reach = (prelude + core * loops + coda) * (window - 1) + 1
    assert embeds.grad[:, -reach:].abs().sum(-1).min() > 0
    assert embeds.grad[:, :-reach].abs().max() == 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside inductor
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # inside transformers
@pytest.mark.parametrize("kv_sharing", ["per_loop", "gated"])
@pytest.mark.parametrize("window", [2, 5])
def test_every_attention_sees_the_same_window(window, kv_sharing):
    fields = {"hidden_size": 64, "sliding_window": window, "kv_sharing": kv_sharing}  # flex asks for heads of 16
    attentions = ("eager", "sdpa", "flex_attention")
    logits = [open_gates(make_model(attn=attn, **fields))(make_ids(), use_cache=False).logits for attn in attentions]
    torch.testing.assert_close(logits[1], logits[0], **FP32)
    torch.testing.assert_close(logits[2], logits[0], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("num_loops", [1, 3])
@pytest.mark.parametrize("static", [False, True])
def test_loops_equal_an_unrolled_mistral(attn, num_loops, static):
    """transformers' own model of the window, past its end, in forward and in decoding, with a padded row."""
    model = make_model(attn=attn, sliding_window=3, eos_token_id=None)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(model.config, name) for name in (*names, "max_position_embeddings", "sliding_window")}
    config = MistralConfig(
        **sizes, num_hidden_layers=2 * num_loops, rms_norm_eps=model.config.norm_eps, tie_word_embeddings=True,
        rope_parameters=model.config.rope_parameters, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    mistral = MistralForCausalLM._from_config(config, attn_implementation=attn).eval()
    weights = model.state_dict()
    for name, tensor in mistral.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[1:3] = ["core", str(int(parts[2]) % 2)]
        tensor.copy_(weights[".".join(parts)])
    ids, mask = make_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    ours, theirs = model(ids, attention_mask=mask, num_loops=num_loops), mistral(ids, attention_mask=mask)
    torch.testing.assert_close(ours.logits[mask.bool()], theirs.logits[mask.bool()], **FP32)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    settings |= {"cache_implementation": "static"} if static else {}
    assert model.generate(ids, num_loops=num_loops, **settings).equal(mistral.generate(ids, **settings))


@torch.no_grad()
@every_window
@every_sharing
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_keeps_the_window_however_long_the_text(window, kv_sharing, kind):
    """Also where batch rows or whole calls loop less than others, so that entries are filled in."""
    model = open_gates(make_model(kv_sharing=kv_sharing, sliding_window=window, num_prelude_layers=1))

    def kept(tokens, num_loops):
        cache = StaticCache(config=model.config, max_cache_len=50) if kind == "static" else None
        cache = model(make_ids(3, tokens), past_key_values=cache, use_cache=True, num_loops=num_loops).past_key_values
        for loops in (num_loops, 5, 1):
            model(make_ids(3, 4), past_key_values=cache, num_loops=loops)
        assert {int(layer.get_seq_length()) for layer in cache.layers} == {tokens + 12}
        return {layer.keys.shape[2] for layer in cache.layers} | {layer.values.shape[2] for layer in cache.layers}

    for num_loops in (3, torch.tensor([1, 3, 2])):
        assert kept(5, num_loops) == kept(30, num_loops) == {window - (kind == "dynamic")}


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [(6, 1, 1), (2, 5, 1)], ids=str)
def test_a_row_of_its_own_depth_equals_that_row_alone(static, sizes):
    """Calls longer than the window have pushed entries out by the time that a row which stops early leaves its own."""
    model, ids, depths = make_model(sliding_window=3), make_ids(3, 8), torch.tensor([1, 4, 2])

    def run(rows, of_rows):
        cache = StaticCache(config=model.config, max_cache_len=8) if static else DynamicCache(config=model.config)
        turns = zip(ids[rows].split(list(sizes), dim=1), (depths, depths.flip(0), depths), strict=True)
        return torch.cat([model(t, past_key_values=cache, num_loops=of_rows(d)).logits for t, d in turns], dim=1)

    together = run(slice(3), lambda depths: depths)
    for row in range(3):
        alone = run(slice(row, row + 1), lambda depths, row=row: int(depths[row]))
        torch.testing.assert_close(together[row], alone[0], **FP32)


@torch.no_grad()
@every_window
@every_sharing
def test_a_packed_sequence_is_what_it_is_alone(window, kv_sharing):
    model, ids = open_gates(make_model(kv_sharing=kv_sharing, sliding_window=window)).double(), make_ids(1, 11)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    logits = model(ids, position_ids=positions, use_cache=False).logits
    for begin, end in ((0, 5), (5, 11)):
        alone = model(ids[:, begin:end], use_cache=False).logits
        torch.testing.assert_close(logits[:, begin:end], alone, **FP32)


@torch.no_grad()
@pytest.mark.parametrize("kv_sharing", ["per_loop", "first"])
@pytest.mark.parametrize("sections", [(0, 0), (1, 1)])
@pytest.mark.parametrize("tokens", [2, 9])
def test_drafts_change_no_token(kv_sharing, sections, tokens):
    """A draft that is not accepted is taken back, with what it had pushed out of the window."""
    sizes = {"num_prelude_layers": sections[0], "num_coda_layers": sections[1], "num_loops": 4}
    model, ids = make_model(kv_sharing=kv_sharing, sliding_window=3, **sizes), make_ids(1, tokens)
    settings = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(ids, **settings)
    settings |= {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0}
    drafted = model.generate(ids, draft_loops=1, **settings)
    assert drafted.sequences.equal(plain.sequences)
    assert drafted.accepted.sum() < drafted.drafted.sum()
    for ours, theirs in zip(drafted.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, **FP32)


def test_drafts_of_natural_keys_are_refused():
    model = make_model(kv_sharing="natural", sliding_window=3, loop_connection="damped")
    with pytest.raises(ValueError, match=r"draft_loops=1: kv_sharing='natural' .* sliding_window=3 .* prompt_lookup"):
        model.generate(make_ids(1), draft_loops=1, max_new_tokens=4)


def test_attention_functions_and_engines_are_told_the_window():
    """Flash attention and engines make no mask: they read the argument, or the attribute of the attention."""
    told = set()

    def attention(module, *args, sliding_window=None, **kwargs):
        told.add((sliding_window, module.sliding_window))
        return eager_attention_forward(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("tells", attention)
    for window in (None, 4):
        make_model(attn="tells", sliding_window=window, num_prelude_layers=1)(make_ids())
        assert told == {(window, window)}
        told.clear()


@pytest.mark.parametrize("window", [0, 1, -3, True, 2.0, "4", [4]])
def test_what_is_no_window_is_refused(window):
    with pytest.raises((ValueError, StrictDataclassError), match="sliding_window"):
        make_config(sliding_window=window)


@torch.no_grad()
def test_a_window_that_holds_the_text_is_no_window():
    ids = make_ids()
    whole, windowed = make_model(), make_model(sliding_window=7)
    torch.testing.assert_close(windowed(ids).logits, whole(ids).logits, **FP32)
    assert not torch.allclose(make_model(sliding_window=6)(ids).logits, whole(ids).logits, atol=1e-3)


@torch.no_grad()
def test_a_folder_saved_before_there_was_a_window_loads_as_it_was(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("sliding_window") is None
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert LoopedForCausalLM.from_pretrained(tmp_path)(make_ids()).logits.equal(model(make_ids()).logits)
    assert LoopedConfig(**SIZES).sliding_window is None
