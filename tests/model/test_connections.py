"""Connections with parts of their own: what they equal, how they start, what they cost, how far they can loop."""

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy

from families import make_frozen, make_tokens
from looplab.convert.conversion import looped_config, to_looped
from looplab.training.optimizers import build_optimizers
from looplab.training.recipe import Optim
from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedForSequenceClassification, LoopedModel
from modeling_looped.connections_looped import (
    CONNECTIONS,
    LOOP_EMBEDDINGS,
    Gates,
    SinkhornMixing,
)
from modeling_looped.frozen_looped import looped
from toys import FP32, make_config, make_ids, make_model

SECTIONS = {"num_prelude_layers": 1, "num_coda_layers": 1, "loop_connection": "hyper"}
SHARED = {"hyper_gates": "shared", "loop_embedding": "sinusoidal"}
every_mixing = pytest.mark.parametrize("mixing", ["diagonal", "identity", "sinkhorn", "static"])


def set_gates(model, read: float, write: float, keep: float) -> None:
    """Gates that do not look at the streams: their logits, for every stream and loop alike."""
    connection = model.model.connection
    with torch.no_grad():
        for gates in connection.gates:
            gates.weight.zero_()
            gates.bias.copy_(torch.tensor([read, write, keep]).repeat_interleave(model.config.num_streams))


def plain_twin(model) -> LoopedForCausalLM:
    """The same sections around a plain loop, with the same weights."""
    twin = make_model(**{**SECTIONS, "loop_connection": "plain"})
    weights = {name: value for name, value in model.state_dict().items() if ".connection." not in name}
    twin.load_state_dict(weights)
    return twin


# Identities


