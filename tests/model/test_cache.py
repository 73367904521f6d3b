"""Laws of the KV cache: what is cached equals what would be computed, for every policy, cache kind and loop count."""

import pytest
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)

from modeling_looped.cache_layers_looped import CACHE_NAME, RewritingLayer
from toys import FP32, KV_SHARINGS, make_ids, make_model, open_gates, stepwise

every_sharing = pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])
every_depth = pytest.mark.parametrize("num_loops", [1, 3, 5])  # below, at and above the configured 3
every_window = pytest.mark.parametrize("sliding_window", [None, 3])
exact_sharing = pytest.mark.parametrize("kv_sharing", ["per_loop", "first", "natural"])

CACHES = {
    "bare": lambda config: DynamicCache(),
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}


def oracle(model, ids, sizes, num_loops):
    """What kv_sharing means, without any cache class: rows are kept in plain lists.

    Tokens come in pieces. A loop's queries see the pieces before through the row their policy left (loop 0 or the
    last loop, their mean, or the same loop), and their own piece through this loop (`first`: through loop 0;
    `natural`: through loop 0, but themselves through this loop). With `gated`, keys and values come from a latent,
    z h + (1 - z) x.
    """
    config, layers = model.config, model.model.core
    memory, latents = {}, {}
    logits, start = [], 0
    for size in sizes:
        hidden = model.get_input_embeddings()(ids[:, start : start + size])
        positions = torch.arange(start, start + size)[None]
        for loop in range(num_loops):
            for index, layer in enumerate(layers):
                attn = layer.self_attn
                x = layer.input_layernorm(hidden)
                heads = (*x.shape[:2], -1, attn.head_dim)
                source = x
                if config.kv_sharing == "gated" and loop:
                    z = torch.sigmoid(layer.kv_gate.of_input(x) + layer.kv_gate.of_latent(latents[index]))
                    source = z * latents[index] + (1 - z) * x
                latents[index] = source
                q, k, v = (
                    p(s).view(heads).transpose(1, 2)
                    for p, s in ((attn.q_proj, x), (attn.k_proj, source), (attn.v_proj, source))
                )
                cos, sin = model.model.positions(x, positions)
                rotate = lambda t, cos=cos, sin=sin: t * cos[:, None] + half_turn(t) * sin[:, None]  # noqa: E731
                q, k = rotate(q), rotate(k)
                slot = (index, loop) if config.kv_sharing == "per_loop" else index
                past = memory.get((slot, "past"))
                current = k, v
                if config.kv_sharing not in ("first", "natural") or loop == 0:
                    memory[slot, "own"] = (k, v)
                k, v = memory[slot, "own"]
                memory.setdefault((slot, "all"), []).append((k, v))
                if past is not None:
                    k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
                groups = attn.num_key_value_groups
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
                scores = q @ k.transpose(2, 3) * attn.scaling
                back = torch.arange(start, start + size)[:, None] - torch.arange(start + size)[None]
                visible = (back >= 0) & (back < (config.sliding_window or back.max() + 1))
                if config.kv_sharing == "natural":
                    own_k, own_v = (t.repeat_interleave(groups, 1) for t in current)
                    tokens = torch.arange(hidden.shape[1])
                    scores[..., tokens, start + tokens] = (q * own_k).sum(-1) * attn.scaling
                shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)
                out = shares @ v
                if config.kv_sharing == "natural":
                    out = out + shares[..., tokens, start + tokens, None] * (own_v - v[:, :, start:])
                hidden = hidden + attn.o_proj(out.transpose(1, 2).flatten(2))
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        for slot in {key[0] for key in memory if key[1] == "own"}:
            past, own, every = memory.get((slot, "past")), memory.pop((slot, "own")), memory.pop((slot, "all"))
            if config.kv_sharing == "mean":
                own = tuple(sum(pair) / num_loops for pair in zip(*every, strict=True))
            memory[slot, "past"] = own if past is None else tuple(torch.cat(p, 2) for p in zip(past, own, strict=True))
        logits.append(model.readout(hidden))
        start += size
    return torch.cat(logits, 1)


