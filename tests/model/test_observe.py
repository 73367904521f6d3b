"""Laws of `observe`: it sees after loop t what a run of t loops would read out, of the batch rows that ran it."""

import pytest
import torch

from toys import FP32, make_ids, make_model

KINDS = [
    {},
    {"num_prelude_layers": 1, "loop_connection": "inject_add"},
    {"loop_connection": "hyper", "max_num_loops": 5},
    {"norm_placement": "sandwich", "norm_between_loops": True, "exit_gate": True},
    {"kv_sharing": "first"},
    {"kv_sharing": "last"},
]


def seen_by(model, ids, **arguments) -> tuple[torch.Tensor, list]:
    """The logits of a call, and what its observer was given."""
    seen = []
    logits = model(ids, observe=lambda rows, state: seen.append((rows, state)), **arguments).logits
    return logits, seen


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_after_loop_t_it_sees_what_a_run_of_t_loops_reads_out(fields):
    model, ids = make_model(**fields), make_ids(rows=3)
    depths = torch.tensor([1, 4, 2])
    logits, seen = seen_by(model, ids, num_loops=depths)
    assert logits.equal(model(ids, num_loops=depths).logits)  # and changes nothing
    assert [rows.tolist() for rows, _ in seen] == [[0, 1, 2], [1, 2], [1], [1]]
    for loop, (rows, state) in enumerate(seen):
        expected = model(ids, num_loops=loop + 1).logits[rows]
        torch.testing.assert_close(model.readout(state), expected, **FP32)


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("kv_sharing", ["last", "mean", "gated"])
def test_it_sees_all_chunks_at_once(kv_sharing, chunk):
    """Chunks see entries of the last loop of earlier ones: the state of the last loop is what the call reads out."""
    model, ids = make_model(kv_sharing=kv_sharing, prefill_chunk=chunk), make_ids()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    logits, seen = seen_by(model, ids, attention_mask=mask)
    assert [state.shape for _, state in seen] == [(3, 7, 32)] * model.config.num_loops
    torch.testing.assert_close(model.readout(seen[-1][1])[mask.bool()], logits[mask.bool()], **FP32)


@pytest.mark.parametrize("keep", [0, 2])
def test_the_loss_of_an_exit_gate_leaves_its_place_to_an_observer(keep):
    """The objective reads all loops itself; whoever observes sees the same, at all positions."""
    model, ids = make_model(exit_gate=True), make_ids()
    _, alone = seen_by(model, ids)
    labels = ids[:, -keep:]
    with_labels = []
    output = model(ids, shift_labels=labels, logits_to_keep=keep, observe=lambda *seen: with_labels.append(seen))
    assert output.loss.equal(model(ids, shift_labels=labels, logits_to_keep=keep).loss)
    for (rows, state), (rows_too, state_too) in zip(alone, with_labels, strict=True):
        assert rows.equal(rows_too)
        assert state.equal(state_too)


def test_a_misspelt_observer_is_refused():
    with pytest.raises(TypeError, match="Did you mean 'observe'"):
        make_model()(make_ids(), observer=print)
