"""Training-free looping of frozen models: identities, caches, counts, refusals, and a naive twin."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from families import EXPERT_FAMILIES, FAMILIES, make_frozen, make_tokens
from modeling_looped import frozen_window_looped
from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.frozen_looped import attach, default_window, detach, looped
from modeling_looped.frozen_solvers_looped import METHODS
from toys import FP32, make_model

# The toys are float64, so that equal sums are equal to 1e-9; eager attention, routers and rotary angles are computed
# in float32 by transformers itself, and so is generate's record of the logits.
F64 = {"rtol": 1e-9, "atol": 1e-9}
WINDOW = (2, 4)
ATTENTIONS = {family: ["sdpa", "eager"] for family in FAMILIES} | {"gemma2": ["eager"]}  # softcap: eager only
PAIRS = [(family, attn) for family, kinds in ATTENTIONS.items() for attn in kinds]
EVALUATIONS = {"blend": 1, "euler": 1, "naive": 1, "midpoint": 2, "heun": 2, "rk4": 4}


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


# Identities


@pytest.mark.parametrize(("family", "attn"), PAIRS)
def test_one_loop_or_beta_one_or_no_window_is_the_base_model_bit_for_bit(family, attn):
    model, ids = make_frozen(family, attn, torch.float32), make_tokens()
    base = logits_of(model, ids)
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    for mode in ("block", "layer"):
        for settings in ({"num_loops": 1}, {"num_loops": 4, "beta": 1}, {"window": (3, 2)}):
            with looped(model, **{"window": WINDOW, "mode": mode, **settings}):
                assert torch.equal(logits_of(model, ids), base), (mode, settings)
                assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens), (mode, settings)


@pytest.mark.parametrize("method", METHODS)
def test_one_loop_is_the_base_model_with_every_method(method):
    model, ids = make_frozen("llama"), make_tokens()
    base = logits_of(model, ids)
    with looped(model, WINDOW, num_loops=3, method=method):
        assert torch.equal(logits_of(model, ids, num_loops=1), base)
        assert not torch.allclose(logits_of(model, ids), base, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_restores_the_model_even_after_an_error(family):
    model, ids = make_frozen(family, ATTENTIONS[family][0]), make_tokens()
    base, kind, attributes = logits_of(model, ids), type(model), set(vars(model))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with looped(model, WINDOW):
        assert not torch.allclose(logits_of(model, ids), base, atol=1e-3)
    with pytest.raises(ZeroDivisionError), looped(model, WINDOW):
        raise ZeroDivisionError
    assert torch.equal(logits_of(model, ids), base)
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert "num_loops" not in model.forward.__code__.co_varnames


@pytest.mark.parametrize("prefill", ["natural", "iterated"])
def test_a_window_of_one_layer_is_the_same_in_both_modes(prefill):
    model, ids = make_frozen("qwen3"), make_tokens()
    with looped(model, (3, 3), mode="block", prefill=prefill):
        block = logits_of(model, ids)
    with looped(model, (3, 3), mode="layer", prefill=prefill):
        assert torch.equal(logits_of(model, ids), block)


def test_settings_that_name_one_thing_agree():
    """Euler is the blend with beta 0; substeps of length 1 are naive looping; K = 2 is damped Picard with 1/2."""
    model, ids = make_frozen("llama"), make_tokens()
    pairs = [
        ({"method": "euler"}, {"method": "blend", "beta": 0.0}),
        ({"method": "naive"}, {"method": "euler", "step": 1.0}),
        ({"method": "euler", "num_loops": 2}, {"method": "euler", "num_loops": 2, "step": 0.5}),
    ]
    for left, right in pairs:
        with looped(model, WINDOW, **left):
            first = logits_of(model, ids)
        with looped(model, WINDOW, **right):
            torch.testing.assert_close(logits_of(model, ids), first, **F64)


@pytest.mark.parametrize("num_loops", [2, 3, 5])
def test_naive_looping_in_the_papers_prefill_is_a_model_with_the_window_copied(num_loops):
    """The paper's prefill is a plain deeper stack: an independent reference for which keys the passes see."""
    model, ids = make_frozen("llama"), make_tokens()
    deeper = copy.deepcopy(model)
    layers = list(deeper.model.layers)
    layers[WINDOW[1] + 1 : WINDOW[1] + 1] = layers[WINDOW[0] : WINDOW[1] + 1] * (num_loops - 1)
    deeper.model.layers = torch.nn.ModuleList(layers)
    deeper.config.num_hidden_layers = len(layers)
    with looped(model, WINDOW, num_loops, method="naive", prefill="iterated"):
        torch.testing.assert_close(
            logits_of(model, ids, use_cache=False), logits_of(deeper, ids, use_cache=False), **F64
        )


