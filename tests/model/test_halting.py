"""Laws of depth per row: a row equals itself run alone, and what is not needed is not computed."""

import itertools
import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.utils.logging import warning_once

from modeling_looped import LoopedForCausalLM, cache_looped
from modeling_looped.growing_looped import growing_cache
from modeling_looped.halting_looped import RULES as RULE_CLASSES
from modeling_looped.halting_looped import Rule, halting_rule
from toys import FP32, KV_SHARINGS, count_layer_calls, make_ids, make_model

RULES = {
    "kl_entropy": {"rule": "kl_entropy", "kl_threshold": 0.003, "max_entropy": 3.7},
    "kl": {"rule": "kl", "kl_threshold": 0.003},
    "latent": {"rule": "latent", "threshold": 0.12},
    "q_exit": {"rule": "q_exit", "q": 0.8},
}
every_rule = pytest.mark.parametrize("rule", RULES)
every_sharing = pytest.mark.parametrize("kv_sharing", KV_SHARINGS)


def make_settling_model(**fields):
    """A model whose rows settle at different loops: injection makes the loop a contraction towards a fixed point."""
    fields = {"loop_connection": "inject_add", "norm_between_loops": True, "initializer_range": 0.15, **fields}
    return make_model(seed=2, **fields)


def make_model_for(rule, **fields):
    """A settling model; for the rule of the exit gate one whose gate tells tokens apart."""
    if rule != "q_exit":
        return make_settling_model(**fields)
    model = make_settling_model(exit_gate=True, **{**fields, "num_coda_layers": 0})
    with torch.no_grad():
        model.model.exit_gate.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return model


def loops_by_hand(model, ids, rule, num_loops):
    """The loop a row halts at, from one full run per loop count: nothing of the halting code but its formula."""
    settings = {"kl_threshold": float("inf"), "max_entropy": float("inf"), "threshold": None, **RULES[rule]}
    previous, stays = None, 1.0
    for loops in range(1, num_loops + 1):
        state = model.model(ids, num_loops=loops).last_hidden_state[:, -1]
        if rule == "q_exit":
            gate = model.model.exit_gate
            stays *= 1 - torch.sigmoid(state[0] @ gate.weight[0] + gate.bias).item()
            if 1 - stays >= settings["q"]:
                return loops
            continue
        log_p = model.lm_head(state).log_softmax(-1)
        if previous is not None:
            kl = (log_p.exp() * (log_p - previous[0])).sum(-1).item()
            entropy = -(log_p.exp() * log_p).sum(-1).item()
            change = ((state - previous[1]).norm() / state.norm()).item()
            if rule == "latent":
                done = change < settings["threshold"]
            else:
                done = kl < settings["kl_threshold"] and entropy < settings["max_entropy"]
            if done:
                return loops
        previous = log_p, state
    return num_loops


@torch.no_grad()
@every_rule
def test_rows_halt_where_the_formula_says_and_read_out_there(rule):
    model, ids = make_model_for(rule), make_ids(6, 5)
    output = model(ids, num_loops=12, halting=RULES[rule], logits_to_keep=1)
    expected = [loops_by_hand(model, ids[row : row + 1], rule, 12) for row in range(6)]
    assert output.loops_used[:, -1].tolist() == expected
    assert len(set(expected)) > 1  # else the test shows nothing about rows
    for row, loops in enumerate(expected):
        alone = model(ids[row : row + 1], num_loops=loops, logits_to_keep=1).logits
        torch.testing.assert_close(output.logits[row], alone[0], **FP32)


@torch.no_grad()
@every_rule
def test_halted_rows_cost_nothing(rule):
    """Ouro, vLLM, HRM and TRM compute every loop whatever their exit says (trap 9); Huginn waits for the slowest row
    (trap 10). Rows of the core's layer calls are counted."""
    model, ids = make_model_for(rule, num_prelude_layers=1, num_coda_layers=1), make_ids(6, 5)
    calls = count_layer_calls(model)
    used = model(ids, num_loops=12, halting=RULES[rule], logits_to_keep=1).loops_used[:, -1]
    core_rows = [rows for section, rows in calls if section == "core"]
    expected = [int((used > loop).sum()) for loop in range(int(used.max())) for _ in range(2)]
    assert core_rows == expected
    assert sum(core_rows) < 12 * 2 * 6
    assert [rows for section, rows in calls if section != "core"] == [6] * (1 + model.config.num_coda_layers)


