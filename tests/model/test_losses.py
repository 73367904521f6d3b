"""Laws of the exit gate: a distribution over loops, the loss expected under it, and what the gate learns alone."""

import math

import pytest
import torch
from torch import nn

from modeling_looped import LoopedForCausalLM
from modeling_looped.losses_looped import exit_distribution, expected_loss, gate_loss
from toys import BF16, FP32, make_config, make_ids, make_model

OURO = {"norm_placement": "sandwich", "norm_between_loops": True, "tie_word_embeddings": False, "exit_gate": True}
BETA = 0.1


def make_gated_model(seed: int = 0, **fields) -> LoopedForCausalLM:
    """An Ouro toy whose gate tells tokens apart, which a fresh one does not."""
    model = make_model(seed=seed, **{**OURO, **fields})
    with torch.no_grad():
        model.model.exit_gate.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return model


def make_gates(loops: int = 4, scale: float = 2.0) -> torch.Tensor:
    """(3, 7, loops) gate logits."""
    return scale * torch.randn(3, 7, loops, generator=torch.Generator().manual_seed(5))


def make_labels() -> torch.Tensor:
    """Labels of `make_ids`, some of which are ignored."""
    labels = make_ids()
    labels[0, :3] = labels[2, 5] = -100
    return labels


def read_by_hand(model, ids, num_loops: int):
    """Logits (B, T, V) and gate logits (B, T) of every loop, each from a run of its own."""
    states = [model.model(ids, num_loops=loops).last_hidden_state for loops in range(1, num_loops + 1)]
    gate = model.model.exit_gate
    return [model.lm_head(h) for h in states], [(h @ gate.weight.T + gate.bias)[..., 0] for h in states]


def loss_by_hand(logits, gates, labels, beta: float = BETA) -> torch.Tensor:
    """Token by token and loop by loop, as the paper writes it."""
    tokens = []
    for row in range(len(labels)):
        for position in range(labels.shape[1] - 1):
            target = labels[row, position + 1]
            if target == -100:
                continue
            stay, total, entropy = torch.ones(()), torch.zeros(()), torch.zeros(())
            for loop in range(len(logits)):
                leave = torch.sigmoid(gates[loop][row, position])
                p = stay if loop + 1 == len(logits) else leave * stay
                stay = stay * (1 - leave)
                total = total - p * logits[loop][row, position].log_softmax(-1)[target]
                entropy = entropy - p * p.log()
            tokens.append(total - beta * entropy)
    return torch.stack(tokens).mean()


def test_exit_probabilities_are_the_formula_and_sum_to_one():
    gates = make_gates()
    p, lam = exit_distribution(gates), gates.sigmoid()
    stay = torch.ones(3, 7)
    for loop in range(3):
        torch.testing.assert_close(p[..., loop], lam[..., loop] * stay, **FP32)
        stay = stay * (1 - lam[..., loop])
    torch.testing.assert_close(p[..., 3], stay, **FP32)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 7), **FP32)
    assert exit_distribution(torch.zeros(4)).tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert exit_distribution(torch.zeros(1)).tolist() == [1.0]


def test_the_last_gate_value_is_not_used():
    gates = make_gates()
    other = gates.clone()
    other[..., -1] += 7
    assert exit_distribution(gates).equal(exit_distribution(other))


def test_rows_that_ran_fewer_loops_have_the_distribution_of_those_loops():
    gates, loops_run = make_gates(), torch.tensor([1, 4, 3])
    p = exit_distribution(gates, loops_run.unsqueeze(-1))
    for row, loops in enumerate(loops_run.tolist()):
        assert p[row, :, :loops].equal(exit_distribution(gates[row, :, :loops]))
        assert (p[row, :, loops:] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 2.0, 300.0])
def test_the_distribution_is_computed_in_float32_and_has_finite_gradients(scale):
    """A saturated gate makes p = 0, whose entropy has no derivative unless logarithms are kept throughout."""
    gates = make_gates(scale=scale).bfloat16().requires_grad_()
    p = exit_distribution(gates)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 7), **FP32)
    expected_loss(gates, torch.rand(3, 7, 4), 1.0, torch.tensor([[2], [4], [3]])).sum().backward()
    assert gates.grad.isfinite().all()


