"""One token at a time: the shorter ways of a decoding step against those of transformers, and the compiled step."""

import itertools

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_looped import LoopedForCausalLM
from modeling_looped.growing_looped import growing_cache
from modeling_looped.layers_looped import rotated
from toys import make_ids, make_model

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "tokens"), [(4, 4, 1), (4, 2, 1), (6, 1, 5)])
def test_queries_and_keys_are_turned_at_once_as_llama_turns_them(dtype, heads, key_heads, tokens):
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, count, tokens, 8, generator=draw).to(dtype) for count in (heads, key_heads))
    angles = torch.randn(1, tokens, 8, generator=draw)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    both = rotated(torch.cat((query, key), dim=1), cosines, sines)
    expected = apply_rotary_pos_emb(query, key, cosines, sines)
    assert both[:, :heads].equal(expected[0])
    assert both[:, heads:].equal(expected[1])


CACHES = {"growing": growing_cache, "dynamic": DynamicCache, "static": StaticCache}


def make_cache(kind: str, config, tokens: int):
    settings = {"max_cache_len": 12} if kind == "static" else {}
    cache = growing_cache(config) if kind == "growing" else CACHES[kind](config=config, **settings)
    entries = torch.zeros(3, config.num_key_value_heads, tokens, config.head_dim)
    for slot in range(len(cache.layers)):
        cache.update(entries, entries, slot)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sliding_window", [None, 3, 20])
@pytest.mark.parametrize("kind", list(CACHES))
@pytest.mark.parametrize("padding", [None, (0, 0, 0), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
def test_the_mask_of_a_step_is_that_of_transformers(attention, sliding_window, kind, padding, tokens):
    """Also where `generate` makes it, for a static cache."""
    model = make_model(num_loops=2, sliding_window=sliding_window)
    model.set_attn_implementation(attention)
    config, cache = model.config, make_cache(kind, model.config, 6)
    embeds = torch.zeros(3, tokens, config.hidden_size)
    mask = None
    if padding is not None:
        mask = torch.ones(3, 6 + tokens, dtype=torch.long)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
    create = create_causal_mask if sliding_window is None else create_sliding_window_causal_mask
    expected = create(config, embeds, mask, cache, None)
    makers = [model.model.pattern.mask]
    if kind == "static":
        makers.append(model.create_masks_for_generate)
    for make in makers:
        got = make(config, embeds, mask, cache, None)
        assert (got is None) == (expected is None)
        if expected is not None:
            assert got.dtype == expected.dtype
            assert got.equal(expected)


class Counted:
    """Settings of a compilation whose backend counts graphs, and their calls, and runs them as they are."""

    def __init__(self):
        self.graphs = self.calls = 0

        def backend(graph, inputs):
            self.graphs += 1

            def run(*arguments):
                self.calls += 1
                return graph.forward(*arguments)

            return run

        self.config = CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=False)


def test_one_argument_compiles_the_step():
    """The prompt is not compiled: of 4 tokens 3 come from the graph."""
    model, ids, counted = make_model(), make_ids(), Counted()
    torch.compiler.reset()
    assert model.generate(ids, compile_config=counted.config, **GREEDY).equal(model.generate(ids, **GREEDY))
    assert (counted.graphs, counted.calls) == (1, 3)


def test_a_cache_that_is_named_is_kept():
    model, ids = make_model(), make_ids()
    for named in ({"cache_implementation": "dynamic"}, {"past_key_values": DynamicCache(config=model.config)}):
        counted = Counted()
        model.generate(ids, compile_config=counted.config, **named, **GREEDY)
        assert counted.graphs == 0


COUNTS = [*range(1, 12), 20]


@pytest.mark.slow
def test_every_loop_count_of_a_process_is_compiled_once():
    """torch gives up after eight graphs of a function, and goes on without them and without a word."""
    model, ids, counted = make_model(num_core_layers=1), make_ids(1, 3), Counted()
    call = {"max_new_tokens": 2, "do_sample": False}
    torch.compiler.reset()
    for visit, num_loops in enumerate([*COUNTS, *reversed(COUNTS)], start=1):
        compiled = model.generate(ids, num_loops=num_loops, compile_config=counted.config, **call)
        assert compiled.equal(model.generate(ids, num_loops=num_loops, **call))
        assert (counted.graphs, counted.calls) == (min(visit, len(COUNTS)), visit)


def test_a_compiled_step_sees_weights_that_were_changed():
    model, ids, counted = make_model(), make_ids(1, 3), Counted()
    torch.compiler.reset()
    other = make_model(seed=5).state_dict()

    def check(model: LoopedForCausalLM) -> torch.Tensor:
        call = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
        logits = torch.stack(model.generate(ids, compile_config=counted.config, **call).logits)
        torch.testing.assert_close(logits, torch.stack(model.generate(ids, **call).logits))
        return logits

    before = check(model)
    with torch.no_grad():
        model.model.core[0].self_attn.q_proj.weight.mul_(2)
    edited = check(model)
    model.model.core[0].mlp.up_proj.weight.data *= 3
    edited_again = check(model)
    model.load_state_dict(other)
    loaded = check(model)
    assert not any(a.equal(b) for a, b in itertools.pairwise((before, edited, edited_again, loaded)))
    assert counted.graphs == 1