@torch.no_grad()
@every_sharing
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_rows_of_different_depth_equal_each_row_alone(kv_sharing, attn):
    model, ids = make_model(kv_sharing=kv_sharing, attn=attn), make_ids(4, 6)
    budget = torch.tensor([3, 1, 5, 1])
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    calls = count_layer_calls(model)
    output = model(ids, num_loops=budget)
    assert [rows for _, rows in calls] == [4, 4, 2, 2, 2, 2, 1, 1, 1, 1]
    tokens = model.generate(ids, num_loops=budget, return_dict_in_generate=True, **kwargs)
    assert tokens.loops_used.equal(budget[:, None].expand(4, 5))
    for row, loops in enumerate(budget.tolist()):
        torch.testing.assert_close(output.logits[row], model(ids[row : row + 1], num_loops=loops).logits[0], **FP32)
        assert tokens.sequences[row].equal(model.generate(ids[row : row + 1], num_loops=loops, **kwargs)[0])
    static = model.generate(ids, num_loops=budget, cache_implementation="static", **kwargs)
    assert static.equal(tokens.sequences)
    padded, mask = torch.cat([torch.zeros(4, 2, dtype=torch.long), ids], 1), torch.ones(4, 8, dtype=torch.long)
    mask[:, :2] = 0
    assert model.generate(padded, attention_mask=mask, num_loops=budget, **kwargs)[:, 2:].equal(tokens.sequences)


def drawn_counts(seed: int, rows: int = 5) -> list[int]:
    return torch.randint(1, 6, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
@every_sharing
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 3, "num_coda_layers": 1}])
def test_rows_of_any_order_of_counts_get_their_own_scores_and_cache_back(kv_sharing, fields):
    """Decoding sorts them, the deepest first; padded prompts, and a cache that goes on afterwards."""
    model, ids, counts = make_model(kv_sharing=kv_sharing, **fields), make_ids(5, 6), drawn_counts(len(kv_sharing))
    assert counts != sorted(counts, reverse=True)
    padding = torch.tensor([0, 3, 1, 0, 2])
    mask = (torch.arange(6) >= padding[:, None]).long()
    kwargs = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    batch = model.generate(ids * mask, attention_mask=mask, num_loops=torch.tensor(counts), **kwargs)
    assert batch.loops_used.equal(torch.tensor(counts)[:, None].expand(5, 4))
    seen = torch.cat([mask, torch.ones(5, 4, dtype=torch.long)], dim=1)
    last, after = batch.sequences[:, -1:], {"use_cache": True, "logits_to_keep": 1}
    goes_on = model(
        last, attention_mask=seen, past_key_values=batch.past_key_values, num_loops=torch.tensor(counts), **after
    )
    for row, loops in enumerate(counts):
        own = ids[row : row + 1, padding[row] :]
        alone = model.generate(own, attention_mask=torch.ones_like(own), num_loops=loops, **kwargs)
        assert batch.sequences[row, 6:].equal(alone.sequences[0, -4:])
        for ours, theirs in zip(batch.scores, alone.scores, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], **FP32)
        next_alone = model(last[row : row + 1], past_key_values=alone.past_key_values, num_loops=loops, **after)
        torch.testing.assert_close(goes_on.logits[row], next_alone.logits[0], **FP32)


class Operations(TorchDispatchMode):
    """Notes the tensors of every operation of a kind."""

    def __init__(self):
        super().__init__()
        self.outputs = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **kwargs or {})
        self.outputs.setdefault(operation.overloadpacket.__name__, []).append(output)
        return output