@torch.no_grad()
def test_one_stream_with_open_gates_is_the_plain_loop():
    """sigmoid(40) is 1 and 1 - sigmoid(40) is lost in float32, so that nothing but rounding in F may differ."""
    model = make_model(**SECTIONS, num_streams=1)
    set_gates(model, read=40.0, write=0.0, keep=-40.0)
    torch.testing.assert_close(model(make_ids()).logits, plain_twin(model)(make_ids()).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_streams", [2, 4])
@torch.no_grad()
def test_streams_that_stay_copies_are_the_plain_loop(num_streams):
    model = make_model(**SECTIONS, num_streams=num_streams)
    set_gates(model, read=-math.log(num_streams - 1), write=0.0, keep=-40.0)
    torch.testing.assert_close(model(make_ids()).logits, plain_twin(model)(make_ids()).logits, **FP32)


@torch.no_grad()
def test_one_loop_with_open_gates_is_the_stack_of_the_sections():
    model = make_model(**SECTIONS, num_streams=1, num_loops=1)
    set_gates(model, read=40.0, write=0.0, keep=-40.0)
    torch.testing.assert_close(
        model(make_ids()).logits, plain_twin(model)(make_ids(), num_loops=1).logits, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("num_loops", [2, 3, 5])
@torch.no_grad()
def test_the_euler_start_is_the_training_free_loop(num_loops):
    """A pretrained core behind fresh "euler" gates is arXiv 2605.23872's damped loop, K = L and beta = 0: the state
    that is fed back is (1 - 1/L) y + F(y) / L, and every loop sees the keys of its own (the paper's prefill)."""
    source, ids = make_frozen("llama", dtype=torch.float32), make_tokens()
    config = looped_config(source.config, core=(2, 4))
    plain = to_looped(source, core=(2, 4))
    fields = {"loop_connection": "hyper", "num_loops": num_loops, "hyper_init": "euler", "max_num_loops": num_loops}
    model = LoopedForCausalLM(LoopedConfig(**{**config.to_diff_dict(), **fields})).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".connection." in name for name in missing)
    with looped(source, (2, 4), num_loops, method="euler", prefill="iterated"):
        torch.testing.assert_close(model(ids).logits, source(ids).logits, **FP32)


@torch.no_grad()
def naive_hyper(connection, state, output, loop, embedding):
    """The paper's equations for one token at a time, with explicit matrices: (S, D) -> (x, y')."""
    n = len(state)
    gates = connection.gates[loop]
    z = state.flatten() / torch.sqrt(state.flatten().square().mean() + 1e-6)
    pre, post, res = (
        gates.scale[kind] * (gates.weight[kind * n : kind * n + n] @ z) + gates.bias[kind * n : kind * n + n]
        for kind in range(3)
    )
    h_pre, h_post, h_res = torch.sigmoid(pre), 2 * torch.sigmoid(post), torch.diag(torch.sigmoid(res))
    return h_pre @ state, h_res @ state + torch.outer(h_post, output + embedding)


@torch.no_grad()
def test_a_loop_is_the_papers_equations():
    model = make_model(**SECTIONS, num_streams=3, loop_embedding="learned")
    for name, parameter in model.model.named_parameters():
        if "connection" in name or "loop_embedding" in name:
            parameter.normal_()
    connection, embedding = model.model.connection, model.model.loop_embedding
    state, output = torch.randn(2, 5, 3, 32), torch.randn(2, 5, 32)
    for loop in range(3):
        x, gates = connection.read(state, None, loop)
        written = connection.write(state, gates, embedding(output, loop), loop)
        for row in range(2):
            for token in range(5):
                expected = naive_hyper(
                    connection, state[row, token], output[row, token], loop, embedding.vectors[loop]
                )
                torch.testing.assert_close(x[row, token], expected[0], **FP32)
                torch.testing.assert_close(written[row, token], expected[1], **FP32)
    torch.testing.assert_close(connection.close(state), state.mean(2))
    assert torch.equal(connection.open(output, None), torch.stack([output] * 3, dim=2))


@torch.no_grad()
def test_a_static_loop_is_its_equations():
    connection = make_model(**SECTIONS, num_streams=3, hyper_mixing="static").model.connection
    state, output = torch.randn(2, 5, 3, 32), torch.randn(2, 5, 32)
    for loop in range(3):
        reading, writes = connection.reads[loop].weights.normal_(), connection.writes[loop].weights.normal_()
        mixing, writing = writes[:9].view(3, 3), writes[9:]
        x, gates = connection.read(state, None, loop)
        torch.testing.assert_close(x, torch.einsum("s,btsd->btd", reading, state))
        expected = torch.einsum("sr,btrd->btsd", mixing, state) + torch.einsum("s,btd->btsd", writing, output)
        torch.testing.assert_close(connection.write(state, gates, output, loop), expected, **FP32)
    torch.testing.assert_close(connection.close(state), state.sum(2))


@pytest.mark.parametrize("mixing", ["diagonal", "static"])
@torch.no_grad()
def test_what_leaves_the_streams_is_normalised(mixing):
    """With no coda the norm between loops is also Ouro's last one; what streams add up to has not been through it."""
    model = make_model(loop_connection="hyper", hyper_mixing=mixing, norm_between_loops=True)
    final = model.model(make_ids()).last_hidden_state
    torch.testing.assert_close(final.square().mean(-1), torch.ones(3, 7), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sinkhorn_mixes_by_a_doubly_stochastic_matrix():
    """Twenty rounds from logits of unit size; the columns, scaled last, sum to one exactly. The product on the
    identity is the matrix itself, and a naive twin divides by the sums instead of subtracting their logs."""
    logits = torch.randn(2, 5, 16, dtype=torch.float64)
    mixed = SinkhornMixing()(torch.eye(4, dtype=torch.float64).expand(2, 5, 4, 4), logits)
    naive = logits.view(2, 5, 4, 4).exp()
    for _ in range(20):
        naive = naive / naive.sum(-1, keepdim=True)
        naive = naive / naive.sum(-2, keepdim=True)
    torch.testing.assert_close(mixed, naive)
    for dimension in (-1, -2):
        torch.testing.assert_close(mixed.sum(dimension), torch.ones(2, 5, 4, dtype=torch.float64), rtol=0, atol=1e-5)


# The start


@torch.no_grad()
def gain(init: str, num_streams: int) -> float:
    """How much three loops over an identity core enlarge the streams, whose gates have no input yet."""
    model = make_model(
        **SECTIONS, residual_init="zero", hyper_init=init, num_streams=num_streams, max_num_loops=3, num_loops=3
    )
    connection = model.model.connection
    for gates in model.modules():
        if isinstance(gates, Gates):
            gates.scale.zero_()
    start = torch.randn(1, 4, 32)
    state = connection.open(start, start)
    for loop in range(3):
        x, gates = connection.read(state, start, loop)
        state = connection.write(state, gates, x, loop)
    return float(connection.close(state).norm() / start.norm())


@pytest.mark.parametrize(
    ("init", "expected"),
    [("norm_preserving", 1.0), ("euler", 1.0), ("zero", 15.625), ("plain", (1 + 1 / (1 + math.e**2)) ** 3)],
)
def test_the_start_enlarges_the_streams_as_computed(init, expected):
    """keep + write * S * read per loop: 1.0 for the default, 2.5 for all-zero logits."""
    assert gain(init, 4) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("init", ["norm_preserving", "euler", "plain"])
def test_one_stream_has_finite_gates(init):
    """logit(1/n) is infinite at n = 1, and logit(1 - 1/L) at one loop."""
    model = make_model(**SECTIONS, hyper_init=init, num_streams=1, num_loops=1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.isfinite(model(make_ids()).logits).all()


def test_fresh_values_survive_the_global_initialisation_and_a_reload(tmp_path):
    """Peer trap: a special initialisation that the framework's own wrote over."""
    model = make_model(**SECTIONS, loop_embedding="learned", num_streams=4)
    connection = model.model.connection
    for gates in connection.gates:
        assert torch.equal(gates.scale, torch.full((3,), 0.01))
        shares = gates.bias.sigmoid().view(3, 4)
        torch.testing.assert_close(shares, torch.tensor([0.25, 0.25, 0.5])[:, None].expand(-1, 4))
        assert 0.015 < gates.weight.std() < 0.025
    assert all(not vector.any() for vector in model.model.loop_embedding.vectors)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    again = LoopedForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("frozen", "differ"), [(False, True), (True, False)])
def test_streams_come_apart_unless_their_gates_are_equal_for_ever(frozen, differ):
    """Copies with equal gates stay copies: with W = 0 and equal biases, training never tells them apart."""
    model = make_model(**SECTIONS).train()
    if frozen:
        for gates in model.modules():
            if isinstance(gates, Gates):
                torch.nn.init.zeros_(gates.weight)
    ids, optimizer = make_ids(), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(8):
        cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    connection = model.model.connection
    start = torch.randn(1, 4, 32)
    with torch.no_grad():
        state = connection.open(start, start)
        for loop in range(3):
            x, gates = connection.read(state, start, loop)
            state = connection.write(state, gates, x, loop)
    spread = (state - state.mean(2, keepdim=True)).norm() / state.norm()
    assert (spread > 1e-4) == differ
    assert differ or spread < 1e-6


def test_gates_are_float32_shares_under_bf16():
    """In bf16 a share of 1 - 2^-9 is 1; sums of 32 products would be off by a percent."""
    model = make_model(**SECTIONS)
    gates = model.model.connection.gates[0]
    streams = 3 * torch.randn(2, 5, 4, 32)
    expected = gates.logits(streams)
    with torch.autocast("cpu", torch.bfloat16):
        found = gates.logits(streams)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    half = make_model(**SECTIONS).to(torch.bfloat16)
    x, logits = half.model.connection.read(streams.bfloat16(), None, 0)
    assert x.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in logits)
    assert half.model.connection.write(streams.bfloat16(), logits, streams[:, :, 0], 0).dtype == torch.bfloat16


# Sizes and training


@pytest.mark.parametrize(("hidden", "expected"), [(1024, 150_573), (2048, 301_101)])
def test_extra_parameters_follow_the_formula(hidden, expected):
    """L (3 n^2 C + 3 n + 3 + C), arXiv 2604.21254: the published differences to the plain looped model."""
    config = make_config(
        hidden_size=hidden, num_attention_heads=16, num_loops=3, loop_connection="hyper", loop_embedding="learned"
    )
    modules = CONNECTIONS["hyper"].of(config)(config), LOOP_EMBEDDINGS["learned"](config)
    assert sum(p.numel() for module in modules for p in module.parameters()) == expected
    assert expected == 3 * (3 * 16 * hidden + 3 * 4 + 3 + hidden)


@pytest.mark.parametrize(
    ("mixing", "per_loop"),
    [
        ("identity", 2 * 9 * 32 + 2 * 3 + 2),
        ("sinkhorn", (2 * 3 + 9) * 3 * 32 + 2 * 3 + 9 + 3),
        ("static", 3 * 3 + 2 * 3),
    ],
)
@pytest.mark.parametrize(("gates", "loops"), [("per_loop", 3), ("shared", 1)])
def test_a_mixing_has_no_parameters_that_it_does_not_use(mixing, per_loop, gates, loops):
    model = make_model(**SECTIONS, num_streams=3, hyper_mixing=mixing, hyper_gates=gates)
    connection = model.model.connection
    assert sum(p.numel() for p in connection.parameters()) == loops * per_loop
    model(make_ids()).logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in connection.parameters())