@pytest.mark.parametrize(("num_loops", "beta", "step"), [(2, 0.0, None), (3, 0.5, None), (4, 0.25, 0.5)])
def test_the_papers_prefill_is_its_equations_on_whole_sequences(num_loops, beta, step):
    """x <- x + s (g(x) - x), K evaluations, then beta y0 + (1 - beta) x, with g the plain layers on all tokens."""
    model, ids = make_frozen("llama"), make_tokens()
    inner = model.model
    with torch.no_grad():
        x0 = inner.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        given = {"position_embeddings": inner.rotary_emb(x0, positions), "attention_mask": None}

        def stack(x, layers):
            for layer in layers:
                x = layer(x, **given)
            return x

        x0 = stack(x0, inner.layers[:2])
        y0 = stack(x0, inner.layers[2:5])
        x = x0
        for _ in range(num_loops):
            x = x + (step or 1 / num_loops) * (stack(x, inner.layers[2:5]) - x)
        x = beta * y0 + (1 - beta) * x
        expected = model.lm_head(inner.norm(stack(x, inner.layers[5:])))
    with looped(model, WINDOW, num_loops, beta=beta, step=step, prefill="iterated"):
        torch.testing.assert_close(logits_of(model, ids), expected, **F64)


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


# Solvers


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_a_solver_has_its_order(method, order):
    """dx/dt = -x from 1 to t = 1: halving the step divides the error by 2 ** order."""
    solver, one = METHODS[method][0], torch.ones((), dtype=torch.float64)
    errors = [abs(float(solver(lambda x: 0 * x, one, 0 * one, n, 1 / n)) - math.exp(-1)) for n in (16, 32)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("mode", ["block", "layer"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_layer_calls_are_counted(method, cached, mode):
    """N + (K - 1) w calls for K evaluations and no more; a solver with E evaluations per loop makes E K of them."""
    model, ids = make_frozen("llama"), make_tokens()
    calls = count_calls(model, model.model.layers)
    for num_loops in (1, 2, 3):
        calls.clear()
        with looped(model, WINDOW, num_loops, method, mode=mode):
            logits_of(model, ids, use_cache=cached)
        evaluations = EVALUATIONS[method] * num_loops if num_loops > 1 else 1
        assert len(calls) == 6 + (evaluations - 1) * 3
        assert all(calls.count(index) == evaluations for index in (2, 3, 4))


def test_cache_last_costs_one_more_evaluation_where_there_is_a_cache():
    model, ids = make_frozen("llama"), make_tokens()
    calls = count_calls(model, model.model.layers)
    with looped(model, WINDOW, 3, cache="last"):
        logits_of(model, ids, use_cache=False)
        assert len(calls) == 6 + 2 * 3
        calls.clear()
        logits_of(model, ids, use_cache=True)
        assert len(calls) == 6 + 3 * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["block", "layer"])
def test_recorded_states_and_attentions_are_one_per_layer(family, mode):
    """transformers records them by hooks on the layers, which the extra passes call as well: without care a loop left
    12 attentions in the output of 6 layers, half of them over two sources of keys."""
    model, ids = make_frozen(family, "eager"), make_tokens()
    kinds = {"output_hidden_states": True, "output_attentions": True}
    kinds |= {"output_router_logits": True} if family in ("qwen3_moe", "mixtral") else {}
    with torch.no_grad():
        base = model(ids, **kinds)
        with looped(model, WINDOW, 3, mode=mode):
            ours = model(ids, **kinds)
    for kind in kinds:
        name = kind.removeprefix("output_")
        assert [each.shape for each in ours[name]] == [each.shape for each in base[name]]
    for below in range(WINDOW[0] + 1):
        assert torch.equal(ours.hidden_states[below], base.hidden_states[below])
    assert not torch.allclose(ours.hidden_states[WINDOW[1] + 1], base.hidden_states[WINDOW[1] + 1], atol=1e-3)


def test_the_recorded_state_above_the_window_is_what_left_the_loop():
    model, ids = make_frozen("llama"), make_tokens()
    with torch.no_grad(), looped(model, WINDOW, 3):
        ours = model(ids, output_hidden_states=True)
        state = ours.hidden_states[WINDOW[1] + 1]
        rope = model.model.rotary_emb(state, torch.arange(9)[None])
        top = model.model.layers[5](state, position_embeddings=rope, attention_mask=None)
        torch.testing.assert_close(model.lm_head(model.model.norm(top)), ours.logits, **F64)


# Caches


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


# Which tokens loop


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


# Loop counts


def test_the_loop_count_is_an_argument_of_generate_and_of_its_configuration():
    model, ids = make_frozen("qwen2"), make_tokens()
    call = {"max_new_tokens": 4, "do_sample": False}

    def tokens(num_loops):
        with looped(model, WINDOW, num_loops, "naive"):
            return model.generate(ids, **call)

    of = {k: tokens(k) for k in (1, 2, 5)}
    assert not torch.equal(of[1], of[2])
    assert not torch.equal(of[2], of[5])
    with looped(model, WINDOW, 2, "naive"):
        assert torch.equal(model.generate(ids, **call), of[2])
        assert torch.equal(model.generate(ids, num_loops=5, **call), of[5])
        config = GenerationConfig(num_loops=5, **call)
        assert torch.equal(model.generate(ids, generation_config=config), of[5])
        assert torch.equal(model.generate(ids, generation_config=config, num_loops=1), of[1])
        assert torch.equal(model.generate(ids, **call), of[2]), "one call's count must not stay"


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", torch.tensor([1, 2])])
def test_a_loop_count_that_is_none_raises_before_any_work(value):
    model, ids = make_frozen("llama"), make_tokens()
    with looped(model, WINDOW):
        calls = count_calls(model, model.model.layers)
        with pytest.raises(ValueError, match="num_loops must be an int >= 1"):
            model(ids, num_loops=value)
        with pytest.raises(ValueError, match="num_loops must be an int >= 1"):
            model.generate(ids, num_loops=value)
        if not isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match="num_loops must be an int >= 1"):  # 0 was taken for the default
                model.generate(ids, generation_config=GenerationConfig(num_loops=value))
        assert not calls


def test_a_misspelt_loop_argument_raises():
    """Llama's forward would swallow it (trap 6)."""
    model, ids = make_frozen("llama"), make_tokens()
    with looped(model, WINDOW):
        with pytest.raises(TypeError, match="Did you mean 'num_loops'"):
            model(ids, num_loop=2)
        with pytest.raises(ValueError, match="num_loop"):
            model.generate(ids, num_loop=2)


# Experts


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("mode", [None, "block"])
def test_extra_passes_use_the_experts_of_the_natural_pass(family, mode):
    """Without it a quarter of the tokens change experts after one pass."""
    model, ids = make_frozen(family), make_tokens()
    layer = model.model.layers[3]
    router = next(m for m in layer.modules() if type(m).__name__.endswith("Router"))
    free, used = [], []
    router.register_forward_hook(lambda module, args, output: free.append(output), prepend=True)
    with looped(model, WINDOW, 4, method="naive", mode=mode):
        assert model.loop.config.mode == (mode or "layer")
        router.register_forward_hook(lambda module, args, output: used.append(output))
        logits_of(model, ids)
    assert len(used) == 4
    for logits, weights, experts in used:
        assert torch.equal(logits, used[0][0])
        assert torch.equal(weights, used[0][1])
        assert torch.equal(experts, used[0][2])


def test_dense_models_loop_as_a_block():
    model = make_frozen("llama")
    assert looped(model, WINDOW).config.mode == "block"


# Windows and refusals


@pytest.mark.parametrize(
    ("num_layers", "window"), [(28, (12, 15)), (36, (16, 19)), (30, (13, 16)), (6, (1, 4)), (2, (0, 1)), (1, (0, 0))]
)
def test_the_default_window_follows_the_depth_rule(num_layers, window):
    assert default_window(num_layers) == window


def test_the_default_window_is_the_models():
    assert looped(make_frozen("llama")).config.window == [1, 4]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"window": (2, 6)}, "ends beyond the last layer"),
        ({"window": (4, 2)}, "window must be"),
        ({"window": (-1, 2)}, "window must be"),
        ({"window": (1, 2, 3)}, "window must be"),
        ({"num_loops": 0}, "num_loops"),
        ({"method": "newton"}, "method"),
        ({"mode": "stack"}, "mode"),
        ({"cache": "mean"}, "cache"),
        ({"decode": "never"}, "decode must be"),
        ({"decode": -1}, "decode must be"),
        ({"prefill": "both"}, "prefill"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"step": 0.0}, "step must be > 0"),
        ({"step": 0.5, "method": "naive"}, "naive method has none"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings, match):
    model = make_frozen("llama")
    with pytest.raises(ValueError, match=match):
        looped(model, **settings)


