"""The benchmark counts what it says: FLOPs against torch's counter, cache bytes by arithmetic, ratios by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from looplab.bench.contexts import CACHES, context_row, filled_cache, step_at
from looplab.bench.pair import QUICK, build_pair
from looplab.bench.requests import EXIT_CALLS, MOST_HOPS, exit_row, request_lines, request_rows
from looplab.bench.speed import kv_row
from looplab.instruments.flops import connection_flops, forward_flops, training_flops, update_flops
from looplab.instruments.timing import compared, interleaved
from looplab.runs.models import load_run_model
from looplab.runs.sources import opened_runs
from looplab.tasks.registry import task_for
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.connections_looped import CONNECTIONS
from modeling_looped.gates_looped import KV_GATES
from modeling_looped.growing_looped import Growing
from toys import make_config, make_ids, make_model

CONFIGS = {
    "plain": {},
    "sections": {"num_prelude_layers": 1, "num_core_layers": 3, "num_coda_layers": 2},
    "two matrices per MLP": {"gated_mlp": False},
    "wide heads": {"head_dim": 12, "position_embedding": "none"},
    **{f"KV gate {gate}": {"kv_sharing": "gated", "kv_gate": gate, "kv_gate_rank": 3} for gate in KV_GATES},
    "adapter": {"loop_connection": "inject_concat"},
    "disco": {"loop_connection": "disco"},
    "hyper": {"loop_connection": "hyper", "max_num_loops": 4},
    "hyper, identity": {"loop_connection": "hyper", "hyper_mixing": "identity", "hyper_gates": "shared"},
    "hyper, sinkhorn": {"loop_connection": "hyper", "hyper_mixing": "sinkhorn", "max_num_loops": 4},
    "hyper, static": {"loop_connection": "hyper", "hyper_mixing": "static", "num_streams": 2, "max_num_loops": 4},
}


def counted_flops(action):
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_loops", [1, 4])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_the_flop_estimate_counts_every_loop_as_torch_does(fields, num_loops):
    """LoopFormer's estimate ignored loops, so its utilisation was too low by their number."""
    model, ids = make_model(attn="eager", **fields), make_ids()

    def train():
        model(ids, labels=ids, num_loops=num_loops, use_cache=False).loss.backward()

    with torch.no_grad():
        one = counted_flops(lambda: model(ids, num_loops=num_loops, logits_to_keep=1, use_cache=False))
    assert one == forward_flops(model.config, *ids.shape, num_loops, logits_kept=1)
    update = training_flops(model.config, *ids.shape, num_loops)
    assert counted_flops(train) == update == 3 * forward_flops(model.config, *ids.shape, num_loops)


TRUNCATED = {
    "plain": {"num_prelude_layers": 1, "num_coda_layers": 2},
    "the prelude is read in every loop": {"num_prelude_layers": 1, "loop_connection": "inject_concat"},
    "streams": {"num_prelude_layers": 1, "loop_connection": "hyper", "max_num_loops": 4},
    "KV gates": {"kv_sharing": "gated", "norm_placement": "sandwich"},
    "exit gate": {"exit_gate": True},
    "exit gate alone": {"exit_gate": True, "exit_loss": "gate"},
}


@pytest.mark.parametrize("num_grad_loops", [1, 2, 4, 9, None])
@pytest.mark.parametrize("fields", TRUNCATED.values(), ids=TRUNCATED)
def test_an_update_costs_what_its_gradient_goes_through(fields, num_grad_loops):
    model, ids = make_model(attn="eager", **fields), make_ids()
    labels = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()

    def train():
        model(ids, shift_labels=labels, num_loops=4, num_grad_loops=num_grad_loops, use_cache=False).loss.backward()

    counted = counted_flops(train)
    estimate = training_flops(model.config, *ids.shape, 4, num_grad_loops=num_grad_loops)
    # The first product of streams or KV gates in a cut-off loop has no gradient to give to what it reads.
    reads_state = "loop_connection" in fields or "kv_sharing" in fields
    assert counted == (pytest.approx(estimate, rel=0.02) if reads_state and num_grad_loops in (1, 2) else estimate)


def test_the_likeliest_token_is_read_and_no_gradient_goes_back():
    """Of what the head costs between loops the update has a third: the estimate is an upper bound there."""
    model, ids = make_model(attn="eager", loop_connection="disco", disco_channel="likeliest"), make_ids()
    with torch.no_grad():
        one = counted_flops(lambda: model(ids, num_loops=4, use_cache=False))
    assert one == forward_flops(model.config, *ids.shape, 4)
    update = counted_flops(lambda: model(ids, labels=ids, num_loops=4, use_cache=False).loss.backward())
    reads = ids.numel() * connection_flops(model.config, range(4))
    assert update == 3 * one - 2 * reads


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_every_connection_says_what_it_costs(connection):
    """One that the estimate did not know would be free in every claim of equal compute."""
    config = make_config(loop_connection=connection, max_num_loops=3)
    matrices = CONNECTIONS[connection].of(config)(config).parameters()
    per_loop = sum(2 * m.numel() for m in matrices if m.ndim == 2) / (3 if connection == "hyper" else 1)
    assert connection_flops(config, range(3)) >= 3 * per_loop