@torch.no_grad()
@every_sharing
@pytest.mark.parametrize("counts", [[4, 3, 2, 1], [1, 2, 3, 4]])
def test_rows_that_leave_from_an_end_are_not_asked_for_and_their_cache_is_not_copied(kv_sharing, counts):
    model, cache = make_model(kv_sharing=kv_sharing, num_loops=4), DynamicCache()
    model.generate(make_ids(4, 30), past_key_values=cache, num_loops=4, max_new_tokens=2)
    with Operations() as seen:
        model(make_ids(4, 1), past_key_values=cache, num_loops=torch.tensor(counts))
    assert "nonzero" not in seen.outputs
    indexed = [each.shape for name in ("index", "index_select") for each in seen.outputs.get(name, [])]
    assert not any(len(shape) == 4 and shape[2] > 30 for shape in indexed)


@torch.no_grad()
@every_sharing
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_rows_read_as_views_are_the_rows_read_by_an_index(kv_sharing, attn, sliding_window, monkeypatch):
    """After every token: the same scores and caches, and as views no long context is copied."""
    model = make_model(kv_sharing=kv_sharing, attn=attn, sliding_window=sliding_window, num_loops=4)
    padding, found = torch.tensor([0, 3, 0, 1, 2]), []
    mask, copied = (torch.arange(32) >= padding[:, None]).long(), []
    for cost in (0, math.inf):
        monkeypatch.setattr(cache_looped, "RUN_COST", cost)
        cache, seen, counts = DynamicCache(config=model.config), mask[:, :30], [2, 4, 1, 3, 4]
        model(make_ids(5, 30), attention_mask=seen, past_key_values=cache)
        for _ in range(2):
            seen = torch.nn.functional.pad(seen, (0, 1), value=1)
            with Operations() as operations:
                call = {"attention_mask": seen, "past_key_values": cache, "num_loops": torch.tensor(counts)}
                found.append(model(make_ids(5, 1), **call).logits)
            counts.reverse()
        found += [entries for layer in cache.layers for entries in (layer.keys, layer.values)]
        shapes = [each.shape for each in operations.outputs.get("index_select", []) if each.ndim == 4]
        copied.append(any(shape[2] >= min(30, sliding_window or 30) for shape in shapes))
    assert copied == [False, kv_sharing != "natural"]  # which copies what its first loop read, row by row
    for views, index in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        torch.testing.assert_close(views, index, **FP32)


@torch.no_grad()
def test_a_budget_follows_its_row_through_beams():
    model, ids = make_model(), make_ids(2, 5)
    kwargs = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    batch = model.generate(ids, num_loops=torch.tensor([1, 4]), **kwargs)
    for row, loops in enumerate((1, 4)):
        assert batch[row].equal(model.generate(ids[row : row + 1], num_loops=loops, **kwargs)[0])


@torch.no_grad()
@every_rule
@every_sharing
def test_halting_in_generation_is_per_row_and_per_token(rule, kv_sharing):
    """A batch generates what its rows generate alone, through a cache whose early tokens were filled in."""
    model, ids = make_model_for(rule, kv_sharing=kv_sharing), make_ids(5, 5)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "num_loops": 10, "halting": RULES[rule]}
    batch = model.generate(ids, return_dict_in_generate=True, **kwargs)
    assert batch.loops_used.shape == (5, 6)
    assert batch.loops_used.unique().numel() > 1
    static = model.generate(ids, cache_implementation="static", **kwargs)
    assert static.equal(batch.sequences)
    for row in range(5):
        alone = model.generate(ids[row : row + 1], return_dict_in_generate=True, **kwargs)
        assert alone.sequences[0].equal(batch.sequences[row])
        assert alone.loops_used[0].equal(batch.loops_used[row])