def test_a_model_that_cannot_be_looped_is_told_why():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    bloom = BloomForCausalLM(BloomConfig(**{**sizes, "n_layer": 2}, n_head=2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    refusals = [
        (mamba, "recurrent or convolution state"),
        (bloom, "ALiBi"),
        (t5, "encoder-decoder"),
        (make_model(), "a loop of their own"),
        (torch.nn.Linear(2, 2), "PreTrainedModel"),
    ]
    for model, match in refusals:
        with pytest.raises(ValueError, match=match):
            looped(model, (0, 1))


def test_attention_with_a_causal_mask_of_its_own_is_refused():
    """GPT-Neo cuts its mask out of a square by the number of keys: over two sources a token saw later ones, and the
    logits of a prompt were not those of its tokens."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))
    with pytest.raises(ValueError, match="a causal mask of its own"):
        looped(model, (0, 1))


def test_other_memories_and_biases_are_refused_when_the_loop_is_made():
    """Jamba's Mamba layers take the KV cache by the same name, and MPT's ALiBi is called otherwise than Bloom's: both
    were only found out in the first call."""
    jamba = JambaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layer 0 .*a convolution over tokens.* recurrent or convolution state"):
        looped(JambaForCausalLM(jamba), (0, 1))
    assert looped(JambaForCausalLM(jamba), (1, 1)).windows
    mpt = MptForCausalLM(MptConfig(vocab_size=20, d_model=16, n_heads=2, n_layers=2, max_seq_len=32))
    with pytest.raises(ValueError, match="ALiBi"):
        looped(mpt, (0, 1))


def test_experts_whose_choice_cannot_be_kept_are_refused():
    """Remote code routes by classes of its own name over a plain list: it looped as a dense block, routed freely."""
    model = make_frozen("llama")
    model.model.layers[3].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    with pytest.raises(ValueError, match=r"no module named \*Router"):
        looped(model, WINDOW)


def test_natural_prefill_needs_attention_with_masks():
    model = make_frozen("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="set_attn_implementation"):
        looped(model, WINDOW)


def test_gradient_checkpointing_is_refused():
    model = make_frozen("llama").train()
    model.activation_checkpointing_enable()
    with looped(model, WINDOW), pytest.raises(ValueError, match="gradient checkpointing"):
        model(make_tokens())


def test_cache_last_refuses_rows_it_cannot_overwrite():
    model = make_frozen("mistral")
    cache = DynamicCache(config=model.config)
    with looped(model, WINDOW, cache="last"), pytest.raises(ValueError, match="cache='last' overwrites rows"):
        model(make_tokens(), **{CACHE_NAME: cache})


def test_attaching_twice_and_detaching_twice_raise():
    model = make_frozen("llama")
    attach(model, WINDOW)
    with pytest.raises(ValueError, match="looped already"):
        attach(model, WINDOW)
    detach(model)
    with pytest.raises(ValueError, match="is not looped"):
        detach(model)


def test_a_loop_detaches_only_itself():
    """A loop that was never attached took the class from a model that another one loops, and left its hooks behind: a
    model that says it is not looped and is."""
    model, ids = make_frozen("llama"), make_tokens()
    base, stranger = logits_of(model, ids), looped(model, (1, 2))
    with looped(model, WINDOW):
        with pytest.raises(ValueError, match="not looped by this loop"):
            stranger.detach()
        with pytest.raises(ValueError, match="looped already"):
            stranger.attach()
        assert torch.equal(logits_of(model, ids, num_loops=1), base)
    with stranger, pytest.raises(ValueError, match="looped already"):
        stranger.attach()
    assert torch.equal(logits_of(model, ids), base)


def test_a_model_whose_weights_are_offloaded_hears_its_loop_count():
    """accelerate puts a forward of its own on the object, before the class's: the base model's behind it swallowed
    num_loops, and generate refused it."""
    model, ids = make_frozen("llama"), make_tokens()
    base = logits_of(model, ids)
    with looped(model, WINDOW, 5, "naive"):
        five = logits_of(model, ids)
    cpu_offload(model, execution_device="cpu")
    with looped(model, WINDOW, 3, "naive"):
        torch.testing.assert_close(logits_of(model, ids, num_loops=1), base, **F64)
        torch.testing.assert_close(logits_of(model, ids, num_loops=5), five, **F64)
        model.generate(ids, num_loops=2, max_new_tokens=2, do_sample=False)
    assert "forward" in vars(model)
    torch.testing.assert_close(logits_of(model, ids), base, **F64)


def test_what_wrapped_a_looped_forward_outlives_the_loop():
    """accelerate's prepare keeps the forward that it found, and the model without the loop has no `loop` to ask."""
    model, ids = make_frozen("llama", dtype=torch.float32), make_tokens()
    attach(model, WINDOW, 3, "naive")
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert not torch.equal(logits_of(prepared, ids), logits_of(prepared, ids, num_loops=1))
    one = logits_of(prepared, ids, num_loops=1)
    assert torch.equal(logits_of(detach(prepared), ids), one)
