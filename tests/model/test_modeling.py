"""Laws of the forward pass: what the loop equals, what it must not see, what it costs."""

import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForSequenceClassification
from modeling_looped.connections_looped import STARTS
from modeling_looped.layers_looped import SlotAttention
from toys import BF16, FP32, KV_SHARINGS, count_layer_calls, make_config, make_ids, make_model

SHAPES = {
    "plain": {},
    "sections": {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 2},
    "ouro": {"norm_placement": "sandwich", "norm_between_loops": True, "tie_word_embeddings": False},
    "exit": {"norm_placement": "sandwich", "norm_between_loops": True, "exit_gate": True},
    "gpt2": {
        "norm_type": "layernorm",
        "gated_mlp": False,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": True,
        "mlp_bias": True,
        "position_embedding": "learned",
        "num_key_value_heads": 4,
    },
    "nope": {"position_embedding": "none", "qk_norm": True},
    "add": {"loop_connection": "inject_add"},
    "huginn": {
        "loop_connection": "inject_concat",
        "state_init": "truncated_normal",
        "num_prelude_layers": 1,
        "num_coda_layers": 1,
        "norm_placement": "sandwich_sum",
        "norm_before_coda": True,
        "embedding_multiplier": 4.0,
    },
    "hyperloop": {"loop_connection": "hyper", "loop_embedding": "learned", "max_num_loops": 8, "num_coda_layers": 1},
    "mhc": {"loop_connection": "hyper", "hyper_mixing": "sinkhorn", "hyper_gates": "shared"},
    "static": {"loop_connection": "hyper", "hyper_mixing": "static", "max_num_loops": 8, "norm_between_loops": True},
    "disco": {"loop_connection": "disco", "num_coda_layers": 1, "tie_word_embeddings": False},
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])


def llama_with_weights_of(model: LoopedForCausalLM, num_loops: int) -> LlamaForCausalLM:
    """The plain stack that the loop unrolls into, by transformers' own implementation."""
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=num_loops * config.num_core_layers,
            rms_norm_eps=config.norm_eps,
            rope_parameters=config.rope_parameters,
            **{
                name: getattr(config, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "max_position_embeddings",
                    "tie_word_embeddings",
                )
            },
        )
    ).eval()
    weights = model.state_dict()
    for name, tensor in llama.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[1:3] = ["core", str(int(parts[2]) % config.num_core_layers)]
        tensor.copy_(weights[".".join(parts)])
    return llama


@every_attention
@pytest.mark.parametrize("num_core_layers", [1, 2, 4])
@pytest.mark.parametrize("num_loops", [1, 3])
@pytest.mark.parametrize("tie", [True, False])
def test_loops_equal_an_unrolled_llama(attn, num_core_layers, num_loops, tie):
    model = make_model(attn=attn, num_core_layers=num_core_layers, tie_word_embeddings=tie)
    llama = llama_with_weights_of(model, num_loops)
    llama.set_attn_implementation(attn)
    ids = make_ids()
    torch.testing.assert_close(model(ids, num_loops=num_loops).logits, llama(ids).logits, **FP32)
    labels = ids.clone()
    labels[:, :2] = -100
    torch.testing.assert_close(
        model(ids, labels=labels, num_loops=num_loops).loss, llama(ids, labels=labels).loss, **FP32
    )


@every_attention
@every_shape
def test_no_token_sees_a_later_one(attn, shape):
    """By gradient, everywhere: the loop-think code lost its mask when the block stopped making one (trap 20)."""
    model = make_model(attn=attn, **SHAPES[shape])
    embeds = model.get_input_embeddings()(make_ids(2, 6)).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    for position in range(5):
        (gradient,) = torch.autograd.grad(logits[:, position].sum(), embeds, retain_graph=True)
        assert gradient[:, position + 1 :].abs().max() == 0
        assert gradient[:, : position + 1].abs().max() > 0