@torch.no_grad()
def test_an_early_token_is_cached_as_its_last_computed_loop():
    """The fill policy by hand: slots of loops a token never ran hold its rows of the deepest loop it did."""
    model, ids = make_settling_model(), make_ids(4, 5)
    cache = DynamicCache(config=model.config)
    used = model(ids, num_loops=8, halting=RULES["kl"], past_key_values=cache, logits_to_keep=1).loops_used[:, -1]
    full = model(ids, num_loops=8, use_cache=True).past_key_values
    assert len(cache.layers) == 16
    for loop in range(8):
        for layer in range(2):
            for row, ran in enumerate(used.tolist()):
                expected = full.layers[2 * min(loop, ran - 1) + layer].keys[row]
                torch.testing.assert_close(cache.layers[2 * loop + layer].keys[row], expected, **FP32)


@torch.no_grad()
@every_rule
@pytest.mark.parametrize(("make_cache", "window"), [
    (growing_cache, None),
    (growing_cache, 3),
    (lambda config: DynamicCache(config=config), None),
    (lambda config: DynamicCache(config=config), 3),
    (lambda config: DynamicCache(), None),
], ids=["growing", "growing, window", "dynamic", "dynamic, window", "no config"])  # fmt: skip
def test_a_cache_has_the_slots_of_the_loops_that_ran_and_of_one_more(make_cache, window, rule):
    """Whatever the largest count is; and later tokens, which loop deeper or less deep, see what they see in a static
    cache, which has the slots of all loops from the start."""
    model, ids = make_model_for(rule, sliding_window=window), make_ids(3, 9)
    late, static = make_cache(model.config), StaticCache(model.config, max_cache_len=9)
    deepest = 0
    for tokens, budget, halting in ((4, 40, True), (1, 40, True), (1, 3, False), (2, 40, True), (1, 9, False)):
        now, ids = ids[:, :tokens], ids[:, tokens:]
        call = {"num_loops": budget, "halting": RULES[rule] if halting else None, "use_cache": True}
        got, full = (model(now, past_key_values=cache, **call) for cache in (late, static))
        torch.testing.assert_close(got.logits, full.logits, **FP32)
        assert got.loops_used.equal(full.loops_used)
        deepest = max(deepest, int(got.loops_used.max()))
        slots = model.config.kv_slots()
        assert slots.count(deepest) <= len(late.layers) <= slots.count(deepest + 1)
    assert 9 <= deepest < 39


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [
        ({"rule": "kl", "kl_threshold": 0.44}, [0.5, 0.5], [0.9, 0.1]),
        ({"rule": "kl_entropy", "kl_threshold": 0.44}, [0.5, 0.5], [0.9, 0.1]),
        ({"rule": "latent", "threshold": 0.7}, [1.0, 0.0], [2.0, 0.0]),
    ],
)
def test_a_change_is_measured_by_what_came_last(rule, low, high):
    """KL(high || low) is 0.368 nats and KL(low || high) 0.511; a state of 2 after 1 has changed by a half, and one of
    1 after 2 by all of it. Where states hardly change both are alike, and no run of a model tells them apart."""
    states = [torch.tensor(values)[None, None] for values in (low, high)]
    for before, after, halts in ((*states, True), (*reversed(states), False)):
        rule_of_call, memory = halting_rule(rule), None
        for state in (before, after):
            memory, done = rule_of_call.step(memory, state, torch.log)
        assert done.item() == halts


@torch.no_grad()
@pytest.mark.parametrize("name", ["kl_entropy", "kl"])
def test_thresholds_at_their_ends(name):
    """eps = infinity halts everyone at loop 2; eps = 0 never halts, since rounding cannot make the KL negative."""
    model, ids = make_model(residual_init="zero"), make_ids()
    at_once = {"rule": name, "kl_threshold": float("inf")}
    never = {"rule": name, "kl_threshold": 0.0}
    if name == "kl_entropy":
        at_once["max_entropy"] = never["max_entropy"] = float("inf")
    assert model(ids, num_loops=7, halting=at_once).loops_used.unique().tolist() == [2]
    assert model(ids, num_loops=7, halting=never).loops_used.unique().tolist() == [7]
    assert model(ids, num_loops=1, halting=at_once).loops_used.unique().tolist() == [1]


