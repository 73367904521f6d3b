"""Laws of distillation into one KV row per token: both ends of the interpolation, what is compared, who learns."""

import pytest
import torch

from looplab.training.distillation import Distillation, attention_outputs, by_loop, interpolated
from modeling_looped import LoopedConfig, LoopedForCausalLM
from toys import FP32, as_policy, make_ids, make_melt, make_model

OURO = {"norm_placement": "sandwich", "norm_between_loops": True}


def make_pair(chunk=3, **fields):
    """A student and its teacher: the same weights, and gates that are open."""
    student = make_melt(prefill_chunk=chunk, **OURO, **fields)
    teacher = as_policy(student, kv_sharing="per_loop", prefill_chunk=None)
    return student.train(), teacher


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("num_loops", [1, 4])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_interpolation_ends_at_both_models(chunk, num_loops, qk_norm):
    """alpha 0 is the model with a row per loop, whatever the chunks; alpha 1 the gated one (identity 2)."""
    # In double precision: seven chunks of four normalised loops add up more rounding than the tolerance is for.
    student, teacher = (model.double() for model in make_pair(chunk, qk_norm=qk_norm))
    ids = make_ids()
    own = student(ids, num_loops=num_loops).logits
    logits = []
    for alpha in (0.0, 1.0, 0.5):
        with interpolated(student, alpha):
            logits.append(student(ids, num_loops=num_loops, use_cache=True).logits)
    first, last, between = logits
    torch.testing.assert_close(first, teacher(ids, num_loops=num_loops).logits, **FP32)
    torch.testing.assert_close(last, own, **FP32)
    if num_loops > 1:
        assert min((between - first).abs().max(), (between - last).abs().max()) > 1e-2
    assert student(ids, num_loops=num_loops).logits.equal(own)  # and nothing stays behind


def test_the_mixture_is_that_of_keys_and_values():
    """A naive twin of one layer, two loops and chunks of one token, its memories in plain lists."""
    student, _ = make_pair(1, num_core_layers=1, num_loops=2, position_embedding="none", num_key_value_heads=4)
    ids, alpha = make_ids(), 0.3
    with interpolated(student, alpha), torch.no_grad():
        logits = student(ids, use_cache=True).logits
    (layer,) = student.model.core
    attn, heads = layer.self_attn, lambda t: t.unflatten(-1, (4, 8))
    memory = {"gated": [], 0: [], 1: []}
    expected = []
    with torch.no_grad():
        for token in range(7):
            hidden = student.get_input_embeddings()(ids[:, token])
            latent = None
            for loop in range(2):
                x = layer.input_layernorm(hidden)
                latent = layer.kv_gate(x, latent, loop)
                gated, own = (torch.stack([attn.k_proj(s), attn.v_proj(s)]) for s in (latent, x))
                rows = [alpha * g + (1 - alpha) * o for g, o in zip(memory["gated"], memory[loop], strict=True)]
                keys, values = torch.stack([*rows, alpha * gated + (1 - alpha) * own], dim=2)  # (B, S, 32) each
                scores = torch.einsum("bhd,bshd->bhs", heads(attn.q_proj(x)), heads(keys)) * 8**-0.5
                out = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), heads(values)).flatten(1)
                memory[loop].append(own)
                hidden = layer.add_and_transform(hidden, attn.o_proj(out))
                hidden = student.model.core_norm(hidden)
            memory["gated"].append(gated)
            expected.append(student.lm_head(hidden))
    torch.testing.assert_close(logits, torch.stack(expected, 1), **FP32)


def loss_of(distillation, student, ids, num_loops=3):
    return distillation(student, {"input_ids": ids}, num_loops)


def test_the_teacher_teaches_and_gets_no_gradient():
    student, teacher = make_pair()
    ids = make_ids()
    loss = loss_of(Distillation(student, teacher, alignment=0.1), student, ids)
    loss.backward()
    assert loss > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize("all_loops", [True, False])
@pytest.mark.parametrize("alignment", [0.0, 0.5])
def test_the_loss_is_what_the_equation_says(all_loops, alignment):
    student, teacher = make_pair()
    ids = make_ids()
    got = loss_of(Distillation(student, teacher, alignment, all_loops), student, ids)
    with torch.no_grad():
        divergences = []
        for loops in (1, 2, 3) if all_loops else (3,):  # no coda: loop t of the teacher is its run of t loops
            p = teacher(ids, num_loops=loops).logits.softmax(-1)
            divergences.append((p, loops))
        states = []  # of the student, whose chunks see rows of its last loop: it has to be run to the end
        student.model(ids, observe=lambda rows, state: states.append(state))
        kl = torch.stack(
            [(p * (p.log() - student.readout(states[loops - 1]).log_softmax(-1))).sum(-1) for p, loops in divergences]
        ).mean()
        with attention_outputs(student) as ours:
            student(ids)
        with attention_outputs(teacher) as theirs:
            teacher(ids)
        ours, theirs = by_loop(ours, 3), by_loop(theirs, 3)
        assert ours.shape == theirs.shape == (2, 3, 3, 7, 32)
    torch.testing.assert_close(got, kl + alignment * (ours - theirs).square().mean(), **FP32)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    """One chunk and closed gates: every state and every attention output agrees."""
    student, teacher = make_pair(None)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "kv_gate" in name:
                parameter.fill_(-200.0 if name.endswith("bias") else 0.0)
    loss = loss_of(Distillation(student, teacher, alignment=10.0), student, make_ids())
    torch.testing.assert_close(loss, torch.zeros(()), **FP32)


def test_recomputed_chunks_learn_the_same():
    student, teacher = make_pair()
    distillation, ids = Distillation(student, teacher, alignment=0.5), make_ids()
    loss_of(distillation, student, ids).backward()
    expected = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    student.activation_checkpointing_enable({"use_reentrant": False})
    loss_of(distillation, student, ids).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **FP32)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"kv_sharing": "last"}, {}, "set model.kv_sharing to gated"),
        ({"kv_sharing": "gated", "num_coda_layers": 1}, {"num_coda_layers": 1}, "without a coda"),
        ({"kv_sharing": "gated"}, {"kv_sharing": "first"}, "name a teacher with kv_sharing='per_loop'"),
        ({"kv_sharing": "gated"}, {"num_core_layers": 1}, "num_core_layers=2, the teacher 1"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        Distillation(make_model(**student), make_model(**teacher))


def test_a_gated_model_starts_from_a_teachers_weights(tmp_path):
    """What train.py does with `init_from`: gates are the only weights a teacher does not have."""
    teacher = make_model(**OURO)
    teacher.save_pretrained(tmp_path)
    config = LoopedConfig.from_pretrained(tmp_path, kv_sharing="gated", prefill_chunk=3)
    student, report = LoopedForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert {name.split(".kv_gate.")[1] for name in report["missing_keys"]} == {
        "of_input.weight",
        "of_input.bias",
        "of_latent.weight",
    }
    assert student.model.core[0].kv_gate.of_input.bias.eq(-3).all()
    assert student.model.core[0].kv_gate.of_input.weight.eq(0).all()