@every_shape
def test_logits_do_not_depend_on_loops_to_come(shape):
    """The logits of loop t in a longer run are those of a run with t loops: nothing looks ahead."""
    model = make_model(**SHAPES[shape])
    ids = make_ids()
    budgets = model(ids, num_loops=torch.tensor([1, 2, 5])).logits
    for row, loops in enumerate((1, 2, 5)):
        torch.testing.assert_close(budgets[row], model(ids, num_loops=loops).logits[row], **FP32)


@every_shape
@every_attention
def test_left_padded_rows_equal_single_rows(shape, attn):
    """Huginn drops the padding mask, which moves logits by 0.1 (trap 1), and squeezes position ids to one row (3)."""
    model = make_model(attn=attn, **SHAPES[shape])
    ids = make_ids()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :3], mask[1, :3] = 0, 0
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0], **FP32)
    torch.testing.assert_close(logits[1, 3:], model(ids[1:2, 3:]).logits[0], **FP32)


def test_parameters_do_not_depend_on_the_loop_count():
    counts = [sum(p.numel() for p in make_model(num_loops=loops).parameters()) for loops in (1, 4, 9)]
    assert len(set(counts)) == 1


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_zero_residual_init_starts_as_the_identity(placement, tmp_path):
    """A global init that runs after the special one overwrites it (LoopFormer, trap 16): check on disk too."""
    model = make_model(residual_init="zero", norm_placement=placement, mlp_bias=True, attention_bias=True)
    ids = make_ids()
    reference = model(ids, num_loops=1).logits
    assert reference.equal(model(ids, num_loops=7).logits)
    model.save_pretrained(tmp_path)
    assert LoopedForCausalLM.from_pretrained(tmp_path)(ids, num_loops=7).logits.equal(reference)
    model.train()(ids, labels=ids, num_loops=3).loss.backward()
    gradients = [p.grad.abs().max() for p in model.parameters() if p.grad is not None]
    assert 0 < max(gradients) < 10


@every_shape
def test_a_saved_or_pickled_model_is_the_same_model(shape, tmp_path):
    """Built on the meta device, as loading does, a normal start kept an empty table there, and no saved model of that
    kind could be run; the gates of a hyper connection were chosen by a lambda, which cannot be pickled."""
    model, ids = make_model(**SHAPES[shape]), make_ids()
    model.save_pretrained(tmp_path)
    for twin in (LoopedForCausalLM.from_pretrained(tmp_path), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, **FP32)


@pytest.mark.parametrize("shape", ["plain", "ouro", "exit"])
@pytest.mark.parametrize("vocab_size", [43, 61])
def test_a_resized_vocabulary_is_trained(shape, vocab_size):
    """The loss kept the vocabulary size that it was made with: added tokens broke training, and nothing else."""
    model, ids = make_model(**SHAPES[shape]), make_ids() % 43
    model.resize_token_embeddings(vocab_size)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.shape[-1] == len(model.get_input_embeddings().weight.grad) == vocab_size
    if shape != "exit":  # whose loss is that of all loops
        by_hand = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(output.loss, by_hand, **FP32)


def test_embedding_std_is_the_one_asked_for():
    model = make_model(vocab_size=2000, embedding_init_std=1.0)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(1.0, abs=0.05)


def test_adding_the_embeddings_starts_at_the_second_loop():
    """Input injection of arXiv 2604.07822: h0 = e, then h + e. One loop is therefore the plain model."""
    add, plain = make_model(loop_connection="inject_add"), make_model()
    ids = make_ids()
    assert add(ids, num_loops=1).logits.equal(plain(ids, num_loops=1).logits)
    embeds = add.get_input_embeddings()(ids)
    state = plain.model(inputs_embeds=embeds, num_loops=1).last_hidden_state
    assert state.equal(add.model(inputs_embeds=embeds, num_loops=1).last_hidden_state)
    assert not add(ids, num_loops=2).logits.equal(plain(ids, num_loops=2).logits)
    zeros = make_model(loop_connection="inject_add", state_init="zeros")
    assert zeros(ids, num_loops=3).logits.equal(add(ids, num_loops=3).logits)


