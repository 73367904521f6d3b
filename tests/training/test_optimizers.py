"""The optimizers of a run: Muon's numbers and state are those of torch, whatever it does at once."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from looplab.training.muon import Muon

# Matrices of models: square, wide and tall ones, some alike, some alike when turned, one alone. None is smaller
# than 32 x 32: there torch multiplies a stack by another kernel, and one number in a hundred thousand is rounded to
# the bfloat16 beside it.
SHAPES = {
    "alike": [(32, 32)] * 4,
    "gated MLP": [(32, 32), (88, 32), (88, 32), (32, 88)],
    "grouped heads": [(128, 128), (32, 128), (32, 128), (200, 128), (128, 200)],
    "none alike": [(37, 50), (50, 51), (64, 33)],
    "one": [(40, 170)],
}


def made(shapes) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def give_gradients(matrices, step: int, scale: float) -> None:
    """The second matrix gets a gradient in every other step only, as parameters of loops that a batch does not run."""
    draw = torch.Generator().manual_seed(step)
    for index, matrix in enumerate(matrices):
        gradient = scale * torch.randn(matrix.shape, generator=draw)
        matrix.grad = None if index == 1 and step % 2 else gradient


@pytest.mark.parametrize("scale", [1e-3, 1.0, 0.0])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_muon_is_that_of_torch_bit_for_bit(shapes, scale):
    """Weights and state, with a rate that changes; and either goes on from the checkpoint of the other."""
    ours, theirs = made(shapes), made(shapes)
    fast = Muon(ours, lr=0.02, weight_decay=0.1)
    slow = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for step in range(6):
        if step == 3:
            fast_state, slow_state = fast.state_dict(), slow.state_dict()
            fast, slow = Muon(ours, lr=1.0, weight_decay=0.0), torch.optim.Muon(theirs, lr=1.0, weight_decay=0.0)
            fast.load_state_dict(slow_state)
            slow.load_state_dict(fast_state)
        for matrices, optimizer in ((ours, fast), (theirs, slow)):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            give_gradients(matrices, step, scale)
            optimizer.step()
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    assert fast.state_dict()["param_groups"] == slow.state_dict()["param_groups"]


def test_matrices_of_a_shape_are_orthogonalized_at_once():
    """Twelve matrices of two shapes, some of them turned, take the products of two matrices."""
    counts = {}
    for name, kind in (("ours", Muon), ("theirs", torch.optim.Muon)):
        matrices = made([(8, 8), (24, 8), (8, 24)] * 4)
        give_gradients(matrices, 0, 1.0)
        with torch.profiler.profile() as profile:
            kind(matrices, lr=0.02, weight_decay=0.1).step()
        products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
        counts[name] = sum(event.count for event in profile.key_averages() if event.key in products)
    assert counts["ours"] == 2 * 5 * 3
    assert counts["theirs"] >= 12 * 5 * 3


class Received(TorchDispatchMode):
    """Bytes that this process receives from the others in collectives."""

    def __init__(self, world: int):
        super().__init__()
        self.world, self.bytes = world, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        if function is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.bytes += result.numel() * result.element_size() * (self.world - 1) // self.world
        assert "reduce" not in str(function)
        return result


@pytest.mark.parametrize("world", [2, 8])
def test_sharded_matrices_are_gathered_once_in_bfloat16(world):
    """2 (W - 1) / W bytes per element. The processes are torch's fake ones, which send nothing."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (world,))
        matrices = made([(32, 32), (64, 32), (32, 64)])
        shards = [torch.nn.Parameter(distribute_tensor(m.detach(), mesh, [Shard(0)])) for m in matrices]
        for shard in shards:
            shard.grad = torch.ones_like(shard.detach())
        optimizer = Muon(shards, lr=0.02, weight_decay=0.1)
        with Received(world) as received:
            optimizer.step()
        assert received.bytes == 2 * sum(matrix.numel() for matrix in matrices) * (world - 1) // world
    finally:
        dist.destroy_process_group()
