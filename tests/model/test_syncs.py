"""Laws for accelerators, held without one: no call waits for the device, and a graph is never left without a word."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, StaticCache
from transformers.generation import utils as generation

from modeling_looped import LoopedForCausalLM
from modeling_looped.growing_looped import growing_cache
from toys import KV_SHARINGS, make_ids, make_model, open_gates

MODELS = {
    **{kv_sharing: {"kv_sharing": kv_sharing} for kv_sharing in KV_SHARINGS},
    "sections": {"num_prelude_layers": 1, "num_coda_layers": 1},
    "learned positions": {"position_embedding": "learned"},
    "random start": {"state_init": "normal", "loop_connection": "inject_concat"},
    "damped": {"loop_connection": "damped"},
    "disco": {"loop_connection": "disco"},
    "exit gate": {"exit_gate": True},
    "trained exit gate": {"exit_gate": True, "exit_loss": "gate"},
    "window": {"sliding_window": 3},
    "chunks": {"kv_sharing": "gated", "prefill_chunk": 3},
}


@pytest.mark.parametrize("name", MODELS)
def test_an_update_reads_nothing_back(name):
    """A meta tensor has no values: whatever asks for one raises, where an accelerator would be waited for."""
    model, ids = make_model(**MODELS[name]).to("meta").train(), make_ids().to("meta")
    model(ids, labels=ids, use_cache=False, num_loops=4).loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_at_a_fixed_loop_count_reads_nothing_back(name, static):
    model, ids = make_model(**MODELS[name]).to("meta"), make_ids(tokens=3).to("meta")
    cache = StaticCache(config=model.config, max_cache_len=16) if static else growing_cache(model.config)
    for tokens in (ids, ids[:, :1], ids[:, :1]):
        assert model(tokens, past_key_values=cache, num_loops=4).loops_used.shape == tokens.shape


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_at_a_loop_count_of_each_row_reads_nothing_back(name, static):
    """The counts are on the host, where `generate` puts them; they may come in any order."""
    model, counts = make_model(**MODELS[name]).to("meta"), torch.tensor([2, 4, 1, 3])
    ids = make_ids(len(counts), 3).to("meta")
    cache = StaticCache(config=model.config, max_cache_len=16) if static else growing_cache(model.config)
    for tokens in (ids, ids[:, :1], ids[:, :1]):
        assert model(tokens, past_key_values=cache, num_loops=counts).loops_used.shape == tokens.shape


class Waits(TorchDispatchMode):
    """Raises where an accelerator would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_gated_streams_read_nothing_back():
    """Autocast does not know meta tensors, and ids on a CPU are checked there: hence embeddings."""
    model = make_model(loop_connection="hyper", max_num_loops=4)
    embeds = model.get_input_embeddings()(make_ids())
    with Waits():
        model.train()(inputs_embeds=embeds, labels=make_ids(), use_cache=False).loss.backward()
        model.eval()(inputs_embeds=embeds, use_cache=True)
    with Waits(), pytest.raises(RuntimeError, match="waits for the device"):
        embeds.sum().item()


def compile_counted(graphs: list) -> CompileConfig:
    """Settings under which every graph goes into the list, and is then run as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["random start", "chunks", "disco"])
def test_a_static_decode_step_is_one_graph(name):
    model, ids, graphs = open_gates(make_model(**MODELS[name])), make_ids(tokens=4), []
    torch.compiler.reset()
    call = {"max_new_tokens": 4, "do_sample": False}
    compiled = model.generate(ids, cache_implementation="static", compile_config=compile_counted(graphs), **call)
    assert compiled.equal(model.generate(ids, **call))
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("num_loops", [3, torch.tensor([3, 1])])
def test_what_is_kept_of_a_call_is_no_output_of_its_graph(num_loops, monkeypatch):
    """Under CUDA graphs the next call overwrites it."""
    model, kept, update = make_model(), [], LoopedForCausalLM._update_model_kwargs_for_generation

    def watched(self, outputs, model_kwargs, **kwargs):
        updated = update(self, outputs, model_kwargs, **kwargs)
        kept.append((updated["loops_of_calls"][-1][0], outputs.loops_used))
        return updated

    monkeypatch.setattr(LoopedForCausalLM, "_update_model_kwargs_for_generation", watched)
    call = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    used = model.generate(make_ids(2), num_loops=num_loops, cache_implementation="static", **call).loops_used
    assert used.equal(torch.as_tensor(num_loops).view(-1, 1).expand(2, 3))
    assert len(kept) == 3
    for loops, output in kept:
        assert isinstance(loops, int) or loops.untyped_storage().data_ptr() != output.untyped_storage().data_ptr()


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=2)
def test_every_loop_count_is_compiled():
    """At its limit, eight graphs of a function unless set, torch goes on without a graph and without a word."""
    model, token, graphs = make_model(num_core_layers=1), make_ids(1, 1), []
    torch.compiler.reset()
    compiled = model.get_compiled_call(compile_counted(graphs))
    for num_loops in range(1, 5):
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(token, past_key_values=cache, num_loops=num_loops)  # the prompt is not compiled
        assert compiled(token, past_key_values=cache, num_loops=num_loops).logits.isfinite().all()
        assert len(graphs) == num_loops


class Event:
    """What a CPU lacks."""

    def __init__(self, device, blocking):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


@torch.no_grad()
@pytest.mark.parametrize("depth", [{"num_loops": 4}, {"num_loops": torch.tensor([4])}, {"halting": "latent"}])
def test_a_stop_that_is_read_late_adds_no_loops(depth, monkeypatch):
    """As on mps: one call more than tokens that stay."""
    model, ids = make_model(), make_ids(1)
    call = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0} | depth
    call["eos_token_id"] = int(model.generate(ids, **call).sequences[0, ids.shape[1] + 2])
    expected = model.generate(ids, **call)
    monkeypatch.setattr(generation.DeferredStopCheck, "is_supported", staticmethod(lambda *args, **kwargs: True))
    monkeypatch.setattr(torch, "Event", Event)
    late = model.generate(ids, **call)
    assert late.sequences.equal(expected.sequences)
    assert late.loops_used.equal(expected.loops_used)
    assert late.loops_used.shape[1] == late.sequences.shape[1] - ids.shape[1] < 8


def test_the_signature_is_read_once():
    """generate reads it for every token of a model of remote code: from the decorated function, each time anew."""
    forward = LoopedForCausalLM.forward
    assert inspect.signature(forward) is forward.__signature__
    assert forward.__signature__ == inspect.signature(forward.__wrapped__)