def test_an_update_costs_six_flops_per_weight_used_and_token():
    """Attention and head beside it: 12 x T^2 x D per layer call, and 6 x V x D for the one readout of a row."""
    config = make_config(gated_mlp=False, hidden_size=32, intermediate_size=128, num_attention_heads=2, head_dim=16)
    weights = config.num_core_layers * (4 * 32 * 32 + 2 * 32 * 128)
    by_hand = {
        (t, r): 6 * weights * r * t + 12 * t * t * 32 * config.num_core_layers * r + 6 * config.vocab_size * 32
        for t in (3, 7)
        for r in (1, 4)
    }
    for (t, r), flops in by_hand.items():
        assert update_flops(config, 5, {t: 1.0}, {r: 1.0}) == 5 * flops
    mixed = 0.75 * (0.5 * by_hand[3, 1] + 0.5 * by_hand[3, 4]) + 0.25 * (0.5 * by_hand[7, 1] + 0.5 * by_hand[7, 4])
    assert update_flops(config, 5, {3: 0.75, 7: 0.25}, {1: 0.5, 4: 0.5}) == pytest.approx(5 * mixed)


def test_more_loops_cost_the_core_and_nothing_else():
    config = make_config(num_prelude_layers=1, num_coda_layers=1)
    costs = [forward_flops(config, 2, 8, loops) for loops in (1, 2, 3)]
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0


def test_both_sides_of_a_comparison_do_the_same_work():
    ids = make_ids(2, 8)
    looped, llama = (counted_flops(lambda m=model: m(ids, use_cache=False)) for model in build_pair(32, QUICK))
    assert looped == llama


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("kv_sharing", SHARINGS)
def test_a_step_at_a_context_leaves_it_as_it_was(kv_sharing, kind, monkeypatch):
    """Every timed step sees the same number of cached tokens, in every slot."""
    model = make_model(kv_sharing=kv_sharing)
    caches = []

    def fill(*arguments):
        caches.append(filled_cache(*arguments))
        return caches[-1]

    monkeypatch.setattr("looplab.bench.contexts.filled_cache", fill)
    step_at(model, 9, 3, kind, rows=2)()
    cache = caches[0]
    assert {len(layer.keys) for layer in cache.layers} == {2}
    assert isinstance(cache.layers[-1], Growing) == (kind == "growing")
    slots = model.config.kv_slots().count(model.config.num_loops)
    assert [cache.get_seq_length(slot) for slot in range(len(cache.layers))] == [9] * slots
    row = context_row(32, QUICK, 1, kv_sharing, loops=4, context=5, kind=kind)
    assert row["cache"] == kind
    assert row["llama_kv_bytes"] / row["kv_bytes"] == (1 if kv_sharing == "per_loop" else 4)


@pytest.mark.parametrize(("kv_sharing", "ratio"), [("per_loop", 1.0), ("last", 1 / QUICK.loops)])
def test_kv_bytes_are_those_of_the_policy(kv_sharing, ratio):
    row = kv_row(32, QUICK, kv_sharing)
    assert row["llama"] == QUICK.layers * QUICK.loops * 2 * 32 * 4  # keys and values of 32 floats per layer
    assert row["ratio"] == ratio


def test_a_ratio_is_the_median_over_the_pairs():
    row = compared([(1.0, 2.0), (1.0, 3.0), (2.0, 2.0)], amount=10)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"], row["pairs"]) == (2.0, 1.0, 3.0, 3)
    assert (row["looped"], row["llama"]) == (10.0, 5.0)


def test_two_actions_are_timed_in_turn():
    order = []
    interleaved(lambda: order.append("a"), lambda: order.append("b"), rounds=3, warmup=1)
    assert "".join(order) == "ab" * 4


@pytest.mark.slow
def test_requests_at_their_own_depth_are_compared_with_the_smallest_count_that_answers_no_worse():
    """khop-51k follows one hop per loop, so that 16 hops need 16; what could be saved follows from the questions."""
    with opened_runs(["khop-51k"]) as [run]:
        rows = request_rows(run, QUICK, rounds=1, at_once=[4])
        _, tokenizer = load_run_model(run)
        chains = task_for("bench", [run]).chains(run, tokenizer, QUICK.rows_per_hop, MOST_HOPS)
    cells = sum(len(ids) for ids, _, _ in chains)
    by_length, by_rule = (next(row for row in rows if row["mode"] == mode) for mode in ("by length", "by rule"))
    assert (by_length["fixed_loops"], by_length["accuracy"]) == (MOST_HOPS, 1.0)
    assert by_length["ideal"] == MOST_HOPS * cells / sum(len(ids) * hops for ids, hops, _ in chains)
    assert by_length["loops"] < by_rule["loops"] < MOST_HOPS
    assert "own depth" in by_rule
    exits = [exit_row(32, QUICK, 1, 6, mode) for mode in EXIT_CALLS]
    assert len(request_lines([*rows, *exits])) == 2 + len(rows) + 2 + len(exits)