def test_a_certain_exit_is_the_loss_of_its_loop_and_a_uniform_one_their_mean():
    losses = torch.rand(3, 7, 4, generator=torch.Generator().manual_seed(6))
    for loop in range(4):
        certain = torch.full((4,), -100.0)
        certain[loop] = 100.0
        torch.testing.assert_close(expected_loss(certain.expand(3, 7, 4), losses, 0.0), losses[..., loop], **FP32)
    uniform = torch.tensor([1 / 4, 1 / 3, 1 / 2, 0.9]).logit().expand(3, 7, 4)
    expected = losses.mean(-1) - 0.3 * math.log(4)
    torch.testing.assert_close(expected_loss(uniform, losses, 0.3), expected, **FP32)


def test_labels_give_the_expected_loss_computed_by_hand():
    """Ouro's released file takes the loss of mixed logits, which is another number (trap 5)."""
    model, ids, labels = make_gated_model(), make_ids(), make_labels()
    output = model(ids, labels=labels)
    logits, gates = read_by_hand(model, ids, 3)
    by_hand = loss_by_hand(logits, gates, labels)
    torch.testing.assert_close(output.loss, by_hand, **FP32)
    assert output.logits.equal(model(ids).logits)  # of the last loop
    mixed = (torch.stack(logits, -1) * exit_distribution(torch.stack(gates, -1)).unsqueeze(-2)).sum(-1)
    assert abs(model.loss_function(mixed, labels, vocab_size=50) - by_hand) > 0.01

    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    by_hand.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **FP32)


def test_the_weight_of_the_entropy_is_the_configured_one():
    ids, labels = make_ids(), make_labels()
    losses = [make_gated_model(exit_entropy_weight=beta)(ids, labels=labels).loss for beta in (0.0, 0.1, 1)]
    entropy = (losses[0] - losses[1]) / 0.1
    assert entropy > 0.1
    torch.testing.assert_close(losses[0] - losses[2], entropy, rtol=1e-4, atol=1e-4)
    assert make_config().exit_entropy_weight == 0.1


@pytest.mark.parametrize("fields", [{}, {"norm_between_loops": False}, {"loop_connection": "hyper", "num_streams": 2}])
def test_every_loop_is_read_as_a_run_that_ends_there(fields):
    model, ids, labels = make_gated_model(**fields), make_ids(), make_labels()
    expected = loss_by_hand(*read_by_hand(model, ids, 3), labels)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, **FP32)


def test_one_loop_is_the_ordinary_loss():
    model, ids, labels = make_gated_model(), make_ids(), make_labels()
    output = model(ids, labels=labels, num_loops=1)
    torch.testing.assert_close(output.loss, model.loss_function(output.logits, labels, vocab_size=50), **FP32)


def test_rows_of_different_depth_and_halted_rows_are_trained_as_alone():
    model, ids, depths = make_gated_model(), make_ids(), torch.tensor([1, 3, 2])
    alone = [model(ids[i : i + 1], labels=ids[i : i + 1], num_loops=n).loss for i, n in enumerate((1, 3, 2))]
    torch.testing.assert_close(model(ids, labels=ids, num_loops=depths).loss, sum(alone) / 3, **FP32)
    halted = model(ids, labels=ids, num_loops=6, halting={"rule": "q_exit", "q": 0.8})
    used = halted.loops_used[:, 0]
    assert used.min() < 6
    torch.testing.assert_close(halted.loss, model(ids, labels=ids, num_loops=used).loss, **FP32)


def test_shifted_labels_kept_positions_and_item_counts():
    model, ids = make_gated_model(), make_ids()
    answers = torch.tensor([[3], [-100], [9]])
    loss = model(ids, shift_labels=answers, logits_to_keep=1).loss
    with_answer = torch.full((3, 8), -100)
    with_answer[:, -1:] = answers
    reference = model(torch.cat([ids, answers.clamp_min(0)], 1), labels=with_answer).loss
    torch.testing.assert_close(loss, reference, **FP32)
    summed = model(ids, shift_labels=answers, logits_to_keep=1, num_items_in_batch=8).loss
    torch.testing.assert_close(summed * 8, loss * 2, **FP32)
    with pytest.raises(ValueError, match="1-D tensor, got a 2-D"):
        model(ids, shift_labels=answers, logits_to_keep=torch.zeros(3, 1, dtype=torch.long))