def half_turn(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@torch.no_grad()
@every_sharing
@every_attention
@every_depth
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (2, 3, 2)])
@every_window
def test_cached_equals_the_naive_twin(kv_sharing, attn, num_loops, kind, sizes, sliding_window):
    """A stock layer in a shared slot appends every loop, silently wrong under sdpa only: hence both backends."""
    model = open_gates(make_model(attn=attn, kv_sharing=kv_sharing, sliding_window=sliding_window))
    ids = make_ids()
    cache = CACHES[kind](model.config)
    logits = stepwise(model, ids, sizes, cache, num_loops=num_loops)
    torch.testing.assert_close(logits, oracle(model, ids, sizes, num_loops), **FP32)
    assert int(cache.get_seq_length()) == ids.shape[1]
    slots = model.config.kv_slots().count(num_loops)
    assert [int(cache.get_seq_length(slot)) for slot in range(len(cache.layers))] == [7] * slots


@torch.no_grad()
@exact_sharing
@every_attention
@every_depth
@pytest.mark.parametrize("connection", ["plain", "inject_add", "inject_concat", "hyper", "damped", "disco"])
def test_cached_equals_uncached(kv_sharing, attn, num_loops, connection):
    model = make_model(
        attn=attn,
        kv_sharing=kv_sharing,
        loop_connection=connection,
        max_num_loops=5,
        num_prelude_layers=1,
        num_coda_layers=1,
    )
    ids = make_ids()
    logits = stepwise(model, ids, (3, 1, 2, 1), num_loops=num_loops)
    torch.testing.assert_close(logits, model(ids, num_loops=num_loops, use_cache=False).logits, **FP32)


@torch.no_grad()
def test_last_is_the_uncached_model_within_one_call_only():
    """`last` is an approximation at decode, and says so: one prefill is exact, token by token is another model."""
    model = make_model(kv_sharing="last")
    ids = make_ids()
    uncached = model(ids, use_cache=False).logits
    assert model(ids, use_cache=True).logits.equal(uncached)
    assert not torch.allclose(stepwise(model, ids, (1,) * 7, DynamicCache()), uncached, atol=1e-2)


@torch.no_grad()
def test_first_keeps_the_keys_of_loop_zero():
    """The rows that `first` caches are those of a one-loop run, whatever the loop count."""
    model = make_model(kv_sharing="first")
    one, many = (model(make_ids(), num_loops=loops, use_cache=True).past_key_values for loops in (1, 4))
    for layer_of_one, layer_of_many in zip(one.layers, many.layers, strict=True):
        assert layer_of_one.keys.equal(layer_of_many.keys)
        assert layer_of_one.values.equal(layer_of_many.values)


@torch.no_grad()
@every_sharing
@every_attention
def test_left_padded_generation_equals_single_rows(kv_sharing, attn):
    """Ouro builds a mask of length 1 in decoding, so every padded row is wrong (trap 2)."""
    model = open_gates(make_model(attn=attn, kv_sharing=kv_sharing))
    ids = make_ids()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :3], mask[1, :3] = 0, 0
    for num_loops in (1, 4):
        kwargs = {"num_loops": num_loops, "max_new_tokens": 5, "do_sample": False}
        batch = model.generate(padded, attention_mask=mask, **kwargs)
        assert batch[0].equal(model.generate(ids[:1], **kwargs)[0])
        assert batch[1, 3:].equal(model.generate(ids[1:2, 3:], **kwargs)[0])


@torch.no_grad()
@every_sharing
@every_depth
@every_window
def test_generate_is_the_same_through_every_cache(kv_sharing, num_loops, sliding_window):
    """Ouro swaps a static cache for its own, and breaks on the one generate makes (traps 12, 13)."""
    model = open_gates(make_model(kv_sharing=kv_sharing, sliding_window=sliding_window))
    ids = make_ids()
    kwargs = {"num_loops": num_loops, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **kwargs)
    assert model.generate(ids, cache_implementation="static", **kwargs).equal(expected)
    for make in CACHES.values():
        cache = make(model.config)
        output = model.generate(ids, **{CACHE_NAME: cache}, return_dict_in_generate=True, **kwargs)
        assert output.sequences.equal(expected)
        assert output.past_key_values is cache


