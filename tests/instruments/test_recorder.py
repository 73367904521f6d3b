"""Laws of the recorder: calls in the order of the loop, states that are the model's own, edits that stay in place."""

import pytest
import torch

from looplab.instruments.recorder import edit, layer_calls, record
from toys import FP32, make_ids, make_model

# One of every way a state enters, runs through and leaves the loop.
KINDS = {
    "plain": {},
    "vanilla": {"num_core_layers": 4, "num_loops": 1},
    "sections": {"num_prelude_layers": 1, "num_coda_layers": 2},
    "inject_add": {"loop_connection": "inject_add", "num_prelude_layers": 1},
    "inject_concat": {"loop_connection": "inject_concat", "state_init": "normal", "num_coda_layers": 1},
    "norm_between_loops": {"norm_between_loops": True, "norm_placement": "sandwich"},
    "norm_then_coda": {"norm_between_loops": True, "num_coda_layers": 1, "norm_type": "layernorm"},
    "learned": {"position_embedding": "learned", "kv_sharing": "first"},
    "gated": {"kv_sharing": "gated"},  # whose core layers return their latent as well
}
LOOPS = (1, 3)


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    return make_model(**KINDS[request.param])


def unrolled(model, num_loops):
    """The naive twin: the layer modules in the order the design prescribes."""
    base = model.model
    calls = [(("prelude", 0, i), layer) for i, layer in enumerate(base.prelude)]
    for loop in range(num_loops):
        calls += [(("core", loop, i), layer) for i, layer in enumerate(base.core)]
    return calls + [(("coda", 0, i), layer) for i, layer in enumerate(base.coda)]


@pytest.mark.parametrize("num_loops", LOOPS)
def test_the_recording_follows_the_loop(model, num_loops):
    outputs = []
    handles = [
        module.register_forward_hook(lambda module, arguments, output: outputs.append((module, output)))
        for module in {id(layer): layer for _, layer in unrolled(model, num_loops)}.values()
    ]
    recording = record(model, make_ids(), num_loops)
    for handle in handles:
        handle.remove()
    assert list(recording.states) == [call for call, _ in unrolled(model, num_loops)]
    assert list(recording.states) == layer_calls(model.config, num_loops)
    for (_, layer), (module, output), state in zip(
        unrolled(model, num_loops), outputs, recording.states.values(), strict=True
    ):
        assert module is layer
        assert torch.equal(state, output if isinstance(output, torch.Tensor) else output[0])


def test_without_a_loop_count_the_configuration_decides(model):
    assert list(record(model, make_ids()).states) == layer_calls(model.config, model.config.num_loops)


@pytest.mark.parametrize("num_loops", LOOPS)
def test_the_readout_of_the_last_call_is_the_models_logits(model, num_loops):
    ids = make_ids()
    recording = record(model, ids, num_loops)
    with torch.no_grad():
        logits = model(ids, num_loops=num_loops).logits
    torch.testing.assert_close(recording.logits, logits, **FP32)
    torch.testing.assert_close(recording.readout(list(recording.states)[-1]), logits, **FP32)


def test_where_nothing_follows_the_loop_its_readout_is_that_of_fewer_loops():
    for kind in ("plain", "norm_between_loops"):
        model, ids = make_model(**KINDS[kind]), make_ids()
        recording = record(model, ids, 3)
        for loop in range(3):
            torch.testing.assert_close(
                recording.readout(("core", loop, 1)), record(model, ids, loop + 1).logits, **FP32
            )


def test_replacing_a_state_by_itself_changes_nothing(model):
    ids = make_ids()
    recording = record(model, ids)
    for call, state in recording.states.items():
        with edit(model, call, lambda _, state=state: state[:, [1, 4]], positions=[1, 4]):
            assert torch.equal(record(model, ids).logits, recording.logits)


@pytest.mark.parametrize("num_loops", LOOPS)
def test_an_edit_changes_its_call_and_nothing_before_it(model, num_loops):
    ids = make_ids()
    before = record(model, ids, num_loops).states
    for at, call in enumerate(before):
        with edit(model, call, lambda state: state + 1.0, positions=[2]):
            after = record(model, ids, num_loops).states
        assert all(torch.equal(after[earlier], before[earlier]) for earlier in list(before)[:at])
        difference = after[call] - before[call]
        torch.testing.assert_close(difference[:, 2], torch.ones_like(difference[:, 2]), **FP32)
        assert not difference[:, [0, 1, 3, 4, 5, 6]].any()
        for later in list(before)[at + 1 :]:
            assert torch.equal(after[later][:, :2], before[later][:, :2])  # no look-ahead
            assert not torch.equal(after[later][:, 2:], before[later][:, 2:])