@torch.no_grad()
def test_high_entropy_keeps_a_row_looping():
    """KL alone stops on a distribution that stands still because it knows nothing yet (arXiv 2604.07822)."""
    model, ids = make_model(residual_init="zero", initializer_range=0.001), make_ids()
    rule = {"rule": "kl_entropy", "kl_threshold": 1.0, "max_entropy": 3.0}
    assert model(ids, num_loops=6, halting=rule).loops_used.unique().tolist() == [6]  # ln 50 = 3.9 nats
    assert model(ids, num_loops=6, halting={"rule": "kl", "kl_threshold": 1.0}).loops_used.unique().tolist() == [2]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_exit_threshold(dtype):
    """q >= 1 is the last loop, exactly: where the sum of exit probabilities rounds to 1 earlier, as it does in bf16 in
    Ouro (trap 11), and even where a saturated gate makes it 1 in float32. q = 0 is the first loop."""
    model, ids = make_model_for("q_exit").to(dtype), make_ids()
    for bias in (4.0, 60.0):
        model.model.exit_gate.bias.fill_(bias)
        output = model(ids, num_loops=6, halting={"rule": "q_exit", "q": 1.0})
        assert output.loops_used.unique().tolist() == [6]
        assert output.logits.equal(model(ids, num_loops=6).logits)
    model.model.exit_gate.bias.fill_(-60.0)
    assert model(ids, num_loops=6, halting={"rule": "q_exit", "q": 0}).loops_used.unique().tolist() == [1]


def test_the_exit_sum_does_not_round_up_in_half_precision():
    """1 - 0.018 ** 2 is 0.99968, which bfloat16 rounds to 1: a threshold of 0.9999 would be passed a loop early."""
    rule = halting_rule({"rule": "q_exit", "q": 0.9999})
    gate_logits = torch.full((1, 1), 4.0, dtype=torch.bfloat16)
    memory, loops = None, []
    for _ in range(3):
        memory, done = rule.step(memory, None, lambda state: gate_logits)
        loops.append(done.item())
    assert loops == [False, False, True]


@torch.no_grad()
def test_the_exit_rule_of_a_model_without_a_gate_is_refused():
    model = make_model()
    calls = count_layer_calls(model)
    for call in (model, model.model, lambda ids, halting: model.generate(ids, halting=halting, max_new_tokens=2)):
        with pytest.raises(ValueError, match="exit_gate=True"):
            call(make_ids(), halting={"rule": "q_exit", "q": 0.9})
    assert calls == []


@torch.no_grad()
def test_the_exit_rule_needs_no_head_and_can_be_saved(tmp_path):
    model, ids = make_model_for("q_exit"), make_ids(4, 5)
    with_head = model(ids, num_loops=8, halting=RULES["q_exit"])
    base = model.model(ids, num_loops=8, halting=RULES["q_exit"])
    assert base.loops_used.equal(with_head.loops_used)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, num_loops=8, halting=RULES["q_exit"], **kwargs)
    model.generation_config.num_loops, model.generation_config.halting = 8, RULES["q_exit"]
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path).generate(ids, **kwargs)
    assert loaded.sequences.equal(expected.sequences)
    assert loaded.loops_used.equal(expected.loops_used)
    assert loaded.loops_used.unique().numel() > 1