def test_norm_between_loops_is_readout_and_input_at_once():
    """Ouro: h_t = norm(stack(h_{t-1})), logits_t = head(h_t); derived again by hand from the layers."""
    model = make_model(**SHAPES["ouro"])
    ids = make_ids()
    hidden = model.get_input_embeddings()(ids)
    rotary = model.model.positions(hidden, torch.arange(ids.shape[1])[None])
    for _ in range(3):
        for layer in model.model.core:
            hidden = layer(hidden, position_embeddings=rotary)
        hidden = model.model.core_norm(hidden)
    torch.testing.assert_close(model.lm_head(hidden), model(ids, num_loops=3).logits, **FP32)


def test_random_start_is_reproducible_and_local():
    """Huginn's start is unseeded: the same call twice differed by 0.86 (trap 21)."""
    model = make_model(**SHAPES["huginn"])
    ids = make_ids()

    def logits(ids, seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return model(ids, generator=generator).logits

    assert logits(ids).equal(logits(ids))
    assert logits(ids, 5).equal(logits(ids, 5))
    assert not logits(ids, 5).equal(logits(ids, 6))
    torch.testing.assert_close(logits(ids, 5)[1], logits(ids[1:2], 5)[0], **FP32)
    torch.testing.assert_close(logits(ids, 5)[:, :4], logits(ids[:, :4], 5), **FP32)
    model.train()
    assert logits(ids, 5).equal(logits(ids, 5))
    torch.manual_seed(0)
    assert not logits(ids).equal(logits(ids))


@pytest.mark.parametrize("name", ["normal", "truncated_normal"])
def test_random_starts_of_far_positions_are_new_and_stay(name):
    start = STARTS[name](make_config(state_init=name))
    embeds = torch.zeros(1, 200, 32)
    positions = torch.arange(200)[None]
    noise = start(embeds, positions, None, training=False)[0]
    assert len(noise.unique(dim=0)) == 200
    assert start(embeds[:, :3], positions[:, 150:153], None, training=False)[0].equal(noise[150:153])
    fresh = STARTS[name](make_config(state_init=name))
    assert fresh(embeds[:, :70], positions[:, :70], None, training=False)[0].equal(noise[:70])
    assert (noise.abs().max() < 3) == (name == "truncated_normal")
    assert noise.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
@every_shape
def test_checkpointed_gradients_equal_plain_ones(shape, kv_sharing):
    # A normal start is drawn anew in training, and has no part in checkpointing.
    start = {"state_init": "zeros"} if shape == "huginn" else {}
    fields = {**SHAPES[shape], **start, "kv_sharing": kv_sharing}
    ids = make_ids()

    def gradients(checkpointing):
        model = make_model(**fields).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name], **FP32)


def test_only_the_last_loops_are_differentiated():
    """Truncated back-propagation: the gradient is that of the last loops run from a detached state."""
    ids = make_ids()
    model = make_model(loop_connection="inject_add", num_core_layers=1, tie_word_embeddings=False)
    loss = model(ids, labels=ids, num_loops=5, num_grad_loops=2).loss
    loss.backward()
    truncated = model.model.core[0].mlp.down_proj.weight.grad.clone()
    model.zero_grad()

    embeds = model.get_input_embeddings()(ids)
    rotary = model.model.positions(embeds, torch.arange(ids.shape[1])[None])
    with torch.no_grad():
        state = torch.zeros_like(embeds)
        for _ in range(3):
            state = model.model.core[0](state + embeds, position_embeddings=rotary)
    for _ in range(2):
        state = model.model.core[0](state + embeds, position_embeddings=rotary)
    by_hand = model.loss_function(model.readout(state), ids, vocab_size=50)
    by_hand.backward()
    torch.testing.assert_close(by_hand, loss, **FP32)
    torch.testing.assert_close(truncated, model.model.core[0].mlp.down_proj.weight.grad, **FP32)
    model.zero_grad()
    model(ids, labels=ids, num_loops=5).loss.backward()
    assert not torch.allclose(truncated, model.model.core[0].mlp.down_proj.weight.grad, atol=1e-4)


