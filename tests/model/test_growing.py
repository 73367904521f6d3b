"""Laws of the cache that grows by doubling: it is the stock cache, operation by operation and token by token."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from families import FAMILIES, make_frozen, make_tokens
from modeling_looped import looped
from modeling_looped.cache_layers_looped import CACHE_NAME
from modeling_looped.growing_looped import Growing, GrowingLayer, GrowingSlidingWindowLayer, growing_cache, let_grow
from toys import KV_SHARINGS, make_ids, make_model, open_gates

MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}

numbers = st.integers(0, 3)
operations = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 4), st.just("no_grad")),
    st.tuples(st.just("update"), st.integers(1, 4), st.just("inference")),
    st.tuples(st.just("update"), st.integers(1, 4), st.sampled_from(list(MODES))),
    st.tuples(st.just("crop"), numbers),
    st.tuples(st.sampled_from(["reorder", "select"]), st.lists(numbers, min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.sampled_from(["reset", "own tensors", "copy"])),
)


TOKEN = ("update", 1, "no_grad")


def layers(window: int | None, recording: bool, most: int | None):
    """A stock layer and a growing one."""
    if window is None:
        stock, grows = DynamicLayer(), GrowingLayer()
    else:
        stock, grows = DynamicSlidingWindowLayer(window), GrowingSlidingWindowLayer(window)
    grows.most = most
    if recording:
        for layer in (stock, grows):
            DynamicCache.activate_past_recording(type("Holder", (), {"layers": [layer]})())
    return stock, grows


def rows_of(layer) -> int:
    return len(layer.keys) if layer.is_initialized and layer.keys.ndim == 4 else 3


@torch.no_grad()
def apply(layer, name: str, argument=None, mode="no_grad"):
    """One operation on a layer: what it returns."""
    if name == "update":
        with MODES[mode]():
            return layer.update(*argument)
    if name == "crop" and layer.is_initialized:
        return layer.crop(-min(argument, layer.keys.shape[-2]))
    if name in ("reorder", "select"):
        rows = torch.tensor(argument) % rows_of(layer)
        return layer.reorder_cache(rows) if name == "reorder" else layer.batch_select_indices(rows)
    if name == "repeat":
        return layer.batch_repeat_interleave(argument)
    if name == "own tensors" and layer.is_initialized:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return layer.reset() if name == "reset" else None


@settings(derandomize=True, max_examples=120, deadline=None, database=None)
@example([TOKEN, TOKEN, ("reorder", [2, 0]), ("crop", 1), TOKEN], None, False, None)  # what was seen is moved along
@example([TOKEN, TOKEN, ("crop", 2), ("reorder", [2, 0]), TOKEN], None, False, None)  # an empty layer has no order
@given(
    st.lists(operations, min_size=4, max_size=16),
    st.sampled_from([None, None, 2, 3, 6]),
    st.booleans(),
    st.sampled_from([None, 5, 40]),
)
def test_every_sequence_of_operations_is_the_stock_layers(sequence, window, recording, most):
    """Whatever somebody holds from earlier stays as it was, too, unless the cache is said to be cropped regularly."""
    stock, grows = layers(window, recording, most)
    draw, held = torch.Generator().manual_seed(0), []
    for name, *arguments in sequence:
        if name == "update":
            arguments[0] = [torch.randn(rows_of(stock), 2, arguments[0], size, generator=draw) for size in (4, 6)]
        if name == "crop" and window is not None and not recording:
            continue  # a sliding layer that does not record refuses it
        if name == "repeat" and rows_of(stock) > 6:
            continue
        expected, got = (apply(layer, name, *arguments) for layer in (stock, grows))
        if name == "copy":
            grows = copy.deepcopy(grows)
        if name == "update":
            assert all(entries.equal(twin) for entries, twin in zip(got, expected, strict=True))
            held += [(entries, entries.clone()) for entries in got]
        if stock.is_initialized:
            held += [(entries, entries.clone()) for entries in (grows.keys, grows.values)]
        assert grows.get_seq_length() == stock.get_seq_length()
        assert grows.get_mask_sizes(2) == stock.get_mask_sizes(2)
        assert grows.is_initialized == stock.is_initialized
        if stock.is_initialized:
            assert grows.keys.equal(stock.keys)
            assert grows.values.equal(stock.values)
    if not recording:
        assert all(entries.equal(before) for entries, before in held)


@pytest.mark.parametrize("window", [None, 8])
def test_most_updates_copy_nothing(window):
    """A stock layer copies S entries for every token. Room is made anew a few times, and for no more than `most`."""
    _, grows = layers(window, recording=False, most=300)
    rooms = set()
    with torch.no_grad():
        for _ in range(300):
            grows.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
            rooms.add(grows.keys.untyped_storage().data_ptr())
            held = grows.keys.untyped_storage().nbytes() // 16
            assert held <= (300 if window is None else 2 * window)
    assert len(rooms) <= (10 if window is None else 300 // window + 3)


CALLS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "per row": {"num_loops": torch.tensor([1, 5, 3])},
    "drafts": {"draft_loops": 1},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
@pytest.mark.parametrize(("sliding_window", "attn"), [(None, "sdpa"), (3, "eager")])
def test_generate_grows_its_cache_bit_for_bit(kv_sharing, sliding_window, attn):
    model = open_gates(make_model(attn=attn, kv_sharing=kv_sharing, sliding_window=sliding_window))
    for name, call in CALLS.items():
        drafts = name in ("drafts", "lookup")
        if drafts and (model.model.sharing.rewrites or (kv_sharing == "natural" and sliding_window)):
            continue
        ids = make_ids(1 if drafts else 3)
        call = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True} | call
        grown, stock = model.generate(ids, **call), model.generate(ids, cache_implementation="dynamic", **call)
        assert grown.sequences.equal(stock.sequences), name
        assert all(a.equal(b) for a, b in zip(grown.scores, stock.scores, strict=True)), name
        assert all(isinstance(layer, Growing) for layer in grown[CACHE_NAME].layers)
        assert not any(isinstance(layer, Growing) for layer in stock[CACHE_NAME].layers)


@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("num_grad_loops", [None, 1])
def test_gradients_through_a_growing_cache_are_the_stock_ones(kv_sharing, sliding_window, num_grad_loops):
    """A prompt without a gradient, then two calls with one, the second of which reads what the first wrote."""
    model, ids, gradients = (
        open_gates(make_model(kv_sharing=kv_sharing, sliding_window=sliding_window)),
        make_ids(),
        [],
    )
    for grows in (False, True):
        cache = DynamicCache(config=model.config)
        cache = let_grow(cache) if grows else cache
        with torch.no_grad():
            for piece in (ids[:, :2], ids[:, 2:3]):
                model(piece, past_key_values=cache, num_loops=4)
        calls = [
            model(piece, past_key_values=cache, num_loops=4, num_grad_loops=num_grad_loops)
            for piece in ids.split(4, 1)
        ]
        model.zero_grad()
        sum(call.logits.square().sum() for call in calls).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_looped_frozen_model_grows_its_cache(family):
    """Whatever its attention does with keys that are not contiguous."""
    model = make_frozen(family, "eager" if family == "gemma2" else "sdpa", torch.float32)
    call = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    for kept in ("first", "last") if family == "llama" else ("first",):
        with looped(model, cache=kept):
            grown, stock = (
                model.generate(make_tokens(), cache_implementation=kind, **call) for kind in (None, "dynamic")
            )
        assert all(isinstance(layer, Growing) for layer in grown[CACHE_NAME].layers)
        assert not any(isinstance(layer, Growing) for layer in stock[CACHE_NAME].layers)
        assert all(a.equal(b) for a, b in zip(grown.scores, stock.scores, strict=True))


@torch.no_grad()
def test_caches_of_the_user_stay_what_they_are():
    model, ids = make_model(), make_ids()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=16),
    ):
        kinds = {type(layer) for layer in cache.layers} or {DynamicLayer}
        assert model.generate(ids, max_new_tokens=4, do_sample=False, **{CACHE_NAME: cache}).equal(expected)
        assert {type(layer) for layer in cache.layers} == kinds
    cache = growing_cache(model.config)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, **{CACHE_NAME: cache}).equal(expected)
