"""Continuous depth batching: whatever runs beside it, a request gets what `generate` computes for it alone."""

import itertools
import threading

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from modeling_looped import LoopedConfig, LoopedForCausalLM
from modeling_looped.halting_looped import LatentRule, Rule
from modeling_looped.pages_looped import SHORT, Pages
from strategies import SIZES, VOCABULARY, configs
from toys import KV_SHARINGS, count_layer_calls, make_ids, make_model, open_gates

RULES = [
    None,
    None,
    {"rule": "latent", "threshold": 0.3},
    {"rule": "latent", "threshold": 0.6},
    {"rule": "kl", "kl_threshold": 0.05},
    {"rule": "kl_entropy", "kl_threshold": 0.2, "max_entropy": 2.5},
]
# Short and long contexts, and those that outgrow each kind of page while the reply is written.
LENGTHS = [*range(1, 8), *(limit + more for limit in SHORT for more in (-2, 0, 1))]


def alone(model, input_ids, seed=None, **settings):
    """The tokens and loops of a request, by `generate`."""
    ids = torch.tensor([input_ids])
    if seed is not None:
        torch.manual_seed(seed)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **{"do_sample": False} | settings
    )
    return output.sequences[0, len(input_ids) :].tolist(), output.loops_used[0].tolist()


@st.composite
def requests(draw, exit_gate: bool, max_num_loops: int | None):
    """The arguments of a request, and after how many steps it comes."""
    length = draw(st.sampled_from(LENGTHS))
    seed = draw(st.integers(0, 99))
    ids = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    rules = RULES + ([{"rule": "q_exit", "q": 0.6}] if exit_gate else [])
    asked = {
        "input_ids": ids,
        "num_loops": draw(st.integers(1, min(6, max_num_loops or 6))),
        "max_new_tokens": draw(st.integers(1, 6)),
        "halting": draw(st.sampled_from(rules)),
        "eos_token_id": draw(st.sampled_from([None, [3, 4, 5, 6, 7, 8]])),
        "pad_token_id": 0,
    }
    return asked, draw(st.integers(0, 9))


@st.composite
def batches(draw):
    """A model, requests with the steps at which they come, and how many rows there are."""
    fields = draw(configs())
    fields["max_position_embeddings"] = 2 * SHORT[-1]
    try:
        config = LoopedConfig(**{**SIZES, **fields})
    except (ValueError, StrictDataclassError):  # what does not go together
        config = LoopedConfig(**{**SIZES, "kv_sharing": fields["kv_sharing"]})
    one = requests(config.exit_gate, config.max_num_loops)
    return config, draw(st.lists(one, min_size=1, max_size=5)), draw(st.sampled_from([1, 2, 3, 8]))


@given(batches(), st.integers(0, 3), st.sampled_from(["sdpa", "eager"]))
@settings(derandomize=True, max_examples=12, deadline=None)
def test_requests_that_come_at_any_time_get_what_generate_computes_for_each_alone(batch, seed, attention):
    config, arriving, max_rows = batch
    torch.manual_seed(seed)
    model = open_gates(LoopedForCausalLM._from_config(config, attn_implementation=attention).eval())
    scheduler = model.depth_batching(max_rows)
    arriving = sorted(arriving, key=lambda each: each[1])
    added, told = [], {}
    for step in itertools.count():
        while len(added) < len(arriving) and arriving[len(added)][1] <= step:
            added.append(scheduler.add(**arriving[len(added)][0]))
        if len(added) == len(arriving) and not scheduler.is_busy:
            break
        for request, token in scheduler.step():
            told.setdefault(request, []).append(token)
        assert len(scheduler.looping) + len(scheduler.ready) <= max_rows
    for request, (asked, _) in zip(added, arriving, strict=True):
        expected = alone(model, **asked)
        assert (request.tokens, request.loops_used) == expected
        assert told[request] == [*request.tokens, None]
        ends = asked["eos_token_id"] or []
        assert request.ended == ("stop" if request.tokens[-1] in ends else "length")
    assert all(tensor is None for pool in itertools.chain(*scheduler.pools) for tensor in pool.tensors)