def test_labels_are_shifted_once():
    """Huginn and the retrofit code train on unshifted labels, which an identity model solves (trap 4)."""
    model = make_model()
    ids = make_ids()
    output = model(ids, labels=ids)
    shifted = torch.nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 50), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, shifted, **FP32)


def test_one_readout_position_is_trained_without_the_answer_in_the_input():
    model = make_model()
    ids = make_ids()
    answers = torch.tensor([[3], [7], [9]])
    output = model(ids, shift_labels=answers, logits_to_keep=1)
    assert output.logits.shape == (3, 1, 50)
    with_answer = torch.full((3, 8), -100)
    with_answer[:, -1:] = answers
    by_hand = model(torch.cat([ids, answers], 1), labels=with_answer).loss
    torch.testing.assert_close(output.loss, by_hand, **FP32)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])])
def test_kept_logits_are_a_slice_of_all(keep):
    model = make_model()
    full = model(make_ids()).logits
    expected = full[:, keep] if isinstance(keep, torch.Tensor) else full[:, -keep:]
    torch.testing.assert_close(model(make_ids(), logits_to_keep=keep).logits, expected, **FP32)


def test_every_layer_call_is_recorded():
    model = make_model(attn="eager", num_prelude_layers=1, num_coda_layers=1)
    output = model(make_ids(), num_loops=4, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 1 + 1 + 4 * 2 + 1
    assert len(output.attentions) == 1 + 4 * 2 + 1
    assert all(weights.shape == (3, 4, 7, 7) for weights in output.attentions)
    assert output.hidden_states[-1].equal(output[0].new_tensor(0) + model.model(make_ids(), num_loops=4)[0])
    shared = make_model(kv_sharing="last")(make_ids(), output_hidden_states=[-1]).hidden_states
    assert [state is None for state in shared] == [True] * 6 + [False]  # counted by layer calls, not by KV slots


@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
def test_every_slot_has_one_attention(kv_sharing):
    """Serving engines find a slot by the index of its attention, and map each index to one module when they load:
    loops that share an index turn their output into garbage without an error (trap 15)."""
    model = make_model(kv_sharing=kv_sharing, num_prelude_layers=1, num_coda_layers=1)
    keys = set(model.state_dict())
    called = []
    for num_loops in (3, 5, 2):
        called.clear()
        model(make_ids(), num_loops=num_loops)
        attentions = [module for module in model.modules() if isinstance(module, SlotAttention)]
        assert sorted(module.layer_idx for module in attentions) == list(range(len(attentions)))
        assert len(attentions) >= model.config.kv_slots().count(num_loops)
        for module in attentions:
            module.register_forward_pre_hook(lambda module, args: called.append(module.layer_idx))
        model(make_ids(), num_loops=num_loops)
        assert set(called) == set(range(model.config.kv_slots().count(num_loops)))
    assert set(model.state_dict()) == keys


def test_bf16_stays_near_fp32():
    model, ids = make_model(initializer_range=0.05), make_ids()
    reference = model(ids).logits.softmax(-1)
    half = model.to(torch.bfloat16)(ids)
    assert half.logits.dtype == torch.bfloat16
    torch.testing.assert_close(half.logits.float().softmax(-1), reference, **BF16)


def test_overfits_one_batch():
    model = make_model(residual_init="zero", initializer_range=0.02).train()
    ids = make_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


@every_shape
def test_every_parameter_is_trained(shape):
    model = make_model(**SHAPES[shape]).train()
    model(make_ids(), labels=make_ids(), num_loops=model.config.max_num_loops).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()] == []


