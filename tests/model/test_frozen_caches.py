"""Laws of the cache of a looped window: one entry per layer and token, whatever the calls; which tokens loop."""

import pytest
import torch
from transformers import (
    DynamicCache,
    StaticCache,
)

from families import FAMILIES, make_frozen, make_tokens
from modeling_looped import frozen_window_looped
from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.frozen_looped import attach, looped
from toys import FP32

# The toys are float64, so that equal sums are equal to 1e-9; eager attention, routers and rotary angles are computed
# in float32 by transformers itself, and so is generate's record of the logits.
F64 = {"rtol": 1e-9, "atol": 1e-9}


WINDOW = (2, 4)
ATTENTIONS = {family: ["sdpa", "eager"] for family in FAMILIES} | {"gemma2": ["eager"]}  # softcap: eager only
PAIRS = [(family, attn) for family, kinds in ATTENTIONS.items() for attn in kinds]


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@torch.no_grad()
def in_chunks(model, ids, sizes, cache, **kwargs):
    """Logits of `ids` fed in calls of `sizes` tokens."""
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    parts, start = [], 0
    for size in sizes:
        end = start + size
        part = model(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE_NAME: cache}, use_cache=True, **kwargs)
        parts.append(part.logits)
        start = end
    return torch.cat(parts, 1)


def count_calls(model, layers):
    """A list that grows by the layer's index at every call."""
    calls = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    return calls


@torch.no_grad()
def token_by_token(model, ids, window, num_loops, beta, write):
    """The naive twin: one token at a time, every extra pass appended to a plain cache and cropped off again, and a
    separate pass at the end that leaves the entry (`write`: from the state before the window, or the loop's last)."""
    inner, (first, last) = model.model, window
    cache, logits = DynamicCache(config=model.config), []
    for position in range(ids.shape[1]):
        x = inner.embed_tokens(ids[:, position : position + 1])
        rope = inner.rotary_emb(x, torch.tensor([[position]]))

        def stack(x, layers, rope=rope):
            for layer in layers:
                x = layer(x, position_embeddings=rope, attention_mask=None, **{CACHE_NAME: cache})
            return x

        def evaluate(x):
            x = stack(x, inner.layers[first : last + 1])
            for layer in cache.layers[first : last + 1]:
                layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
            return x

        x0 = stack(x, inner.layers[:first])
        y0, x = evaluate(x0), x0
        for _ in range(num_loops):
            x = x + (evaluate(x) - x) / num_loops
        stack({"first": x0, "last": x}[write], inner.layers[first : last + 1])
        out = stack(beta * y0 + (1 - beta) * x, inner.layers[last + 1 :])
        logits.append(model.lm_head(inner.norm(out)))
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("num_loops", [2, 3, 6])
def test_one_call_equals_the_token_by_token_twin_that_crops_and_writes_apart(attn, num_loops):
    """The merged write (the natural pass leaves the entry) is the explicit one; the two-source prefill is decoding."""
    model, ids = make_frozen("llama", attn), make_tokens()
    close = FP32 if attn == "eager" else F64
    expected, entries = token_by_token(model, ids, WINDOW, num_loops, 0.5, "first")
    cache = DynamicCache(config=model.config)
    with looped(model, WINDOW, num_loops):
        torch.testing.assert_close(logits_of(model, ids, use_cache=False), expected, **close)
        torch.testing.assert_close(logits_of(model, ids, **{CACHE_NAME: cache}), expected, **close)
    for ours, twin in zip(cache.layers, entries.layers, strict=True):
        torch.testing.assert_close(ours.keys, twin.keys, **close)
        torch.testing.assert_close(ours.values, twin.values, **close)


def test_the_explicit_write_is_the_merged_write_bit_for_bit():
    """One token at a time both forms do the same sums."""
    model, ids = make_frozen("llama", dtype=torch.float32), make_tokens()
    _, entries = token_by_token(model, ids, WINDOW, 1, 1.0, "first")
    cache = DynamicCache(config=model.config)
    with looped(model, WINDOW, 3):
        in_chunks(model, ids, [1] * 9, cache)
    for index in range(WINDOW[1] + 1):
        assert torch.equal(cache.layers[index].keys, entries.layers[index].keys)


@pytest.mark.parametrize("static", [False, True])
def test_cache_last_is_the_twin_that_writes_the_last_state(static):
    """`last` is defined token by token: the entry is that of one more pass, over the state the loop ended in."""
    model, ids = make_frozen("llama"), make_tokens()
    expected, entries = token_by_token(model, ids, WINDOW, 3, 0.5, "last")
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    with looped(model, WINDOW, 3, cache="last"):
        torch.testing.assert_close(in_chunks(model, ids, [1] * 9, cache), expected, **F64)
        uncached = logits_of(model, ids, use_cache=False)
        one_call = logits_of(model, ids, **{CACHE_NAME: DynamicCache(config=model.config)})
        assert torch.equal(uncached, one_call), "a prompt's own logits do not read what it leaves"
    for ours, twin in zip(cache.layers, entries.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, :9], twin.keys, **F64)


