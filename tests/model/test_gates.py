"""Laws of KV gates, of which one cached entry per token is left (MELT, arXiv 2605.07721)."""

import copy

import pytest
import torch

from modeling_looped import LoopedForCausalLM
from toys import FP32, as_policy, make_ids, make_melt, make_model, stepwise

GATES = ["elementwise", "low_rank", "scalar", "mean", "ema", "last"]
every_gate = pytest.mark.parametrize("kv_gate", GATES)
every_attention = pytest.mark.parametrize("attn", ["eager", "sdpa"])
SANDWICH = {"norm_placement": "sandwich", "norm_between_loops": True}  # the layer that MELT starts from


def with_share(model, share: float):
    """Gates that let `share` of the latent through, whatever they see; 0 and 1 exactly."""
    for layer in model.model.core:
        for name, parameter in layer.kv_gate.named_parameters():
            torch.nn.init.constant_(parameter, {0.0: -200.0, 1.0: 200.0}[share] if name.endswith("bias") else 0.0)
    return model


def gradients(model, ids, **kwargs):
    model.zero_grad()
    loss = model(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
@every_attention
@pytest.mark.parametrize("kv_gate", ["elementwise", "low_rank", "scalar"])
@pytest.mark.parametrize("num_loops", [1, 3, 5])
def test_a_closed_gate_in_one_chunk_is_the_model_with_a_row_per_loop(attn, kv_gate, num_loops):
    model = with_share(make_melt(kv_gate, attn=attn, **SANDWICH), 0.0)
    per_loop = as_policy(model, kv_sharing="per_loop")
    ids = make_ids()
    assert model(ids, num_loops=num_loops).logits.equal(per_loop(ids, num_loops=num_loops).logits)


@torch.no_grad()
@pytest.mark.parametrize("kv_gate", ["elementwise", "low_rank", "scalar"])
@pytest.mark.parametrize("num_loops", [1, 3, 5])
def test_an_open_gate_keeps_the_keys_of_the_first_loop(kv_gate, num_loops):
    model = with_share(make_melt(kv_gate), 1.0)
    first = as_policy(model, kv_sharing="first")
    ids, sizes = make_ids(), (3, 1, 2, 1)
    torch.testing.assert_close(model(ids, num_loops=num_loops).logits, first(ids, num_loops=num_loops).logits, **FP32)
    cached, twin = (stepwise(m, ids, sizes, num_loops=num_loops) for m in (model, first))
    torch.testing.assert_close(cached, twin, **FP32)


@torch.no_grad()
@every_gate
def test_one_loop_is_a_plain_transformer_whatever_the_gate(kv_gate):
    model = make_melt(kv_gate)
    per_loop = as_policy(model, kv_sharing="per_loop")
    ids = make_ids()
    assert model(ids, num_loops=1).logits.equal(per_loop(ids, num_loops=1).logits)
    assert stepwise(model, ids, (1,) * 7, num_loops=1).equal(stepwise(per_loop, ids, (1,) * 7, num_loops=1))


@torch.no_grad()
@every_gate
def test_latents_are_what_the_equation_says(kv_gate):
    """h_1 = x_1, then z h + (1 - z) x; convex, so that no channel leaves the range of its inputs (identity 7)."""
    model = make_melt(kv_gate, num_loops=4)
    inputs, latents = [], []
    layer = model.model.core[1]
    layer.register_forward_hook(lambda module, args, output: latents.append(output[1]))
    layer.input_layernorm.register_forward_hook(lambda module, args, output: inputs.append(output))
    model(make_ids())
    latent = None
    for loop, (x, got) in enumerate(zip(inputs, latents, strict=True)):
        if loop == 0:
            latent = x
        elif kv_gate in ("mean", "ema", "last"):
            z = {"mean": loop / (loop + 1), "ema": 0.2, "last": 0.0}[kv_gate]
            latent = z * latent + (1 - z) * x
        else:
            z = torch.sigmoid(layer.kv_gate.of_input(x) + layer.kv_gate.of_latent(latent))
            assert z.shape[-1] == (1 if kv_gate == "scalar" else 32)
            latent = z * latent + (1 - z) * x
        torch.testing.assert_close(got, latent, **FP32)
        highest = torch.stack(inputs[: loop + 1]).abs().amax(0)
        assert (got.abs() <= highest + 1e-5).all()


def test_a_mean_latent_is_the_mean():
    model = make_melt("mean", num_loops=4)
    inputs, latents = [], []
    layer = model.model.core[0]
    layer.register_forward_hook(lambda module, args, output: latents.append(output[1]))
    layer.input_layernorm.register_forward_hook(lambda module, args, output: inputs.append(output))
    model(make_ids())
    torch.testing.assert_close(latents[-1], torch.stack(inputs).mean(0), **FP32)


@pytest.mark.parametrize(
    ("kv_gate", "extra"), [("elementwise", 8256), ("low_rank", 4 * 64 * 4 + 64), ("scalar", 129), ("ema", 0)]
)
def test_gates_have_the_parameters_of_the_formula(kv_gate, extra):
    """2 D^2 + D per layer: 8,256 at 64, as the SMolLM and MELT notes count."""
    sizes = {"hidden_size": 64, "intermediate_size": 8, "kv_gate_rank": 4, "num_core_layers": 3}
    gated, plain = make_model(kv_sharing="gated", kv_gate=kv_gate, **sizes), make_model(**sizes)
    assert gated.num_parameters() - plain.num_parameters() == 3 * extra


def test_the_published_gates_have_201_million_parameters():
    with torch.device("meta"):
        model = make_model(
            kv_sharing="gated", hidden_size=2048, intermediate_size=8, num_attention_heads=16, num_core_layers=24
        )
    assert sum(p.numel() for n, p in model.named_parameters() if "kv_gate" in n) == 201_375_744


def test_fresh_gates_start_near_the_last_loop():
    model = make_melt(gates_open=False)
    x, latent = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    for layer in model.model.core:
        share = (layer.kv_gate(x, latent, 1) - x) / (latent - x)
        torch.testing.assert_close(share, torch.full_like(x, 0.047426), rtol=1e-2, atol=1e-3)


def test_learning_moves_the_gates():
    model = make_melt(gates_open=False, prefill_chunk=3).train()
    _, got = gradients(model, make_ids())
    gates = {name: gradient for name, gradient in got.items() if "kv_gate" in name}
    assert len(gates) == 2 * 3
    assert all(gradient.abs().sum() > 0 for gradient in gates.values())


def test_a_saved_model_loads_with_its_gates(tmp_path):
    model = make_melt(prefill_chunk=3)
    model.save_pretrained(tmp_path)
    loaded = LoopedForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.prefill_chunk == 3
    assert loaded(make_ids()).logits.equal(model(make_ids()).logits)


def test_a_copied_model_does_not_share_latents():
    """Nothing of a call stays on the model: two calls in turn equal the same calls on two copies."""
    model = make_melt()
    twin = copy.deepcopy(model)
    first = model(make_ids(seed=2)).logits
    assert model(make_ids(2, 4)).logits.equal(twin(make_ids(2, 4)).logits)
    assert model(make_ids(seed=2)).logits.equal(first)