@torch.no_grad()
@pytest.mark.parametrize(
    "depth",
    [{"num_loops": 7}, {"num_loops": torch.tensor([1, 5, 4])}, {"num_loops": 6, "halting": RULES["latent"]}],
    ids=str,
)
@pytest.mark.parametrize("against", ["the last token", "another prompt"])
def test_guidance_loops_as_the_text_does(against, depth):
    """Against two decodings of one call per token, guided by hand."""
    model, ids = make_model(num_loops=2), make_ids(3, 5)
    other = make_ids(3, 4, seed=2) if against == "another prompt" else None
    settings = {"max_new_tokens": 4, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
    got = model.generate(ids, guidance_scale=1.7, negative_prompt_ids=other, **depth, **settings)

    sides = [[ids, None], [ids[:, -1:] if other is None else other, None]]  # what comes next, and the cache
    for scores in got.scores:
        chances = []
        for side in sides:
            output = model(side[0], past_key_values=side[1], use_cache=True, logits_to_keep=1, **depth)
            side[1] = output.past_key_values
            chances.append(output.logits[:, -1].log_softmax(-1))
        text, unguided = chances
        torch.testing.assert_close(scores, unguided + 1.7 * (text - unguided), **FP32)
        for side in sides:
            side[0] = scores.argmax(-1, keepdim=True)


def test_fixed_halting_is_no_halting():
    model, ids = make_model(), make_ids()
    assert model(ids, halting="fixed").logits.equal(model(ids).logits)


class DoneFromFourth(Rule):
    """Halts at every position but the first four."""

    def step(self, memory, state, readout):
        return state, (torch.arange(state.shape[1]) >= 4).expand(state.shape[:2])


@torch.no_grad()
def test_padding_does_not_hold_a_row_back():
    model, ids = make_model(), make_ids(2, 9)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    used = model(ids, attention_mask=mask, num_loops=6, halting=DoneFromFourth()).loops_used
    assert used[:, -1].tolist() == [1, 6]


def test_rounding_does_not_halt_at_a_threshold_of_zero():
    """A KL divergence summed in fp32 can come out negative, which is below zero, which is below any threshold."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 500, 50, generator=generator)
    nearly = state + 1e-6 * torch.randn(1, 500, 50, generator=generator)
    log_p, log_q = nearly.log_softmax(-1), state.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).min() < 0
    rule = halting_rule({"rule": "kl", "kl_threshold": 0.0})
    memory, _ = rule.step(None, state, lambda hidden: hidden)
    assert not rule.step(memory, nearly, lambda hidden: hidden)[1].any()


@torch.no_grad()
def test_all_kept_positions_must_agree():
    model, ids = make_settling_model(), make_ids(1, 6)
    each = [
        int(model(ids, num_loops=12, halting=RULES["kl"], logits_to_keep=torch.tensor([t])).loops_used[0, 0])
        for t in range(6)
    ]
    assert len(set(each)) > 1
    together = int(model(ids, num_loops=12, halting=RULES["kl"]).loops_used[0, 0])
    assert together >= max(each)


@torch.no_grad()
def test_loop_settings_of_the_generation_config_are_saved_loaded_and_overridden(tmp_path):
    """A custom field of a generation config derived from the model's is dropped on load, and one that is there
    swallows the call's own: both happened to a prototype."""
    model, ids = make_settling_model(), make_ids(2, 5)
    kwargs = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    model.generation_config.num_loops = 5
    model.generation_config.halting = RULES["latent"]
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.generation_config.num_loops == 5
    by_config = loaded.generate(ids, **kwargs)
    by_call = model.generate(ids, num_loops=5, halting=RULES["latent"], **kwargs)
    assert by_config.loops_used.equal(by_call.loops_used)
    assert loaded.generate(ids, num_loops=2, halting="fixed", **kwargs).loops_used.unique().tolist() == [2]
    loaded.save_pretrained(tmp_path / "again")
    assert LoopedForCausalLM.from_pretrained(tmp_path / "again").generation_config.num_loops == 5


@pytest.mark.parametrize("num_loops", [1, 2, 3, 6])
def test_generate_accepts_every_loop_count(num_loops):
    """Ouro and LoopFormer reject the loop count in generate (trap 8)."""
    output = make_model().generate(make_ids(), num_loops=num_loops, max_new_tokens=2, return_dict_in_generate=True)
    assert output.loops_used.unique().tolist() == [num_loops]


@pytest.mark.parametrize(
    ("halting", "message"),
    [
        ("kl_entropi", "did you mean 'kl_entropy'"),
        ({"rule": "kl", "kl_treshold": 0.1}, "did you mean 'kl_threshold'"),
        ({"kl_threshold": 0.1}, "no rule None"),
        ({"rule": "kl", "kl_threshold": -0.1}, "must be a number >= 0"),
        ({"rule": "latent", "threshold": "small"}, "must be a number >= 0"),
        ({"rule": "q_exit", "q": -0.1}, "halting threshold q must be a number >= 0"),
        ({"rule": "q_exit", "threshold": 0.5}, "has no threshold 'threshold'"),
        *((junk, "halting must be the name") for junk in (True, False, 3, 1.5, [], ("kl",), {"kl"}, b"kl", object())),
        *(({"rule": junk}, "halting has no rule") for junk in (True, 3, ["kl"], {"rule": "kl"}, object())),
        ({"rule": "kl", 3: 0.1}, "has no threshold 3"),
        *(({"rule": "kl", "kl_threshold": junk}, "must be a number") for junk in (True, None, [1], "1", float("nan"))),
    ],
)
def test_bad_rules_are_refused_before_any_work(halting, message):
    model = make_model()
    calls = count_layer_calls(model)
    with pytest.raises(ValueError, match=message):
        model(make_ids(), halting=halting)
    with pytest.raises(ValueError, match=message):
        model.generate(make_ids(), halting=halting, max_new_tokens=2)
    assert calls == []


def test_a_misspelt_loop_argument_raises_in_generate():
    model = make_model()
    for _ in range(2):
        with pytest.raises(ValueError, match="numloops"):
            model.generate(make_ids(), numloops=3)
        model.generation_config.num_loops = 2  # a setting of the same kind must not hide the typo


def test_a_model_without_a_head_has_no_distribution_to_compare():
    with pytest.raises(ValueError, match="LoopedForCausalLM"):
        make_model().model(make_ids(), halting="kl")
    assert make_model().model(make_ids(), halting="latent").loops_used.shape == (3, 7)


def test_rules_are_found_by_name():
    assert halting_rule(None) is None
    assert halting_rule("fixed") is None
    assert halting_rule("kl_entropy").max_entropy == 3.0


def test_rows_that_leave_are_differentiated_as_alone():
    model, ids = make_model(), make_ids(3, 5)
    loss = model(ids, labels=ids, num_loops=torch.tensor([1, 3, 2])).loss
    loss.backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, loops in enumerate((1, 3, 2)):
        (model(ids[row : row + 1], labels=ids[row : row + 1], num_loops=loops).loss / 3).backward()
    for gradient, parameter in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, **FP32)