@pytest.mark.parametrize(("family", "attn"), PAIRS)
@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_in_chunks_equals_one_call_without_a_cache(family, attn, static):
    """The trap of iterated states that lose their prefix: extra passes must see the past, whatever the calls."""
    model, ids = make_frozen(family, attn), make_tokens()
    with looped(model, WINDOW, 3):
        expected = logits_of(model, ids, use_cache=False)
        for sizes in ([9], [1] * 9, [4, 3, 2]):
            cache = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
            torch.testing.assert_close(in_chunks(model, ids, sizes, cache), expected, **FP32)
            assert {int(layer.get_seq_length()) for layer in cache.layers} == {9}
            assert len(cache.layers) == 6


@pytest.mark.parametrize("prefill", ["natural", "iterated"])
def test_the_cache_holds_one_entry_per_layer_and_token_and_the_base_models_up_to_the_window(prefill):
    model, ids = make_frozen("qwen3", dtype=torch.float32), make_tokens()
    base, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    logits_of(model, ids, **{CACHE_NAME: base})
    with looped(model, WINDOW, 4, prefill=prefill):
        logits_of(model, ids, **{CACHE_NAME: cache})
    for index, (ours, theirs) in enumerate(zip(cache.layers, base.layers, strict=True)):
        assert ours.keys.shape == theirs.keys.shape
        assert torch.equal(ours.keys, theirs.keys) == (index <= WINDOW[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_cache_equals_generate_without(family):
    model, ids = make_frozen(family, ATTENTIONS[family][0]), make_tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    call = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with looped(model, WINDOW, 3):
        for beams, ways in (
            ({}, ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2})),
            ({"num_beams": 3}, ({},)),
        ):
            expected = model.generate(ids, **call, **beams, use_cache=False)
            for settings in ways:
                assert torch.equal(model.generate(ids, **call, **beams, **settings), expected), (beams, settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_row_equals_the_row_alone(family):
    model, ids = make_frozen(family, ATTENTIONS[family][0], torch.float32), make_tokens(rows=1)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with looped(model, WINDOW, 3):
        alone = logits_of(model, ids)
        together = logits_of(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together[:, 4:], alone, **FP32)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "sdpa" in ATTENTIONS[family]])
@pytest.mark.parametrize("static", [False, True])
def test_attention_in_blocks_equals_attention_under_the_whole_mask(family, static, monkeypatch):
    """Blocks leave out keys that no query of theirs sees; sizes that divide the call and sizes that do not."""
    model, ids = make_frozen(family), make_tokens(tokens=9)
    results = []
    for block in (100, 1, 2, 4):
        monkeypatch.setattr(frozen_window_looped, "QUERY_BLOCK", block)
        cache = StaticCache(config=model.config, max_cache_len=14) if static else DynamicCache(config=model.config)
        with looped(model, WINDOW, 3):
            results.append(in_chunks(model, ids, [6, 3], cache))
        assert model.config._attn_implementation == "sdpa"
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **FP32)


def test_blocks_do_not_cut_what_a_mask_shows(monkeypatch):
    """A prefix or an image whose tokens see each other: blocks left out the keys behind them, so that more tokens than
    one block has gave other logits."""
    model, ids = make_frozen("llama"), make_tokens()
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    mask[..., :6, :6] = True
    results = []
    for block in (100, 2):
        monkeypatch.setattr(frozen_window_looped, "QUERY_BLOCK", block)
        with looped(model, WINDOW, 3):
            results.append(logits_of(model, ids, attention_mask=mask, use_cache=False))
    torch.testing.assert_close(results[1], results[0], **F64)


def test_a_second_turn_on_the_same_cache_equals_a_fresh_run():
    model, ids, more = make_frozen("qwen3"), make_tokens(), make_tokens(tokens=4, seed=2)
    with looped(model, WINDOW, 3):
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=3, do_sample=False)
        turn = torch.cat([first, more], 1)
        fresh = model.generate(turn, max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(turn, **{CACHE_NAME: cache}, max_new_tokens=5, do_sample=False), fresh)


