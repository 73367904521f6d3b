"""Laws of the solvers of a looped window: their order, their cost, and the equations of the paper."""

import copy
import math

import pytest
import torch

from families import make_frozen, make_tokens
from modeling_looped.frozen_looped import looped
from modeling_looped.frozen_solvers_looped import METHODS

# The toys are float64, so that equal sums are equal to 1e-9; eager attention, routers and rotary angles are computed
# in float32 by transformers itself, and so is generate's record of the logits.
F64 = {"rtol": 1e-9, "atol": 1e-9}


WINDOW = (2, 4)
EVALUATIONS = {"blend": 1, "euler": 1, "naive": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def count_calls(model, layers):
    """A list that grows by the layer's index at every call."""
    calls = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_one_loop_is_the_base_model_with_every_method(method):
    model, ids = make_frozen("llama"), make_tokens()
    base = logits_of(model, ids)
    with looped(model, WINDOW, num_loops=3, method=method):
        assert torch.equal(logits_of(model, ids, num_loops=1), base)
        assert not torch.allclose(logits_of(model, ids), base, atol=1e-3)


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