KINDS = [
    {"sliding_window": 3},
    {"loop_connection": "hyper", "num_streams": 2, "max_num_loops": 8, "num_coda_layers": 1},
    {"loop_connection": "damped", "loop_embedding": "sinusoidal", "num_prelude_layers": 1},
    {"loop_connection": "disco"},
    {"state_init": "normal", "loop_connection": "inject_add", "position_embedding": "learned"},
    {"loop_connection": "inject_concat", "num_coda_layers": 1, "norm_before_coda": True, "embedding_multiplier": 2.0},
]


@pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_every_kind_of_model_answers_together_as_alone(kv_sharing, fields):
    chunk = {"prefill_chunk": 2} if kv_sharing == "gated" else {}
    model = open_gates(make_model(kv_sharing=kv_sharing, **fields, **chunk))
    asked = [
        {"input_ids": make_ids(1, length, seed=length)[0].tolist(), "num_loops": num_loops}
        for length, num_loops in ((5, 2), (SHORT[0] - 1, 4), (1, 3))
    ]
    common = {"max_new_tokens": 4, "eos_token_id": None}
    for request, each in zip(model.generate_each(asked, max_rows=2, **common), asked, strict=True):
        assert (request.tokens, request.loops_used) == alone(model, **each, **common)


class ByChannel(Rule):
    """Halts after as many loops as the largest channel of the first state says, so that no two tokens are alike."""

    def step(self, memory, state, readout):
        if memory is None:
            memory = torch.stack([torch.zeros(len(state)), 1 + state[:, -1].argmax(-1) % 6], dim=1)
        memory = memory + torch.tensor([1, 0])
        return memory, (memory[:, 0] >= memory[:, 1]).unsqueeze(1).expand(state.shape[:2])


@pytest.mark.parametrize("start", [3, SHORT[0] - 2, SHORT[-1] - 2])
@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_a_token_that_halts_early_leaves_what_later_ones_read_as_in_generate(kv_sharing, start):
    """Replies that outgrow their pages, of tokens that halt after different loops."""
    model = open_gates(make_model(kv_sharing=kv_sharing, loop_connection="inject_add", max_position_embeddings=256))
    asked = [{"input_ids": make_ids(1, start + row, seed=row)[0].tolist()} for row in range(2)]
    common = {"max_new_tokens": 6, "eos_token_id": None, "halting": ByChannel(), "num_loops": 7, "do_sample": True}
    drawn = [each | {"generator": torch.Generator().manual_seed(row)} for row, each in enumerate(asked)]
    answers = model.generate_each(drawn, **common)
    for row, request in enumerate(answers):
        assert (request.tokens, request.loops_used) == alone(model, seed=row, **asked[row], **common)
    assert len({loops for request in answers for loops in request.loops_used}) > 1


# ---- work


@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_every_token_loops_as_often_as_its_request_asks_and_a_row_that_is_free_is_taken(kv_sharing):
    """Counted in cells of core layers, step by step, against a scheduler of integers."""
    model = make_model(kv_sharing=kv_sharing, num_prelude_layers=1, num_coda_layers=1)
    calls = count_layer_calls(model)
    asked = [(length, 1 + 3 * length % 7, 1 + length % 4) for length in (5, 1, 3, 7, 2, 6, 4)]  # tokens, loops, reply
    scheduler = model.depth_batching(max_rows=3)
    for length, num_loops, new_tokens in asked:
        scheduler.add(make_ids(1, length)[0], num_loops=num_loops, max_new_tokens=new_tokens, eos_token_id=None)
    steps = sum(1 for _ in iter(lambda: scheduler.is_busy and scheduler.step() is not None, False))

    waiting, rows, expected = list(asked), [], []
    while waiting or rows:
        while waiting and len(rows) < 3:
            length, num_loops, new_tokens = waiting.pop(0)
            rows.append([length, num_loops, [length] + [1] * (new_tokens - 1), 0])
        expected.append(sum(row[2][0] for row in rows))
        for row in rows:
            row[3] += 1
            if row[3] == row[1]:
                row[3], row[2] = 0, row[2][1:]
        rows = [row for row in rows if row[2]]
    core = [cells for section, cells in calls if section == "core"]
    assert core == [cells for cells in expected for _ in range(2)]
    assert steps == len(expected)
    assert sum(expected) == sum(loops * (length + new - 1) for length, loops, new in asked)