@torch.no_grad()
@exact_sharing
@pytest.mark.parametrize("num_loops", [1, 5])
@every_window
def test_beams_with_cache_equal_beams_without(kv_sharing, num_loops, sliding_window):
    """Beam reorder must reach every slot of every loop."""
    model = make_model(kv_sharing=kv_sharing, sliding_window=sliding_window)
    kwargs = {"num_loops": num_loops, "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert model.generate(make_ids(), **kwargs).equal(model.generate(make_ids(), use_cache=False, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize("kv_sharing", ["last", "mean", "gated"])
@every_window
def test_beams_of_a_rewritten_cache_are_reordered(kv_sharing, sliding_window):
    model = make_model(kv_sharing=kv_sharing, sliding_window=sliding_window)
    cache = model(make_ids(), use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for layer, keys in zip(cache.layers, before, strict=True):
        assert isinstance(layer, RewritingLayer)
        assert layer.keys.equal(keys[[2, 0, 0]])


@torch.no_grad()
def test_sampling_with_cache_equals_sampling_without():
    model = make_model()
    torch.manual_seed(3)
    cached = model.generate(make_ids(), num_loops=5, max_new_tokens=6, do_sample=True)
    torch.manual_seed(3)
    assert cached.equal(model.generate(make_ids(), num_loops=5, max_new_tokens=6, do_sample=True, use_cache=False))


@torch.no_grad()
@every_sharing
@every_window
def test_a_cropped_cache_continues_as_a_fresh_one(kv_sharing, sliding_window):
    """A sliding layer that is to be cropped has to be told so before, as by assisted decoding."""
    model = open_gates(make_model(kv_sharing=kv_sharing, sliding_window=sliding_window))
    ids, other = make_ids(), make_ids(seed=9)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    stepwise(model, ids, (4, 3), cache, num_loops=5)
    cache.crop(-3)
    continued = model(other[:, :2], past_key_values=cache, num_loops=5).logits
    fresh = stepwise(model, torch.cat([ids[:, :4], other[:, :2]], 1), (4, 2), num_loops=5)
    torch.testing.assert_close(continued, fresh[:, 4:], **FP32)


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("turns", [(2, 4), (4, 2, 4), (1, 5, 3)])
@every_window
def test_a_token_that_ran_fewer_loops_is_seen_through_its_last_one(kind, turns, sliding_window):
    """The fill policy, against a cache built by hand: missing slots hold the rows of the deepest loop computed."""
    model = make_model(sliding_window=sliding_window)
    ids = make_ids(2, 2 * len(turns))
    cache, twin = CACHES[kind](model.config), {}
    deepest = max(turns)
    for turn, loops in enumerate(turns):
        piece = ids[:, 2 * turn : 2 * turn + 2]
        logits = model(piece, past_key_values=cache, num_loops=loops).logits
        # The twin keeps one full-depth cache per turn, whose missing slots are copied from the deepest one computed.
        by_hand = DynamicCache()
        for slot in range(2 * loops):
            if turn:
                by_hand.update(*twin[slot], slot)
        expected = model(piece, past_key_values=by_hand, num_loops=loops).logits
        torch.testing.assert_close(logits, expected, **FP32)
        for slot in range(2 * deepest):
            source = slot if slot < 2 * loops else 2 * (loops - 1) + slot % 2
            new = by_hand.layers[source].keys[:, :, -2:], by_hand.layers[source].values[:, :, -2:]
            twin[slot] = new if not turn else tuple(torch.cat(pair, 2) for pair in zip(twin[slot], new, strict=True))


@torch.no_grad()
def test_the_cache_holds_what_its_policy_says():
    ids = make_ids()

    def kv_bytes(**fields):
        cache = make_model(**fields)(ids, use_cache=True, num_loops=4).past_key_values
        return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))

    for shared in ("first", "last", "mean", "gated"):
        assert kv_bytes(kv_sharing="per_loop") == 4 * kv_bytes(kv_sharing=shared)
    assert kv_bytes(kv_sharing="last") == 3 * 7 * 2 * (2 * 8) * 2 * 4  # rows, tokens, K+V, 2 heads of 8, layers, fp32