def test_with_all_positions_of_another_row_the_model_goes_on_as_that_row():
    """Where the loop reads nothing but its state; injection would still bring the row's own embeddings back."""
    for kind in ("plain", "vanilla", "sections", "norm_between_loops", "norm_then_coda"):
        model = make_model(**KINDS[kind])
        clean, other = record(model, make_ids(seed=1)), make_ids(seed=2)
        for call, state in clean.states.items():
            with edit(model, call, lambda _, state=state: state):
                assert torch.equal(record(model, other).logits, clean.logits)


def test_an_edit_counts_its_loops_anew_in_every_forward():
    model, ids = make_model(), make_ids()
    with edit(model, ("core", 1, 0), torch.zeros_like):
        first, second = record(model, ids).logits, record(model, ids).logits
        generated = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
        assert torch.equal(generated[:, -2], first[:, -1].argmax(-1))
        assert torch.equal(generated[:, -1], record(model, generated[:, :-1]).logits[:, -1].argmax(-1))
    assert torch.equal(first, second)


def test_edits_nest():
    model, ids = make_model(), make_ids()
    add = edit(model, ("core", 0, 0), lambda state: state + 1)
    with add, edit(model, ("core", 0, 0), lambda state: 2 * state):
        nested = record(model, ids).states["core", 0, 0]
    torch.testing.assert_close(nested, 2 * (record(model, ids).states["core", 0, 0] + 1), **FP32)


def test_no_hook_stays_behind_even_after_an_error():
    model, ids = make_model(), make_ids()

    def fail(state):
        raise RuntimeError("stop")

    def hooks():
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    record(model, ids)
    with pytest.raises(RuntimeError, match="stop"), edit(model, ("core", 0, 0), fail):
        model(ids)
    assert hooks() == before


def test_left_padding_does_not_change_the_states_of_the_real_tokens():
    model, ids = make_model(), make_ids(rows=2, tokens=5)
    mask = torch.cat([torch.zeros(2, 2), torch.ones(2, 5)], dim=1).long()
    padded = record(model, torch.cat([torch.zeros(2, 2).long(), ids], dim=1), attention_mask=mask)
    for call, state in record(model, ids).states.items():
        torch.testing.assert_close(padded.states[call][:, 2:], state, **FP32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("core", 0, 2), r"no layer call \('core', 0, 2\): the model has 0 prelude, 2 core and 0 coda layers"),
        (("coda", 0, 0), "no layer call"),
        (("core", -1, 0), "no layer call"),
        (("cores", 0, 0), "no layer call"),
    ],
)
def test_a_call_that_does_not_exist_is_refused(call, message):
    with pytest.raises(ValueError, match=message), edit(make_model(), call, torch.zeros_like):
        pass


def test_a_prelude_has_no_second_loop():
    change = edit(make_model(num_prelude_layers=1), ("prelude", 1, 0), torch.zeros_like)
    with pytest.raises(ValueError, match="has 1 prelude, 2 core and 0 coda layers"), change:
        pass


def test_an_edit_that_is_never_reached_is_an_error():
    model = make_model()
    change = edit(model, ("core", 2, 0), torch.zeros_like)
    with pytest.raises(ValueError, match=r"no forward reached \('core', 2, 0\)"), change:
        model(make_ids(), num_loops=2)


def test_an_edit_of_another_shape_is_an_error():
    model = make_model()
    change = edit(model, ("core", 0, 0), lambda state: state.expand(-1, 7, -1), positions=[0])
    with pytest.raises(ValueError, match=r"the shape it is given, \(3, 1, 32\), got \(3, 7, 32\)"), change:
        model(make_ids())


def test_rows_of_different_depth_cannot_share_a_recording():
    with pytest.raises(ValueError, match="num_loops must be one int for all rows"):
        record(make_model(), make_ids(), torch.tensor([1, 2, 3]))