def test_a_cropped_cache_goes_on_like_a_fresh_one():
    model, ids = make_frozen("llama"), make_tokens()
    with looped(model, WINDOW, 3):
        expected = logits_of(model, ids, use_cache=False)
        cache = DynamicCache(config=model.config)
        in_chunks(model, ids, [9], cache)
        cache.crop(-3)
        rest = model(ids[:, 6:], **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(rest, expected[:, 6:], **F64)


def test_a_plain_dynamic_cache_and_assisted_decoding_work():
    model, ids = make_frozen("llama"), make_tokens(rows=1)
    with looped(model, WINDOW, 3):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(
            model.generate(ids, max_new_tokens=6, do_sample=False, **{CACHE_NAME: DynamicCache()}), expected
        )
        assert torch.equal(
            model.generate(ids, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2), expected
        )


@pytest.mark.parametrize("decode", ["full", "prompt"])
@pytest.mark.parametrize("drafts", ["plain", "looped"])
def test_another_model_may_draft(decode, drafts):
    """transformers hands the model's arguments on to the one that drafts: a plain one refused num_loops."""
    model, ids = make_frozen("llama"), make_tokens(rows=1)
    torch.manual_seed(3)
    drafter = type(model)(model.config).double().eval()
    call = {"max_new_tokens": 6, "do_sample": False, "num_loops": 4}
    if drafts == "looped":
        attach(drafter, (1, 2))
    with looped(model, WINDOW, 3, decode=decode):
        expected = model.generate(ids, **call)
        assert torch.equal(model.generate(ids, assistant_model=drafter, **call), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_future_does_not_reach_the_past(family):
    """Causality by gradient, through every extra pass."""
    model, ids = make_frozen(family), make_tokens()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with looped(model, WINDOW, 3):
        model(inputs_embeds=embeds).logits[:, 4].sum().backward()
    assert embeds.grad[:, :5].abs().amin(-1).gt(0).all()
    assert embeds.grad[:, 5:].abs().max() == 0


def test_decode_prompt_loops_on_the_prompt_and_is_natural_after_it():
    """The first generated token reads the looped prompt; later steps call N layers each."""
    model, ids = make_frozen("llama"), make_tokens()
    calls = count_calls(model, model.model.layers)
    with looped(model, WINDOW, 3):
        full = model.generate(ids, max_new_tokens=6, do_sample=False)
    with looped(model, WINDOW, 3, decode="prompt"):
        calls.clear()
        prompt = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert len(calls) == (6 + 2 * 3) + 5 * 6
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False), prompt)
    assert torch.equal(prompt[:, 9], full[:, 9])


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 2}])
def test_decode_first_n_is_between_prompt_and_full(settings):
    model, ids = make_frozen("llama"), make_tokens()
    call = {"max_new_tokens": 6, "do_sample": False} | settings

    def tokens(decode):
        with looped(model, WINDOW, 3, beta=0, step=1.0, decode=decode):
            return model.generate(ids, **call)

    assert torch.equal(tokens(0), tokens("prompt"))
    assert torch.equal(tokens(6), tokens("full"))
    calls = count_calls(model, model.model.layers)
    with looped(model, WINDOW, 3, decode=2):
        model.generate(ids, max_new_tokens=6, do_sample=False)
    assert len(calls) == 3 * (6 + 2 * 3) + 3 * 6


def test_decode_modes_hold_in_a_hand_written_loop():
    """A cache remembers where its prompt ended: calls of several tokens are prompt, single tokens are decoding."""
    model, ids = make_frozen("llama"), make_tokens()
    for decode in ("prompt", 1, "full"):
        with looped(model, WINDOW, 3, decode=decode):
            expected = model.generate(
                ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            cache, fed = DynamicCache(config=model.config), ids
            for step in range(5):
                logits = logits_of(model, fed, **{CACHE_NAME: cache})[:, -1]
                torch.testing.assert_close(logits.float(), expected.logits[step], **FP32)
                fed = logits.argmax(-1, keepdim=True)


@pytest.mark.parametrize("decode", ["full", "prompt", 3])
def test_a_call_says_itself_how_many_tokens_loop(decode):
    """generate put decode's own number in the place of the caller's."""
    model, ids = make_frozen("llama"), make_tokens()
    call = {"max_new_tokens": 5, "do_sample": False}
    with looped(model, WINDOW, 3, "naive", decode=decode):
        assert torch.equal(model.generate(ids, num_looped_tokens=0, **call), model.generate(ids, num_loops=1, **call))


@pytest.mark.parametrize("value", [-1, 2.5, True, "3"])
def test_a_number_of_looped_tokens_that_is_none_raises(value):
    """-1 was taken for 0."""
    model = make_frozen("llama")
    with looped(model, WINDOW), pytest.raises(ValueError, match="num_looped_tokens must be an int >= 0"):
        model(make_tokens(), num_looped_tokens=value)
