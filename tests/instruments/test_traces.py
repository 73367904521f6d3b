"""Laws of the one-pass trace: it is what separate runs say, loop by loop, and what the halting rules see."""

import math

import pytest
import torch

from looplab.instruments.traces import trace
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.halting_looped import RULES
from toys import count_layer_calls, make_ids, make_model, open_gates

LOOPS = 6
KINDS = [
    {},
    {"num_prelude_layers": 1},
    {"num_coda_layers": 1, "norm_before_coda": True, "norm_placement": "sandwich_sum", "embedding_multiplier": 4.0},
    {"norm_between_loops": True, "norm_placement": "sandwich"},
    {"loop_connection": "inject_add", "state_init": "zeros"},
    {"loop_connection": "inject_concat", "state_init": "normal"},
    {"kv_sharing": "last"},
    {"kv_sharing": "first"},
    {"kv_sharing": "natural"},
    {"loop_connection": "damped"},
    {"loop_connection": "disco"},
    # Where a prompt is cut, the chunks before leave entries in the cache that depend on the loop count of the call.
    *(
        {"kv_sharing": name, "prefill_chunk": chunk}
        for name, policy in SHARINGS.items()
        if policy.rewrites
        for chunk in (1, 3)
    ),
]


@pytest.fixture
def rows():
    """(12, 7) ids and their gold tokens."""
    return make_ids(rows=12), make_ids(rows=1, tokens=12, seed=2)[0]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_every_loop_answers_as_a_separate_run_of_that_many_loops(fields, rows):
    model, (ids, answers) = open_gates(make_model(**fields)), rows
    traced = trace(model, ids, answers, LOOPS, batch_size=5)
    for loops in range(1, LOOPS + 1):
        with torch.inference_mode():
            logits = model(ids, num_loops=loops).logits[:, -1]
        assert torch.equal(traced.prediction[loops - 1], logits.argmax(-1))
        for row, gold in enumerate(answers.tolist()):
            others = max(value for token, value in enumerate(logits[row].tolist()) if token != gold)
            expected = logits[row, gold].item() - others
            assert traced.margin[loops - 1, row].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_margin_is_positive_where_the_answer_is_right(fields, rows):
    model, (ids, answers) = open_gates(make_model(**fields)), rows
    answers[:6] = model(ids, num_loops=3).logits[:6, -1].argmax(-1)
    traced = trace(model, ids, answers, LOOPS)
    assert torch.equal(traced.margin > 0, traced.prediction == answers)
    assert (traced.margin[2, :6] > 0).all()


def test_a_trace_costs_one_forward(rows):
    model = make_model()
    calls = count_layer_calls(model)
    trace(model, *rows, LOOPS)
    assert calls == [("core", 12)] * (2 * LOOPS)


def test_a_trace_is_taken_without_dropout(rows):
    model = make_model(residual_dropout=0.5).train()
    first, again = (trace(model, *rows, LOOPS) for _ in range(2))
    assert torch.equal(first.margin, again.margin)


def test_the_first_loop_has_nothing_to_compare_with_and_entropy_is_that_of_the_answer(rows):
    model, (ids, answers) = make_model(), rows
    traced = trace(model, ids, answers, LOOPS)
    assert torch.isinf(traced.kl[0]).all()
    assert torch.isinf(traced.change[0]).all()
    assert torch.isfinite(traced.kl[1:]).all()
    p = model(ids, num_loops=2).logits[0, -1].softmax(-1).tolist()
    assert traced.entropy[1, 0].item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-4)


@pytest.mark.parametrize("name", ["kl", "kl_entropy", "latent"])
@pytest.mark.parametrize("fields", [{}, {"norm_between_loops": True, "norm_placement": "sandwich"}], ids=str)
def test_the_signals_are_those_that_the_rules_compare(name, fields, rows):
    """A threshold just above a row's signal at loop 2 halts the row there, one just below does not."""
    model, (ids, answers) = open_gates(make_model(**fields)), rows
    traced = trace(model, ids, answers, LOOPS)
    signals = {"kl": traced.kl, "kl_entropy": traced.entropy, "latent": traced.change}
    for row in range(3):
        value = signals[name][1, row].item()
        for threshold, halts in ((1.01 * value, True), (0.99 * value, False)):
            rule = RULES[name](1e9, threshold) if name == "kl_entropy" else RULES[name](threshold)
            output = model(ids[row : row + 1], num_loops=LOOPS, logits_to_keep=1, halting=rule)
            assert (output.loops_used[0, -1] == 2) == halts