@torch.no_grad()
def test_a_quantized_cache_works_per_loop_and_refuses_what_it_cannot_do():
    model = make_model(num_loops=4)
    ids = make_ids()
    kwargs = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "quantized"}
    out = model.generate(ids, num_loops=4, cache_config={"backend": "fp8"}, **kwargs)
    assert out.shape == (3, 11)
    with pytest.raises(ValueError, match="rows cannot be read back"):
        model.generate(ids, num_loops=torch.tensor([1, 2, 3]), cache_config={"backend": "fp8"}, **kwargs)
    shared = make_model(kv_sharing="last")
    with pytest.raises(ValueError, match="rows cannot be read back"):
        shared(ids, past_key_values=QuantizedCache("fp8", config=shared.config))


def test_a_cache_of_another_policy_is_refused():
    model, shared = make_model(), make_model(kv_sharing="last")
    cache = model(make_ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Start from an empty DynamicCache"):
        shared(make_ids(), past_key_values=cache)


@torch.no_grad()
def test_forward_takes_the_cache_by_both_its_names():
    """transformers 5.24 renamed it, and generate with it; what somebody wrote for either goes on working."""
    model, ids = make_model(), make_ids()
    whole = model(ids, use_cache=True)
    for name in ("past_key_values", "cache"):
        for part in (model, model.model):
            cache = DynamicCache(config=model.config)
            first = part(ids[:, :3], **{name: cache})
            assert first[CACHE_NAME] is first.past_key_values is cache
            rest = part(ids[:, 3:], **{name: cache})[0]
            torch.testing.assert_close(rest, part(ids)[0][:, 3:], **FP32)
    with pytest.raises(ValueError, match="two names of the KV cache: give one"):
        model(ids, past_key_values=whole.past_key_values, cache=whole.past_key_values)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside inductor
@every_sharing
@every_window
def test_compiled_static_generation_equals_eager(kv_sharing, sliding_window):
    """The graph is what may differ, and aot_eager runs it as it is; inductor, which takes ten times as long, once."""
    model = open_gates(make_model(kv_sharing=kv_sharing, sliding_window=sliding_window))
    ids = make_ids()
    backend = "inductor" if (kv_sharing, sliding_window) == ("gated", None) else "aot_eager"
    compile_config = CompileConfig(mode="default", fullgraph=True, dynamic=False, backend=backend)
    compile_config._compile_all_devices = True  # generate compiles on accelerators only, unless told
    for num_loops in (2, 4):
        torch.compiler.reset()
        kwargs = {"num_loops": num_loops, "max_new_tokens": 4, "do_sample": False}
        compiled = model.generate(ids, cache_implementation="static", compile_config=compile_config, **kwargs)
        assert compiled.equal(model.generate(ids, **kwargs))


@torch.no_grad()
@every_sharing
@every_window
def test_prompt_lookup_and_few_loop_drafts_are_lossless(kv_sharing, sliding_window):
    """Assisted decoding crops rejected rows in every slot; drafting with fewer loops needs no second model."""
    model = make_model(num_loops=4, kv_sharing=kv_sharing, sliding_window=sliding_window)
    ids = torch.tensor([[3, 4, 5, 3, 4, 5, 3, 4]])
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    if kv_sharing not in ("per_loop", "first", "natural"):
        with pytest.raises(ValueError, match="cannot verify drafted tokens"):
            model.generate(ids, prompt_lookup_num_tokens=2, **kwargs)
        return
    expected = model.generate(ids, **kwargs)
    drafted = model.generate(ids, prompt_lookup_num_tokens=2, return_dict_in_generate=True, **kwargs)
    assert drafted.sequences.equal(expected)
    assert drafted.loops_used.equal(torch.full((1, 8), 4))  # one for each token, not for each call
    if kv_sharing == "per_loop":
        depths = set()
        model.model.register_forward_pre_hook(lambda m, args, kw: depths.add(kw["num_loops"]), with_kwargs=True)
        assert model.generate(ids, assistant_early_exit=4, num_loops=4, **kwargs).equal(expected)
        assert model.config.num_loops == 4
        assert depths == {2, 4}  # drafts of two loops, verification with four


@torch.no_grad()
@pytest.mark.parametrize("drafter", ["llama", "looped"])
@pytest.mark.parametrize("stored", [False, True])
def test_another_model_drafts_at_its_own_depth(drafter, stored):
    """transformers hands the arguments of the call and its generation config on to the model that drafts: a plain one
    refused num_loops, and a looped one ran as many loops as the model it drafts for."""
    model, assistant = make_model(num_loops=4), make_model(num_loops=4, seed=1)
    depths = set()
    assistant.model.register_forward_pre_hook(lambda m, args, kw: depths.add(kw["num_loops"]), with_kwargs=True)
    assistant.generation_config.num_loops = 2
    if drafter == "llama":
        sizes = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
        assistant = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, num_hidden_layers=1)).eval()
    ids = make_ids(1)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    if stored:
        model.generation_config.num_loops, model.generation_config.halting = 5, "fixed"
    else:
        kwargs |= {"num_loops": 5, "halting": "fixed", "generator": torch.Generator().manual_seed(0)}
    assert model.generate(ids, assistant_model=assistant, **kwargs).equal(model.generate(ids, **kwargs))
    assert depths == ({2} if drafter == "looped" else set())


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_generation_from_embeddings_equals_generation_from_ids(static):
    """generate looks for inputs_embeds in the signature of prepare_inputs_for_generation, which we override."""
    model, ids = make_model(), make_ids()
    kwargs = {"num_loops": 4, "max_new_tokens": 4, "do_sample": False}
    kwargs |= {"cache_implementation": "static"} if static else {}
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, **kwargs).equal(model.generate(ids, **kwargs)[:, 7:])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kv_sharing", ["per_loop", "first"])
@every_window
def test_continuous_batching_finds_the_slot_of_every_loop(kv_sharing, sliding_window):
    """Paged attention finds the slot by attention.layer_idx (trap 15)."""
    fields = {"kv_sharing": kv_sharing, "sliding_window": sliding_window}
    model = make_model(attn="sdpa", num_loops=3, eos_token_id=49, **fields)
    ids = make_ids(2, 6)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[:, 6:]
    outputs = model.generate_batch(
        inputs=ids.tolist(),
        generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=49),
        # Without sizes it takes most of the memory there is.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32),
    )
    generated = [output.generated_tokens for output in outputs.values()]
    assert sorted(generated) == sorted(expected.tolist())


