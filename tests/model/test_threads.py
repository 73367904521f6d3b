"""One model, several threads: every call gives what it gives alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_looped import attach
from toys import KV_SHARINGS, make_ids, make_model, open_gates

THREADS = 8
GREEDY = {"do_sample": False, "max_new_tokens": 5}
# What a model is, and what else its calls are given.
SETTINGS = {
    **{sharing: ({"kv_sharing": sharing}, {}) for sharing in KV_SHARINGS},
    "hyper": ({"loop_connection": "hyper", "max_num_loops": 16, "num_prelude_layers": 1, "num_coda_layers": 1}, {}),
    "random start": ({"loop_connection": "inject_add", "state_init": "normal"}, {"seeded": True}),
    "halting": ({}, {"halting": {"rule": "latent", "threshold": 0.2}}),
    "beams": ({}, {"num_beams": 3}),
    "static cache": ({}, {"cache_implementation": "static"}),
    "drafts": ({}, {"draft_loops": 1}),
    "sinusoidal": ({"loop_embedding": "sinusoidal"}, {}),
}


@pytest.fixture
def many_switches():
    """Threads change places after a few instructions, not after a whole layer."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def calls(settings) -> list[dict]:
    """Three prompts at each of eight depths, more than the configuration's among them; each with a seed of its own."""
    settings = dict(settings)
    seeded = settings.pop("seeded", False)
    return [
        settings
        | {"num_loops": 2 + index % THREADS, "seed": index if seeded else None, "ids": make_ids(1, 6, seed=index)}
        for index in range(3 * THREADS)
    ]


def answer(model, call) -> list:
    call = dict(call)
    ids, seed = call.pop("ids"), call.pop("seed")
    generator = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
    torch.set_num_threads(1)
    return model.generate(ids, **call, **generator, **GREEDY).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_threads_that_share_a_model_do_not_meet(name, many_switches):
    fields, settings = SETTINGS[name]
    asked = calls(settings)
    expected = [answer(open_gates(make_model(**fields)), call) for call in asked]
    assert len({str(each) for each in expected}) > THREADS  # depth and prompt are in the answer
    model = open_gates(make_model(**fields))  # a fresh one, whose slots are opened while the others run
    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(lambda call: answer(model, call), asked)) == expected


@pytest.mark.slow
def test_a_random_start_is_the_same_in_every_thread(many_switches):
    fields = {"loop_connection": "inject_add", "state_init": "normal"}
    model = make_model(**fields)
    asked = [(make_ids(1, 3 + index % 50, seed=index), index % 5) for index in range(200)]

    def logits(model, ids, seed):
        torch.set_num_threads(1)
        with torch.no_grad():
            return model(ids, generator=torch.Generator().manual_seed(seed)).logits

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(lambda call: logits(model, *call), asked))
    for call, output in zip(asked, found, strict=True):
        assert output.equal(logits(model, *call))


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["natural", "iterated"])
def test_threads_that_share_a_looped_frozen_model_take_turns(prefill, many_switches):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=4,
        initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model = attach(LlamaForCausalLM(config).eval(), (1, 2), prefill=prefill, decode=2)
    # Prompts longer than a block of queries switch the attention of the extra passes.
    asked = [call | {"ids": make_ids(1, 140 if i % 3 else 6, seed=i)} for i, call in enumerate(calls({}))]
    expected = [answer(model, call) for call in asked]
    assert len({str(each) for each in expected}) > THREADS
    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(lambda call: answer(model, call), asked)) == expected