def test_sequence_classification_trains_at_any_depth():
    torch.manual_seed(0)
    model = LoopedForSequenceClassification(make_config(num_labels=3))
    output = model(make_ids(), labels=torch.tensor([0, 1, 2]), num_loops=5)
    output.loss.backward()
    assert output.logits.shape == (3, 3)
    assert not output.logits.equal(model(make_ids(), num_loops=1).logits)
    with pytest.raises(TypeError, match="num_loops"):
        model(make_ids(), numloops=5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_loops": 0}, ValueError, "num_loops must be an int >= 1"),
        ({"num_loops": -2}, ValueError, "num_loops must be an int >= 1"),
        ({"num_loops": 1.5}, ValueError, "num_loops must be an int >= 1"),
        ({"num_loops": True}, ValueError, "num_loops must be an int >= 1"),
        ({"num_loops": torch.tensor([1, 2])}, ValueError, r"shape \(3,\)"),
        ({"num_loops": torch.tensor([[1, 2, 3]])}, ValueError, r"shape \(3,\)"),
        ({"num_loops": torch.tensor([1.0, 2.0, 3.0])}, ValueError, "LongTensor"),
        ({"num_loops": torch.tensor([1, 0, 3])}, ValueError, "in every row"),
        ({"num_grad_loops": 0}, ValueError, "num_grad_loops"),
        ({"num_grad_loops": 1, "num_loops": torch.tensor([1, 2, 3])}, ValueError, "num_grad_loops"),
        ({"attention_mask": torch.ones(3, 6)}, ValueError, "attention_mask has shape"),
        ({"attention_mask": torch.ones(2, 7)}, ValueError, "attention_mask has shape"),
        ({"numloops": 3}, TypeError, "Did you mean 'num_loops'"),
        ({"loops": 3}, TypeError, "unexpected keyword argument 'loops'"),
        ({"halt": "kl"}, TypeError, "unexpected keyword argument 'halt'"),
        ({"inputs_embeds": torch.zeros(3, 7, 32)}, ValueError, "exactly one"),
    ],
)
def test_bad_calls_say_what_to_change(arguments, error, message):
    """HRM-Text ignores an unknown loop argument without a word (trap 6)."""
    model = make_model()
    with pytest.raises(error, match=message):
        model(make_ids(), **arguments)


@pytest.mark.parametrize("bad", [-1, 50])
def test_ids_out_of_the_vocabulary_are_refused(bad):
    ids = make_ids()
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 49\]"):
        make_model()(ids)


def test_learned_positions_end_where_the_table_does():
    with pytest.raises(ValueError, match="max_position_embeddings=4"):
        make_model(position_embedding="learned", max_position_embeddings=4)(make_ids())


def test_layer_calls_are_loops_times_core():
    model = make_model(num_prelude_layers=1, num_coda_layers=1)
    calls = count_layer_calls(model)
    model(make_ids(), num_loops=4)
    assert [section for section, _ in calls] == ["prelude"] + ["core"] * 8 + ["coda"]


def test_config_presets_of_other_kinds_take_a_training_step():
    """An always-true branch crashed LoopFormer's dense baseline (trap 27): the plain stack is a looped model too."""
    dense = LoopedForCausalLM(LoopedConfig(**{**make_config().to_diff_dict(), "num_core_layers": 4, "num_loops": 1}))
    dense(make_ids(), labels=make_ids()).loss.backward()


@pytest.mark.parametrize("fields", [{}, {"num_prelude_layers": 1, "num_coda_layers": 2}, {"exit_gate": True}])
def test_floating_point_ops_are_those_of_the_unrolled_stack(fields):
    """Of a batch at any depth, as many as Trainer estimates for the stack that has the core's layers as often."""
    inputs = {"input_ids": make_ids(rows=4, tokens=6)}
    model = make_model(num_core_layers=2, num_loops=3, **fields)
    for num_loops in (1, 2, 7):
        stack = make_model(num_core_layers=2 * num_loops, num_loops=1, **fields)
        expected = 6 * inputs["input_ids"].numel() * stack.num_parameters(exclude_embeddings=True)
        assert model.floating_point_ops(inputs | {"num_loops": num_loops}) == expected
        assert stack.floating_point_ops(inputs) == expected
    at_depths = [model.floating_point_ops(inputs | {"num_loops": num_loops}) for num_loops in (2, 4)]
    assert model.floating_point_ops(inputs | {"num_loops": torch.tensor([2, 4, 2, 4])}) == sum(at_depths) / 2
    assert model.floating_point_ops(inputs) == sum(at_depths) / 2  # the configuration's 3 loops