def test_only_the_matrices_of_gates_are_decayed():
    """No weight decay on a, b, e and the scalars of static hyper-connections, which would pull a stream to zero."""
    for fields in ({"loop_embedding": "learned"}, {"hyper_mixing": "static"}, SHARED):
        model = make_model(**SECTIONS, **fields)
        for kind in ("adamw", "muon"):
            groups = [g for o in build_optimizers(model, Optim(kind=kind, weight_decay=0.1)) for g in o.param_groups]
            decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
            matrices = {id(m.weight) for m in model.modules() if isinstance(m, Gates)}
            others = [*model.model.connection.parameters()]
            others += [p for name, p in model.named_parameters() if "loop_embedding" in name]
            assert {id(p) for p in others} & decayed == matrices


# How far it loops


@every_mixing
def test_loops_beyond_those_with_gates_are_refused(mixing):
    model = make_model(**SECTIONS, hyper_mixing=mixing)
    assert model.config.max_num_loops == 3
    model.generate(make_ids(1), num_loops=2, max_new_tokens=2)
    for call in (
        lambda: model(make_ids(), num_loops=4),
        lambda: model(make_ids(), num_loops=torch.tensor([1, 4, 2])),
        lambda: model.generate(make_ids(1), num_loops=4, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"num_loops=4 must be in 1 \.\. max_num_loops=3.*hyper_gates='shared'"):
            call()


@every_mixing
def test_shared_gates_run_any_number_of_loops(mixing):
    model = make_model(**SECTIONS, **SHARED, hyper_mixing=mixing)
    assert model.config.max_num_loops is None
    cached = model.generate(make_ids(), num_loops=7, max_new_tokens=4, do_sample=False)
    uncached = model.generate(make_ids(), num_loops=7, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
@torch.no_grad()
def test_a_loop_embedding_tells_loops_apart(kind):
    """Also around a plain connection; fresh ones are zero, so that they change nothing at first."""
    plain = make_model()
    model = make_model(loop_embedding=kind, max_num_loops=8)
    assert torch.equal(model(make_ids()).logits, plain(make_ids()).logits)
    for parameter in model.model.loop_embedding.parameters():
        parameter.fill_(1.0) if kind == "sinusoidal" else parameter.normal_()
    added = [model.model.loop_embedding(torch.zeros(1, 1, 32), loop) for loop in range(8)]
    assert all((added[i] - added[j]).norm() > 1e-2 for i in range(8) for j in range(i))
    assert not torch.allclose(model(make_ids()).logits, plain(make_ids()).logits, atol=1e-3)


def test_the_limit_stays_when_the_default_loop_count_changes(tmp_path):
    """The loops with gates are not those that run by default: a saved model may be told to run fewer."""
    make_model(**SECTIONS, num_loops=5).save_pretrained(tmp_path)
    model = LoopedForCausalLM.from_pretrained(tmp_path, num_loops=2)
    assert (model.config.num_loops, model.config.max_num_loops) == (2, 5)
    assert model(make_ids(), num_loops=5).loops_used.unique().tolist() == [5]
    with pytest.raises(ValueError, match="num_loops=6"):
        LoopedForCausalLM.from_pretrained(tmp_path, num_loops=6)(make_ids())


@torch.no_grad()
def test_rows_leave_with_all_their_streams():
    model = make_model(**SECTIONS)
    ids, depths = make_ids(), torch.tensor([1, 3, 2])
    together = model(ids, num_loops=depths).logits
    for row in range(3):
        alone = model(ids[row : row + 1], num_loops=int(depths[row])).logits
        torch.testing.assert_close(together[row : row + 1], alone, **FP32)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hyper_init": "euler", "hyper_mixing": "sinkhorn"}, r"hyper_init='euler'.*hyper_mixing='sinkhorn'"),
        ({"hyper_init": "zero", "hyper_mixing": "static"}, r"hyper_init='zero'.*static"),
        ({"max_num_loops": 2}, r"num_loops=3 must be in 1 \.\. max_num_loops=2"),
        ({"num_streams": 0}, "num_streams"),
        ({"hyper_mixing": "dense"}, "hyper_mixing"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, match):
    with pytest.raises((ValueError, StrictDataclassError), match=match):
        make_config(**SECTIONS, **fields)


def test_static_loops_start_by_reading_one_stream_in_turn():
    connection = make_model(**SECTIONS, hyper_mixing="static", num_streams=2).model.connection
    assert [read.weights.tolist() for read in connection.reads] == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert [write.weights.tolist() for write in connection.writes] == [[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]] * 3


# The discrete channel


CHANNELS = {
    "expected": {"disco_channel": "expected", "tie_word_embeddings": False, "num_prelude_layers": 1},
    "likeliest": {"disco_channel": "likeliest", "embedding_multiplier": 3.0, "norm_type": "layernorm"},
    "normalised": {"disco_channel": "expected", "norm_between_loops": True, "position_embedding": "learned"},
}


def make_disco(name: str = "expected", **fields):
    """Its two scalars at values of their own, so that one is not taken for the other."""
    model = make_model(loop_connection="disco", **CHANNELS[name], **fields)
    with torch.no_grad():
        model.model.connection.mix.weights.copy_(torch.tensor([0.8, 0.3]))
    return model


@pytest.mark.parametrize("name", CHANNELS)
@torch.no_grad()
def test_a_loop_reads_the_state_and_the_embedding_of_what_it_says(name):
    """One token at a time; the expected embedding as a sum over the vocabulary, with explicit shares."""
    model, ids, states, read = make_disco(name), make_ids(2, 4), [], []
    layer = model.model.core[0]
    layer.register_forward_hook(lambda module, args, output: read.append(args[0].clone()))
    model(ids, use_cache=False, observe=lambda rows, state: states.append(state.clone()))
    table = model.config.embedding_multiplier * model.get_input_embeddings().weight
    norm, head = model.model.readout_norm, model.lm_head.weight
    for loop in (1, 2):
        for row in range(2):
            for token in range(4):
                state = states[loop - 1][row, token]
                logits = head @ norm(state)
                if name == "likeliest":
                    said = table[logits.argmax()]
                else:
                    said = sum(share * word for share, word in zip(logits.softmax(0), table, strict=True))
                torch.testing.assert_close(read[loop][row, token], 0.8 * state + 0.3 * said, **FP32)


@pytest.mark.parametrize("name", CHANNELS)
@torch.no_grad()
def test_without_weight_the_discrete_channel_is_the_plain_loop(name):
    model = make_model(loop_connection="disco", disco_weight=0.0, **CHANNELS[name])
    plain = make_model(**{key: value for key, value in CHANNELS[name].items() if key != "disco_channel"})
    plain.load_state_dict(model.state_dict(), strict=False)
    assert model(make_ids()).logits.equal(plain(make_ids()).logits)


def test_the_discrete_channel_teaches_the_head_and_its_two_scalars():
    """Of the last loop's logits one has a loss: the other words of an untied head are taught by the channel alone."""
    for name, teaches in (("expected", True), ("likeliest", False)):
        model = make_disco(name, **({} if name == "expected" else {"tie_word_embeddings": False}))
        model(make_ids()).logits[..., 7].sum().backward()
        others = model.lm_head.weight.grad[torch.arange(50) != 7]
        assert bool(others.any()) == teaches
        assert model.model.connection.mix.weights.grad.all()


@torch.no_grad()
def test_the_head_that_is_read_is_that_of_the_model_which_holds_it(tmp_path):
    """A copy, a reloaded model, a head that a library replaced, more words: none reads the head of before."""
    model, ids = make_disco(), make_ids()
    before = model(ids).logits
    twin = copy.deepcopy(model)
    twin.lm_head.weight.normal_()
    twin.model.embed_tokens.weight.normal_()
    assert not twin(ids).logits.allclose(before)
    assert model(ids).logits.equal(before)

    model.save_pretrained(tmp_path)
    assert LoopedForCausalLM.from_pretrained(tmp_path)(ids).logits.equal(before)

    model.resize_token_embeddings(60)
    model.lm_head.weight[50:].fill_(-1.0)
    model.get_input_embeddings().weight[50:].fill_(5.0)
    assert model(ids).logits.shape[-1] == 60
    assert not model(ids).logits[..., :50].allclose(before)


def test_models_without_that_head_are_refused():
    config = make_config(loop_connection="disco")
    for model in (LoopedModel(config), LoopedForSequenceClassification(config)):
        with pytest.raises(ValueError, match=r"loop_connection='disco' reads the head .* use LoopedForCausalLM"):
            model(make_ids())
    with pytest.raises(StrictDataclassError, match=r"(?s)disco_weight.*\[0, 1\], got 1.5"):
        make_config(loop_connection="disco", disco_weight=1.5)