def test_pages_of_requests_that_have_ended_are_given_to_others():
    model = make_model()
    scheduler = model.depth_batching(max_rows=2)
    most = 0
    for start in range(20):
        scheduler.add(make_ids(1, 3)[0], num_loops=1 + start % 3, max_new_tokens=2, eos_token_id=None)
    while scheduler.is_busy:
        scheduler.step()
        most = max(most, *(pool.num_pages for pool in scheduler.pools[0]))
    assert most == 2 * 3  # two rows of at most three loops
    assert scheduler.pools[0][0].num_pages == 0


# ---- tokens that enter on a guess

UNREWRITTEN = ["per_loop", "first", "natural"]
WAVES = [
    {},
    {"sliding_window": 3},
    {"loop_connection": "damped", "num_prelude_layers": 1},
    {"loop_embedding": "learned", "max_num_loops": 8},
]


@pytest.mark.parametrize("fields", WAVES, ids=str)
@pytest.mark.parametrize("kv_sharing", UNREWRITTEN)
def test_a_reply_is_the_same_whenever_its_tokens_enter(kv_sharing, fields):
    """Beside requests without drafts, in contexts that outgrow their pages; one ends by a token that was guessed."""
    model = make_model(kv_sharing=kv_sharing, initializer_range=0.3, **fields)
    starts = [(5, 6, 1), (SHORT[0] - 3, 5, 2), (SHORT[-1] - 4, 4, 1), (1, 5, 4), (3, 2, 1), (4, 3, None), (4, 3, 7)]
    asked = [
        {"input_ids": make_ids(1, length, seed=length)[0].tolist(), "num_loops": loops, "max_new_tokens": 8}
        for length, loops, _ in starts
    ]
    asked[0]["eos_token_id"] = alone(model, **asked[0], eos_token_id=None)[0][4]
    drafted = [each | {"draft_loops": drafts} for each, (_, _, drafts) in zip(asked, starts, strict=True)]
    for max_rows in (1, 3):
        scheduler = model.depth_batching(max_rows)
        added = [scheduler.add(**each) for each in drafted]
        while scheduler.is_busy:
            scheduler.step()
            assert len({row.request for row in (*scheduler.ready, *scheduler.looping)}) <= max_rows
        for request, each in zip(added, asked, strict=True):
            assert (request.tokens, request.loops_used) == alone(model, **each)
        assert all(tensor is None for pool in itertools.chain(*scheduler.pools) for tensor in pool.tensors)


@pytest.mark.parametrize("drafts", [1, 3])
def test_where_every_guess_is_right_a_token_takes_as_many_steps_as_its_guess(drafts):
    model = make_model(residual_init="zero")  # loops change nothing
    scheduler = model.depth_batching(1)
    request = scheduler.add([3, 4], num_loops=9, max_new_tokens=5, draft_loops=drafts, eos_token_id=None)
    steps = 0
    while scheduler.is_busy:
        scheduler.step()
        steps += 1
    assert len(request.tokens) == 5
    assert steps == 4 * drafts + 9


