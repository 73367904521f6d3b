"""What is measured of exits and drafts is what happened: against forward passes counted and compared by hand."""

import pytest
import torch

from looplab.bench.pair import QUICK
from looplab.bench.speculation import CONFIDENCE, accepted_row, speculation_row
from looplab.instruments.halting_settings import exit_settings
from looplab.tasks.language.exits import counted_calls, decode, exit_rows, exits_text
from toys import FP32, make_ids, make_model

PROMPT, DECODED = 4, 6


def make_rows(count: int) -> dict:
    ids = make_ids(count, PROMPT + DECODED + 1)
    return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}


@pytest.mark.parametrize("kv_sharing", ["per_loop", "first", "natural", "last", "gated", "mean"])
def test_a_row_is_decoded_as_it_would_be_alone(kv_sharing):
    """Rows that halt leave the batch, whatever a token keeps in the cache."""
    model = make_model(kv_sharing=kv_sharing)
    rows, rule = make_rows(3), {"rule": "latent", "threshold": 0.5}
    together = decode(model, rows, PROMPT, 4, rule)
    assert len(together.loops.unique()) > 1
    for index in range(3):
        alone = decode(model, {name: value[index : index + 1] for name, value in rows.items()}, PROMPT, 4, rule)
        assert torch.equal(alone.loops[0], together.loops[index])
        torch.testing.assert_close(alone.losses[0], together.losses[index], **FP32)


@torch.no_grad()
def test_decoded_losses_with_all_loops_are_those_of_one_call():
    model, rows = make_model(), make_rows(2)
    logits = model(rows["input_ids"], num_loops=3).logits[:, PROMPT:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), rows["shift_labels"][:, PROMPT:], reduction="none"
    )
    decoded = decode(model, rows, PROMPT, 3, None)
    torch.testing.assert_close(decoded.losses, losses, **FP32)
    assert torch.equal(decoded.said, logits.argmax(-1))


def test_every_rule_is_measured_at_both_batch_sizes():
    model, rows = make_model(exit_gate=True), make_rows(3)
    settings = exit_settings(model.config, 3, "decoded")
    rules = {setting.rule: setting for setting in settings if setting.halting}
    settings = [*rules.values(), *(setting for setting in settings if setting.halting is None)]
    results = exit_rows(model, rows, PROMPT, 3, settings, rounds=1, batches=(1, 2))
    assert [(row["rule"], row["num_loops"], row["batch"]) for row in results] == [
        (rule, loops, batch)
        for rule, loops in (("kl_entropy", 3), ("latent", 3), ("q_exit", 3), ("fixed", 1), ("fixed", 2))
        for batch in (1, 2)
    ]
    for row in results:
        assert 1 / 3 <= row["row_calls"] <= row["layer_calls"] <= 1
        assert row["tokens"] == 3 * DECODED
        if row["rule"] == "fixed":
            assert row["layer_calls"] == row["row_calls"] == row["loops"] / 3
            assert row["fixed_loss"] == row["loss"]
    with counted_calls(model) as calls:
        decode(model, {name: values[:1] for name, values in rows.items()}, PROMPT, 3, {"rule": "q_exit", "q": 0.1})
    prompt = 2 * 3
    assert (len(calls) - prompt) / (DECODED * 2 * 3 + prompt) < 1  # it halts early here
    assert len(exits_text(results).splitlines()) == 2 + len(results)


def test_where_loops_change_nothing_all_drafts_are_accepted():
    row = accepted_row(32, QUICK, rounds=1)
    assert row["acceptance"] == 1.0
    assert row["num_loops"] == 2 * QUICK.loops


def test_a_row_of_speculation_counts_what_generate_reports():
    model, prompts = make_model(), make_ids(2, 4)
    settings = {"draft_loops": 1, "num_loops": 3, "num_assistant_tokens": 3, CONFIDENCE: 0.0}
    row = speculation_row(model, prompts, 6, 1, **settings)
    outputs = [
        model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, **settings) for ids in prompts.split(1)
    ]
    drafted, accepted = (sum(int(output[name].sum()) for output in outputs) for name in ("drafted", "accepted"))
    assert row["acceptance"] == accepted / drafted
    assert row["per_call"] == 2 * 5 / sum(
        len(output.drafted) for output in outputs
    )  # the prompt gives the first token
    assert row["layer_calls"] == sum(output.layer_calls for output in outputs) / (2 * 5 * 2 * 3)


def test_a_text_that_may_end_is_as_long_as_it_is():
    """The law above counts six tokens after each prompt; here the third one of a greedy text ends it."""
    model, prompts = make_model(), make_ids(1, 4, seed=7)
    first, second, end = model.generate(prompts, max_new_tokens=3, num_loops=3)[0, 4:].tolist()
    assert end not in (first, second)
    settings = {"draft_loops": 1, "num_loops": 3, CONFIDENCE: 0.0, "eos_token_id": end, "pad_token_id": 0}
    assert speculation_row(model, prompts, 6, 1, ends=True, **settings)["tokens"] == 3
    assert speculation_row(model, prompts, 6, 1, **settings)["tokens"] == 6
