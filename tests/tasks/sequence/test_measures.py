"""Laws of reading answers: one pass over prompt and answer tells what `generate` writes, at every loop count."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_builders import EncodedRows
from data_builders.text_batches import TokenStream
from looplab.instruments.halting_settings import HaltingSetting
from looplab.tasks.sequence.halting import answer_rows, in_turn
from looplab.tasks.sequence.measures import decode_answers, decodes, said_at
from modeling_looped.cache_looped import SHARINGS
from toys import make_model, open_gates

LOOPS = (1, 2, 5)
VOCABULARY = 9


def rows_of(pairs) -> EncodedRows:
    """Rows of (tokens of the prompt, tokens of the answer), the last of which ends it."""
    wholes = [[*prompt, *answer] for prompt, answer in pairs]
    streams = [
        TokenStream.of_column(pa.chunked_array([pa.array(part, pa.list_(pa.int32()))]))
        for part in ([whole[:-1] for whole in wholes], [whole[1:] for whole in wholes])
    ]
    firsts = np.array([len(prompt) - 1 for prompt, _ in pairs])
    return EncodedRows(*streams, firsts, np.array([len(prompt) for prompt, _ in pairs]), [""] * len(pairs))


def pairs_for(model, num_loops: int, **settings) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers of several lengths: every second answer is what the model writes, others differ at its end,
    its beginning or anywhere."""
    rng, pairs = np.random.default_rng(0), []
    for number in range(16):
        prompt = rng.integers(3, VOCABULARY, size=2 + number % 3).tolist()
        answer = generated(model, prompt, 1 + number // 4 % 3, num_loops, **settings)
        if number % 4 == 1:
            answer[-1] = (answer[-1] + 1) % VOCABULARY
        if number % 4 == 3:
            answer = rng.integers(VOCABULARY, size=len(answer)).tolist()
        pairs.append((prompt, answer))
    return pairs


def generated(model, prompt, length: int, num_loops: int, **settings) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_loops=num_loops, do_sample=False, max_new_tokens=length,
        min_new_tokens=length, **settings,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def make(**fields):
    sizes = {"num_core_layers": 1, "residual_init": "normal", "vocab_size": VOCABULARY, "num_loops": 2}
    model = open_gates(make_model(**sizes | fields))
    model.generation_config.eos_token_id = None
    return model


CASES = [{"kv_sharing": name} for name in SHARINGS] + [
    {"kv_sharing": "last", "prefill_chunk": 1},
    {"kv_sharing": "mean", "prefill_chunk": 2},
    {"num_coda_layers": 1, "num_prelude_layers": 1},
    {"sliding_window": 2},
    {"loop_connection": "inject_add"},
    {"attention_pattern": "prefix"},
    {"attention_pattern": "prefix", "num_coda_layers": 1, "kv_sharing": "first"},
]


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_an_answer_counts_as_right_exactly_if_generate_writes_it(fields):
    """Of every KV policy, whichever tokens see each other in one call: policies that rewrite are decoded."""
    model = make(**fields)
    pairs = pairs_for(model, 2)
    found = said_at(model, rows_of(pairs), range(len(pairs)), LOOPS)
    assert list(found) == list(LOOPS)
    for loops, said in found.items():
        written = [generated(model, prompt, len(answer), loops) == answer for prompt, answer in pairs]
        assert said.exact.tolist() == written
        assert said.labels.tolist() == [len(answer) for _, answer in pairs]
    assert {True, False} == set(found[2].exact.tolist())
    assert decodes(model) == (SHARINGS[model.config.kv_sharing].rewrites and model.config.prefill_chunk != 1)


def test_every_row_is_read_as_if_it_were_alone():
    model = make()
    rows = rows_of(pairs_for(model, 2))
    numbers = [5, 0, 11, 3]
    together = said_at(model, rows, numbers, [3])[3]
    for place, number in enumerate(numbers):
        ids, labels = rows.row(number)
        logits = model(torch.from_numpy(ids)[None], num_loops=3, use_cache=False).logits[0].float()
        real = torch.from_numpy(labels) >= 0
        gold = torch.from_numpy(labels)[real]
        assert together.right[place] == (logits[real].argmax(-1) == gold).sum()
        assert together.labels[place] == len(gold)
        loss = torch.nn.functional.cross_entropy(logits[real], gold, reduction="sum")
        torch.testing.assert_close(together.loss[place], loss.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"kv_sharing": "last"}, {"num_coda_layers": 1}], ids=str)
def test_decoding_equals_one_pass_where_tokens_see_each_other_alike(fields):
    model = make(**fields)
    rows = rows_of(pairs_for(model, 2))
    ids, labels = rows.row(1)
    first = int(rows.firsts[1])
    done = decode_answers(model, torch.from_numpy(ids)[None], torch.from_numpy(labels)[None, first:], 3)
    one = said_at(model, rows, [1], [3], one_pass=True)[3]
    assert set(done.loops.flatten().tolist()) == {3}
    if not decodes(model):
        torch.testing.assert_close(done.loss.sum().double(), one.loss[0], atol=1e-4, rtol=1e-4)


def test_a_halted_answer_is_the_one_that_generate_writes():
    model, rule = make(), {"rule": "kl", "kl_threshold": 0.05}
    pairs = pairs_for(model, 4, halting=rule)
    right, loops, first = answer_rows(model, rows_of(pairs), range(len(pairs)), HaltingSetting(rule, 4))
    assert (loops < 4).any()
    settings = {"num_loops": 4, "halting": rule, "max_new_tokens": 1, "return_dict_in_generate": True}
    said = [model.generate(torch.tensor([prompt]), **settings) for prompt, _ in pairs]
    assert first.tolist() == [output.loops_used.item() for output in said]
    assert right.tolist() == [
        generated(model, prompt, len(answer), 4, halting=rule) == answer for prompt, answer in pairs
    ]
    assert {True, False} == set(right.tolist())


def test_rows_that_are_timed_are_of_every_line():
    assert in_turn([np.array([3, 1, 4]), np.array([15]), np.array([9, 2])]) == [3, 15, 9, 1, 2, 4]