def test_a_request_that_is_cancelled_leaves_with_all_its_tokens():
    model = make_model()
    scheduler = model.depth_batching(2)
    kept = scheduler.add([5, 6], num_loops=4, max_new_tokens=3, eos_token_id=None)
    gone = scheduler.add([3, 4], num_loops=400, max_new_tokens=9, draft_loops=1, eos_token_id=None)
    for _ in range(6):
        scheduler.step()
    assert len([row for row in scheduler.looping if row.request is gone]) > 1
    gone.cancel()
    scheduler.step()
    assert all(row.request is kept for row in (*scheduler.ready, *scheduler.looping))
    run(scheduler)
    assert (kept.tokens, gone.tokens) == (
        alone(model, [5, 6], num_loops=4, max_new_tokens=3, eos_token_id=None)[0],
        [],
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"kv_sharing": "last"}, "rewrites an entry"), ({"num_coda_layers": 1}, "without the coda")],
)
def test_drafts_of_a_model_that_would_write_other_tokens_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_model(**fields).generate_each([[3, 4]], draft_loops=2)


# ---- requests among others


def run(scheduler):
    for _ in scheduler.stream():
        pass


@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_a_request_that_fails_or_is_cancelled_frees_its_row_and_harms_no_other(kv_sharing):
    model = open_gates(make_model(kv_sharing=kv_sharing))

    def fail(*_):
        raise RuntimeError("of this request alone")

    ids = make_ids(6, 5).tolist()
    plain = {"max_new_tokens": 4, "eos_token_id": None}
    scheduler = model.depth_batching(max_rows=2)
    bad = [scheduler.add(ids[0], num_loops=5, on_token=fail, **plain)]
    good = [scheduler.add(ids[1], num_loops=7, **plain)]
    bad.append(scheduler.add(ids[2], num_loops=2, logits_processor=[fail], **plain))
    good.append(scheduler.add(ids[3], num_loops=3, **plain))
    running, waiting = scheduler.add(ids[4], num_loops=400, **plain), scheduler.add(ids[5], **plain)
    told = []
    for step in range(60):
        told += scheduler.step()
        if step == 2:
            waiting.cancel()
        if step == 55:
            assert running.loops
            threading.Thread(target=running.cancel).start()
    assert not scheduler.is_busy
    for request, row, loops in zip(good, (1, 3), (7, 3), strict=True):
        assert request.tokens == alone(model, ids[row], num_loops=loops, **plain)[0]
    assert [request.ended for request in bad] == ["error"] * 2
    assert all(str(request.error) == "of this request alone" for request in bad)
    assert [request.ended for request in (running, waiting)] == ["cancelled"] * 2
    assert sorted(id(request) for request, token in told if token is None) == sorted(
        map(id, [*bad, *good, running, waiting])
    )