@torch.no_grad()
def test_processors_stop_strings_and_streaming_act_while_halting():
    """Huginn's exit modes have a sampler of their own that knows none of these (trap 43)."""
    from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor
    from transformers.generation.streamers import BaseStreamer

    class Seen(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, ids, seen = make_settling_model(), make_ids(1, 5), Seen()
    kwargs = {"num_loops": 10, "halting": RULES["kl"], "do_sample": False, "max_new_tokens": 6}
    plain = model.generate(ids, **kwargs)
    output = model.generate(ids, streamer=seen, **kwargs)
    assert seen.tokens == [*output[0].tolist(), "end"]
    banned = int(plain[0, 5])
    assert banned not in model.generate(ids, bad_words_ids=[[banned]], **kwargs)[0, 5:].tolist()
    assert model.generate(ids, eos_token_id=banned, pad_token_id=0, **kwargs).shape[1] == 6
    longer = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(5, 4, eos_token_id=banned)])
    held = model.generate(ids, eos_token_id=banned, pad_token_id=0, logits_processor=longer, **kwargs)
    assert held.shape[1] >= 5 + 4


@pytest.mark.parametrize("halting", [None, RULES["kl"]])
@pytest.mark.parametrize("num_loops", [3, torch.tensor([1, 2, 3])])
@pytest.mark.parametrize("flags", [{}, {"use_cache": True}, {"labels": make_ids()}, {"output_hidden_states": True}])
def test_every_mix_of_flags_returns_the_same_fields(halting, num_loops, flags):
    """One of TRM's flags makes a function return three values where five are unpacked (trap 28)."""
    model, ids = make_model(), make_ids()
    named = model(ids, halting=halting, num_loops=num_loops, **flags)
    values = model(ids, halting=halting, num_loops=num_loops, return_dict=False, **flags)
    assert len(values) == len(named.to_tuple())
    assert named.logits.shape == (3, 7, 50)
    assert named.loops_used.shape == (3, 7)
    assert (named.loss is not None) == ("labels" in flags)
    assert (named.past_key_values is not None) == flags.get("use_cache", True)