def test_truncated_back_propagation_cuts_the_layers_and_not_the_gate():
    """The loss is the same; early loops still teach gate and head, whose weight in the loss it is."""
    model, ids, labels = make_gated_model(), make_ids(), make_labels()
    whole = model(ids, labels=labels, num_loops=3).loss
    loss = model(ids, labels=labels, num_loops=3, num_grad_loops=1).loss
    assert loss.equal(whole)
    loss.backward()
    truncated = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    embeds = model.get_input_embeddings()(ids)
    rotary = model.model.positions(embeds, torch.arange(ids.shape[1])[None])
    state, states = embeds, []
    for loop in range(3):
        with torch.set_grad_enabled(loop == 2):
            for layer in model.model.core:
                state = layer(state, position_embeddings=rotary)
            state = model.model.core_norm(state)
        states.append(state)
    gates = [model.model.exit_logits(state) for state in states]
    loss_by_hand([model.lm_head(state) for state in states], gates, labels).backward()
    by_hand = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert truncated.keys() == by_hand.keys()
    for name, gradient in by_hand.items():
        torch.testing.assert_close(truncated[name], gradient, **FP32)


def gate_loss_by_hand(logits, gates, labels) -> torch.Tensor:
    tokens = []
    for row in range(len(labels)):
        for position in range(labels.shape[1] - 1):
            target = labels[row, position + 1]
            if target == -100:
                continue
            losses = [-loop[row, position].log_softmax(-1)[target].item() for loop in logits]
            for loop in range(1, len(logits)):
                gain = max(0.0, losses[loop - 1] - losses[loop])
                w = 1 / (1 + math.exp(-50 * (gain - 0.005)))
                leave = torch.sigmoid(gates[loop][row, position])
                tokens.append(-(w * (1 - leave).log() + (1 - w) * leave.log()))
    return torch.stack(tokens).mean()


def test_the_gate_stage_is_the_formula_and_touches_only_the_gate():
    model, ids, labels = make_gated_model(exit_loss="gate"), make_ids(), make_labels()
    loss = model(ids, labels=labels, num_loops=4).loss
    torch.testing.assert_close(loss, gate_loss_by_hand(*read_by_hand(model, ids, 4), labels), **FP32)
    loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().any()}
    assert touched == {"model.exit_gate.weight", "model.exit_gate.bias"}


def test_the_gate_stage_of_rows_of_different_depth():
    gates, losses = make_gates(), torch.rand(3, 7, 4, generator=torch.Generator().manual_seed(6))
    together = gate_loss(gates, losses, torch.tensor([[1], [4], [3]]))
    for row, loops in enumerate((1, 4, 3)):
        alone = gate_loss(gates[row, :, :loops], losses[row, :, :loops])
        torch.testing.assert_close(together[row], alone, **FP32)
    assert (together[0] == 0).all()


def test_the_gate_stage_learns_to_stop_where_loops_gain_nothing():
    """Losses fall at loop 2 and stand still after: the gate is to stay there and to leave at loop 3."""
    losses = torch.tensor([3.0, 2.0, 2.0])
    gates = torch.zeros(3, requires_grad=True)
    gate_loss(gates, losses).backward()
    assert gates.grad[0] == 0
    assert gates.grad[1] > 0 > gates.grad[2]


def test_a_fresh_gate_leaves_at_a_constant_chance_and_survives_a_reload(tmp_path):
    """A global init that runs after the special one overwrites it (trap 16)."""
    model = make_model(**OURO, num_loops=4)
    model.save_pretrained(tmp_path)
    for gated in (model, LoopedForCausalLM.from_pretrained(tmp_path)):
        gate = gated.model.exit_gate
        assert not gate.weight.any()
        assert gate(torch.randn(2, 3, 32)).sigmoid().unique().tolist() == pytest.approx([1 / 4])
    gated = make_gated_model()
    gated.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.exit_gate.weight.equal(gated.model.exit_gate.weight)
    assert loaded(make_ids(), labels=make_ids()).loss.equal(gated(make_ids(), labels=make_ids()).loss)


def test_a_model_without_a_gate_has_no_part_of_one():
    model = make_model()
    assert model.model.exit_gate is None
    assert not any("exit" in name for name, _ in model.named_modules())


def test_a_gate_and_a_coda_are_refused():
    with pytest.raises(Exception, match="num_coda_layers=1"):
        make_config(exit_gate=True, num_coda_layers=1)


def test_bf16_loss_stays_near_fp32():
    model, ids = make_gated_model(initializer_range=0.05), make_ids()
    reference = model(ids, labels=ids).loss
    loss = model.to(torch.bfloat16)(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, **BF16)


def test_training_on_the_expected_loss_overfits_a_batch_at_every_loop():
    model, ids = make_model(**OURO, initializer_range=0.02).train(), make_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for logits in read_by_hand(model, ids, 3)[0]:
        assert nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 50), ids[:, 1:].reshape(-1)) < 0.3