def test_a_model_that_fails_ends_the_requests_at_work_and_goes_on_with_the_next():
    model, ids = make_model(), make_ids(3, 4).tolist()
    scheduler = model.depth_batching(max_rows=2)
    lost = [scheduler.add(each, max_new_tokens=3, eos_token_id=None) for each in ids[:2]]
    kept = scheduler.add(ids[2], max_new_tokens=3, eos_token_id=None)
    scheduler.step()
    hook = model.model.core[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scheduler.step()
    hook.remove()
    assert [request.ended for request in lost] == ["error"] * 2
    run(scheduler)
    assert kept.tokens == alone(model, ids[2], max_new_tokens=3, eos_token_id=None)[0]


@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_a_request_that_overflows_leaves_nothing_to_the_next_in_its_pages(kv_sharing):
    """Beside a longer request, whose columns the mask of the next one has to hide."""
    model = open_gates(make_model(kv_sharing=kv_sharing, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    scheduler = model.depth_batching(max_rows=2)
    plain = {"max_new_tokens": 4, "eos_token_id": None}
    long, short = list(range(8, 33)), [5, 3, 8]
    beside = scheduler.add(long, num_loops=7, **plain)
    overflown = scheduler.add([7] * 24, num_loops=2, max_new_tokens=1, eos_token_id=None)
    after = scheduler.add(short, num_loops=2, **plain)
    run(scheduler)
    assert overflown.ended == "length"
    assert beside.tokens == alone(model, long, num_loops=7, **plain)[0]
    assert after.tokens == alone(model, short, num_loops=2, **plain)[0]


def test_a_request_without_memory_for_its_next_token_ends_and_gives_its_pages_back(monkeypatch):
    def full(*_):
        raise MemoryError("of a context that has outgrown its pages")

    model = make_model()
    scheduler = model.depth_batching(max_rows=2)
    plain = {"max_new_tokens": 3, "eos_token_id": None}
    lost = [scheduler.add([3] * SHORT[-1], **plain), scheduler.add([4, 5], num_loops=9, **plain)]
    kept = scheduler.add([5, 6], **plain)
    with monkeypatch.context() as patch:
        patch.setattr(Pages, "_grown", full)
        with pytest.raises(MemoryError):
            run(scheduler)
    assert [request.ended for request in lost] == ["error"] * 2
    assert all(sorted(pool.free) == list(range(pool.num_pages)) for pool in itertools.chain(*scheduler.pools))
    lost[0].cancel()  # as a client that gives up does
    run(scheduler)
    assert kept.tokens == alone(model, [5, 6], **plain)[0]


def test_on_token_sees_every_token_and_ends_the_reply():
    model, [ids] = make_model(), make_ids(1, 4).tolist()
    seen = []

    def third(token):
        seen.append(token)
        return len(seen) == 3

    [request] = model.generate_each([{"input_ids": ids, "on_token": third}], max_new_tokens=6, eos_token_id=None)
    assert request.tokens == seen == alone(model, ids, max_new_tokens=3, eos_token_id=None)[0]
    assert request.ended == "stop"


SAMPLED = [
    {"do_sample": True, "max_new_tokens": 6},
    {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 6},
    {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.3, "max_new_tokens": 6},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_new_tokens": 6},
    {"min_new_tokens": 4, "max_new_tokens": 6, "eos_token_id": list(range(0, 50, 2))},
    {"max_length": 9},
    {"max_length": 9, "min_length": 8, "eos_token_id": list(range(0, 50, 2))},
    {"eos_token_id": None, "max_new_tokens": 5},
]


def test_draws_and_processors_are_those_of_generate():
    """All at once, each with a generator of its own, so that no draw of one moves those of another."""
    model = make_model()
    ids = make_ids(len(SAMPLED), 4).tolist()
    asked = [
        {"input_ids": each, "num_loops": 1 + row, "pad_token_id": 0} | SAMPLED[row] for row, each in enumerate(ids)
    ]
    given = [each | {"generator": torch.Generator().manual_seed(row)} for row, each in enumerate(asked)]
    for row, request in enumerate(model.generate_each(given, max_rows=5)):
        assert request.tokens == alone(model, seed=row, **asked[row])[0]


def test_settings_of_the_model_are_read_anew_for_every_request():
    """The loop count of a request is what `generate` would run, by the same law, also after it was changed."""
    model, [ids] = make_model(), make_ids(1, 4).tolist()
    scheduler = model.depth_batching()
    added = [scheduler.add(ids)]
    model.generation_config.num_loops = 5
    added.append(scheduler.add(ids))
    model.generation_config.halting = {"rule": "latent", "threshold": 1e9}
    added += [scheduler.add(ids), scheduler.add(ids, halting="fixed", num_loops=2)]
    run(scheduler)
    assert [request.loops_used[0] for request in added] == [3, 5, 2, 2]
    assert [len(request.tokens) for request in added] == [20] * 4  # the length that generate has by default


def test_a_rule_that_nobody_keeps_is_not_taken_for_an_earlier_one():
    """Python gives the address of an object that is gone to the next one."""
    model = make_model()
    scheduler = model.depth_batching()
    thresholds = [0.0, 0.0, 1e9, 0.0, 1e9, 1e9, 0.0]
    settings = {"num_loops": 5, "max_new_tokens": 1}
    added = [scheduler.add([3, 4], halting=LatentRule(each), **settings) for each in thresholds]
    for each in thresholds:
        config = GenerationConfig(halting=LatentRule(each), eos_token_id=None, pad_token_id=0)
        added.append(scheduler.add([3, 4], config, **settings))
    run(scheduler)
    assert [request.loops_used for request in added] == [[2 if each else 5] for each in thresholds] * 2


# ---- what is refused

WRONG = [
    ({"input_ids": []}, "at least one"),
    ({"input_ids": [[3], [4]]}, "of one prompt"),
    ({"input_ids": [3, True]}, "of one prompt"),
    ({"input_ids": [3, 50]}, "input_ids must be in"),
    ({"num_loops": 0}, "num_loops must be"),
    ({"num_loops": torch.tensor([3])}, "num_loops must be one int"),
    ({"halting": "kl_entropi"}, "did you mean 'kl_entropy'"),
    ({"halting": True}, "looped halting RUN --save"),
    ({"halting": {"rule": "q_exit", "q": 0.5}}, "exit gate"),
    ({"num_beams": 2}, "not beam_search"),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
    ({"stop_strings": ["a"]}, "stop_strings"),
    ({"max_time": 1.0}, "max_time"),
    ({"numloops": 3}, "numloops"),
    ({"draft_loops": 0}, "draft_loops=0: it must be an int >= 1"),
    ({"draft_loops": 2, "halting": {"rule": "latent", "threshold": 0.3}}, "use one of the two"),
    ({"draft_loops": 2, "do_sample": True}, "decode greedily"),
    ({"draft_loops": 2, "repetition_penalty": 1.5}, "decode greedily"),
    ({"max_length": 2}, "max_length=2"),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG)
def test_a_request_that_cannot_be_is_refused_before_any_work(wrong, sentence):
    model = make_model()
    calls = count_layer_calls(model)
    with pytest.raises(ValueError, match=sentence):
        model.generate_each([{"input_ids": [3, 4]}, {"input_ids": [5, 6, 7]} | wrong])
    assert calls == []


@pytest.mark.parametrize(
    ("fields", "change", "sentence"),
    [
        ({}, lambda model: model.train(), "call model.eval"),
        ({}, lambda model: model.set_attn_implementation("flex_attention"), "set_attn_implementation"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            lambda model: None,
            "longest",
        ),
    ],
)
def test_a_model_that_cannot_be_batched_is_refused(fields, change, sentence):
    model = make_model(**fields)
    change(model)
    with pytest.raises(ValueError, match=sentence):
        model.depth_batching()
    for rows in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="max_rows must be an int >= 1"):
            make_model().depth_batching(max_rows=rows)


def test_positions_beyond_a_learned_table_are_refused():
    model = make_model(position_embedding="learned")  # 64 positions
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        model.generate_each([[3] * 60], max_new_tokens=6)
    [request] = model.generate_each([[3] * 60], max_new_tokens=5, eos_token_id=None)
    assert request.tokens == alone(model, [3] * 60, max_new_tokens=5, eos_token_id=None)[0]


def test_a_rule_of_ones_own_runs_beside_others():
    class Own(LatentRule):
        def __init__(self, wanted):
            super().__init__()
            self.wanted = wanted

        def step(self, memory, state, readout):
            memory = torch.ones(len(state)) if memory is None else memory + 1
            return memory, (memory >= self.wanted).unsqueeze(1).expand(state.shape[:2])

    model, ids = make_model(), make_ids(4, 5).tolist()
    rules = [Own(2), Own(4), {"rule": "latent", "threshold": 0.3}, None]
    asked = [{"input_ids": each, "halting": rule} for each, rule in zip(ids, rules, strict=True)]
    common = {"num_loops": 6, "max_new_tokens": 3, "eos_token_id": None}
    for request, each in zip(model.generate_each(asked, **common), asked, strict=True):
        assert (request.tokens, request.loops_used) == alone(model, **each, **common)