# ---- thresholds that were calibrated, and those that were not

GENERATED = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@torch.no_grad()
@every_rule
def test_a_default_threshold_is_a_warning_once_and_given_thresholds_are_none(rule, caplog):
    """Default thresholds turned 95.7 % into 36.4 % on the quickstart, without a word."""
    model, ids = make_model_for(rule), make_ids(2, 5)
    names = RULE_CLASSES[rule].thresholds()
    warning_once.cache_clear()
    for halting in (RULES[rule], halting_rule(RULES[rule]), None, "fixed", {"rule": "fixed"}):
        model(ids, halting=halting)
        model.generate(ids, halting=halting, max_new_tokens=2)
    assert warnings_of(caplog) == []
    given = [part for size in range(len(names)) for part in itertools.combinations(names, size)]
    for number, part in enumerate(given, 1):
        halting = {"rule": rule} | {name: RULES[rule][name] for name in part}
        for _ in range(2):
            model.generate(ids, halting=halting, max_new_tokens=2)
            model(ids, halting=halting)
        said = warnings_of(caplog)
        assert len(said) == number
        assert all(
            name in said[-1] for name in (rule, "not calibrated", "`looped halting RUN --save`", "halting=True")
        )
        assert all((f"default of {name}" in said[-1] or f", {name}" in said[-1]) for name in set(names) - set(part))
    model.generate(ids, halting=rule, max_new_tokens=2)
    assert len(warnings_of(caplog)) == len(given)  # the name alone says what {"rule": name} says


@torch.no_grad()
@every_rule
@pytest.mark.parametrize("where", ["call", "model", "given"])
def test_true_is_the_calibrated_rule_which_alone_changes_nothing(rule, where, tmp_path):
    model, ids = make_model_for(rule), make_ids(3, 5)
    plain = model.generate(ids, num_loops=12, **GENERATED)
    expected = model.generate(ids, num_loops=12, halting=RULES[rule], **GENERATED)
    assert not torch.equal(plain.loops_used, expected.loops_used)
    model.generation_config.calibrated_halting = RULES[rule]
    model.save_pretrained(tmp_path / "once")
    LoopedForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for each in (model, LoopedForCausalLM.from_pretrained(tmp_path / "twice")):
        again = each.generate(ids, num_loops=12, **GENERATED)
        assert torch.equal(again.sequences, plain.sequences)
        assert torch.equal(again.loops_used, plain.loops_used)
        settings = {"halting": True} if where == "call" else {}
        if where == "model":
            each.generation_config.halting = True
        elif where == "given":
            settings["generation_config"] = GenerationConfig(halting=True, **GENERATED)
        halted = each.generate(ids, num_loops=12, **({} if where == "given" else GENERATED), **settings)
        assert torch.equal(halted.sequences, expected.sequences)
        assert torch.equal(halted.loops_used, expected.loops_used)


@torch.no_grad()
def test_true_without_a_calibrated_rule_says_how_to_calibrate():
    model = make_model()
    calls = count_layer_calls(model)
    for settings in (
        {"halting": True} | GENERATED,
        {"generation_config": GenerationConfig(halting=True, **GENERATED)},
    ):
        with pytest.raises(ValueError, match=r"calibrate one by `looped halting RUN --save`.* such as halting=\{"):
            model.generate(make_ids(), **settings)
    model.generation_config.calibrated_halting = {"rule": "kl", "treshold": 0.1}
    with pytest.raises(ValueError, match="has no threshold 'treshold'"):
        model.generate(make_ids(), halting=True, **GENERATED)
    assert calls == []