@pytest.mark.parametrize(
    "settings",
    [{"num_loops": 2}, {"num_loops": torch.tensor([3, 2])}, {"halting": "kl"}],
    ids=["int", "tensor", "halting"],
)
def test_continuous_batching_refuses_loops_it_would_not_run(settings):
    """It calls the model without arguments of its own: those of the generation config were silently ignored."""
    model = make_model(num_loops=3)
    with pytest.raises(ValueError, match=r"config\.num_loops=3 .* leave both out"):
        model.generate_batch(inputs=[[3, 4]], generation_config=GenerationConfig(max_new_tokens=1, **settings))
    model.generation_config = GenerationConfig(max_new_tokens=1, **settings)
    with pytest.raises(ValueError, match=r"config\.num_loops=3 .* leave both out"):
        model.init_continuous_batching()


@pytest.mark.parametrize("kv_sharing", ["last", "mean", "gated"])
def test_continuous_batching_refuses_to_cut_prompts(kv_sharing):
    """It cuts a prompt where its load has it, and what these keep of a token depends on that; the paged cache would
    keep the rows of the last loop without a word, too."""
    with pytest.raises(ValueError, match=f"kv_sharing='{kv_sharing}' .* use generate"):
        make_model(kv_sharing=kv_sharing).init_continuous_batching()
