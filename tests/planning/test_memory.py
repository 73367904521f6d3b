"""Bytes of a plan against bytes that are counted: those that autograd saves, optimizers hold and processes send."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looplab.planning.memory import (
    CORNERS,
    Kept,
    Work,
    count_kept,
    count_weights,
    data_parallel,
    forward,
    saved,
    sharded,
)
from looplab.training.optimizers import build_optimizers
from looplab.training.recipe import read_recipe
from modeling_looped import LoopedForCausalLM
from modeling_looped.cache_looped import SHARINGS
from modeling_looped.connections_looped import CONNECTIONS
from modeling_looped.layers_looped import LoopedLayer
from toys import ROOT, make_config

NOTHING = Kept(1, dict.fromkeys(CORNERS, 0), dict.fromkeys(CORNERS, 0), casts=0)
SANDWICH = {"norm_placement": "sandwich"}
CONFIGS = {
    **{f"connection {name}": {"loop_connection": name, "max_num_loops": 6} for name in CONNECTIONS},
    **{f"KV {name}": {"kv_sharing": name} | (SANDWICH if name == "gated" else {}) for name in SHARINGS},
    "sections": {"num_prelude_layers": 1, "num_core_layers": 3, "num_coda_layers": 2},
    "one core layer": {"num_core_layers": 1},
    "exit gate": {"exit_gate": True},
    "learned positions": {"position_embedding": "learned"},
    "layernorm": {"norm_type": "layernorm", "gated_mlp": False},
    "loops have vectors": {"loop_embedding": "learned", "max_num_loops": 6},
}


def recipe_of(*flags: str):
    return read_recipe(ROOT / "recipes" / "smoke_text.yaml", flags)


CASES = [("bf16", name) for name in CONFIGS] + [("fp32", "connection hyper"), ("fp32", "sections")]


@pytest.mark.parametrize(("precision", "name"), CASES, ids=[", ".join(case) for case in CASES])
def test_what_is_kept_is_what_autograd_saves(precision, name):
    """Of rows, loops and layers that the plan did not run, bit for bit."""
    config, recipe = make_config(**CONFIGS[name]), recipe_of(f"--precision={precision}")
    kept = count_kept(recipe, config, tokens=24, logits=0)
    model = LoopedForCausalLM(config).train()
    # The table of learned positions, which the plan leaves out, keeps the numbers of the positions.
    positions = 24 * 8 if config.position_embedding == "learned" else 0
    counted = forward(recipe, model, rows=3, tokens=24, loops=5, logits=0)
    assert kept[False].saved(rows=3, loops=5) + positions == counted["activations"]
    assert kept[False].casts == counted["casts"]
    assert (counted["casts"] > 0) == (precision == "bf16")
    model.activation_checkpointing_enable()
    counted = forward(recipe, model, rows=3, tokens=24, loops=5, logits=0)
    assert kept[True].saved(rows=3, loops=5) + positions == counted["activations"]


@pytest.mark.parametrize("num_grad_loops", [1, 2])
def test_only_loops_that_are_differentiated_keep_something(num_grad_loops):
    """What comes before them keeps nothing either, which the plan does not know."""
    config, recipe = make_config(), recipe_of(f"--num_grad_loops={num_grad_loops}")
    kept = count_kept(recipe, config, tokens=24, logits=1)[False]
    model = LoopedForCausalLM(config).train()
    with saved(model) as counted:
        model(torch.zeros(3, 24, dtype=torch.long), num_loops=5, num_grad_loops=num_grad_loops, use_cache=False)
    assert counted["activations"] <= kept.saved(rows=3, loops=num_grad_loops) < 1.1 * counted["activations"]


def test_a_layer_that_is_computed_again_is_there_for_a_moment():
    """As much as a layer keeps where it is not computed again."""
    kept = count_kept(recipe_of(), make_config(num_core_layers=3), tokens=24, logits=0)
    layer = (kept[False].saved(2, 6) - kept[False].saved(2, 5)) / 3
    assert kept[True].activations(2, 5) - kept[True].saved(2, 5) == layer
    assert kept[False].activations(2, 5) == kept[False].saved(2, 5) > 2 * kept[True].saved(2, 5)


OPTIMIZED = {
    "plain": {},
    "KV gates": {"kv_sharing": "gated"} | SANDWICH,
    "exit gate, untied": {"exit_gate": True, "tie_word_embeddings": False},
    "streams": {"loop_connection": "hyper", "max_num_loops": 3},
}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["full", "core"])
@pytest.mark.parametrize("fields", OPTIMIZED.values(), ids=OPTIMIZED)
def test_weights_gradients_and_optimizer_are_what_they_hold(fields, what, kind):
    config, recipe = make_config(**fields), recipe_of(f"--optim.kind={kind}")
    recipe = replace(recipe, train=replace(recipe.train, what="full"))
    recipe.train.what = what
    weights = count_weights(recipe, config)
    model = LoopedForCausalLM(config).train()
    if what == "core":
        for name, parameter in model.named_parameters():
            of_loop = ("model.core.", "model.connection", "model.exit_gate")
            parameter.requires_grad_(name.startswith(of_loop) or ".kv_gate." in name)
    optimizers = build_optimizers(model, recipe.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
    state = [optimizer.state_dict()["state"] for optimizer in optimizers]
    held = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
    process = data_parallel(recipe, weights, NOTHING, Work(1, 1, 1.0, 0), count=1)
    assert process.held["optimizer"] == held
    assert process.held["weights"] == sum(p.nbytes for p in model.parameters())
    assert process.held["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


class Collected(TorchDispatchMode):
    """Within the block, adds up the bytes of the tensors that collectives make of all processes' parts."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::"):
            self.bytes += max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def eight():
    """This process is one of eight, which send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_processes_send_what_their_collectives_move(eight, precision, steps, loops):
    """FSDP2 gathers a layer again in the backward pass of every loop but the last: it frees it after each."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
    config = make_config(**sizes, num_prelude_layers=1, num_core_layers=2)
    recipe = recipe_of(f"--precision={precision}", f"--accumulation_steps={steps}", "--optim.kind=adamw")
    model = LoopedForCausalLM(config).train()
    narrow = torch.bfloat16 if precision == "bf16" else None
    settings = {"mesh": eight, "reshard_after_forward": False}
    settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=narrow)
    for layer in [module for module in model.modules() if isinstance(module, LoopedLayer)]:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with Collected() as collected:
        for step in range(steps):
            model.set_requires_gradient_sync(step == steps - 1)
            model(ids, labels=ids, num_loops=loops, use_cache=False).loss.backward()
    process = sharded(recipe, count_weights(recipe, config), NOTHING, Work(1, loops, loops, 0), count=8)
    # In a micro-batch whose gradients are not sent, FSDP2 fetches the layer that comes first once too often.
    beyond = collected.bytes * 7 // 8 - process.sent
    assert beyond == (steps - 1) * (loops > 1) * first_layer(model, precision) * 7 // 8


def first_layer(model, precision: str) -> int:
    """Bytes of the first layer."""
    return sum(p.numel() for p in model.model.core[0].parameters()) * (2 if precision == "bf16" else 4)


def test_data_parallel_processes_send_each_gradient_twice_around_the_ring(eight):
    config, recipe = make_config(), recipe_of("--optim.kind=adamw")
    model = torch.nn.parallel.DistributedDataParallel(LoopedForCausalLM(config).train())
    sizes = []

    def note(_, bucket):
        sizes.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, note)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, labels=ids, use_cache=False).loss.backward()
    process = data_parallel(recipe, count_weights(recipe, config), NOTHING, Work(1, 1, 1.0, 0), count=8)
    assert process.sent == 2 * sum(sizes) * 7 // 8
    assert process.held["gradients"] == 2 * sum(sizes)  # and the buckets
