"""How the state moves: against the model's own states, the whole Jacobian, and a map whose answer is known."""

import json

import pytest
import torch

from looplab.cli import main
from looplab.instruments.dynamics import LoopMap, dynamics, dynamics_rows
from toys import make_model

# torch's own, when forward derivatives are first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
SHAPES = {
    "plain": {},
    "injected": {"loop_connection": "inject_add", "norm_between_loops": True, "sliding_window": 2},
    "sections": {"loop_connection": "inject_concat", "num_prelude_layers": 1, "num_coda_layers": 1},
    "streams": {"loop_connection": "hyper", "hyper_gates": "shared", "loop_embedding": "sinusoidal"},
    "damped": {"loop_connection": "damped"},
    "disco": {"loop_connection": "disco"},
    "gated": {"kv_sharing": "gated"},
    "first": {"kv_sharing": "first"},
    "noise": {"loop_connection": "inject_add", "state_init": "normal"},
}
IDS = torch.tensor([[5, 3, 8, 2, 7], [1, 4, 4, 6, 2]])


def shaken(**fields):
    """A toy whose weights are far from its first ones, so that no residual is closed."""
    model = make_model(**fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_loops", [1, 4])
def test_the_map_goes_where_the_model_goes(shape, num_loops):
    model, seen = shaken(**SHAPES[shape]), []
    logits = model(IDS, num_loops=num_loops, use_cache=False, observe=lambda rows, state: seen.append(state)).logits
    loop_map = LoopMap(model, IDS, num_loops)
    state = loop_map.state
    for loop in range(num_loops):
        state = loop_map(state, loop)
        assert torch.equal(model.model.connection.close(state), seen[loop])
    best = logits[:, -1].topk(2).values
    assert torch.allclose(dynamics(model, IDS, num_loops)[-1]["margin"], best[:, 0] - best[:, 1], atol=1e-6)


@pytest.mark.parametrize("shape", ["plain", "injected", "sections", "streams", "damped", "disco"])
def test_the_radius_is_that_of_the_whole_jacobian(shape):
    model = shaken(hidden_size=16, num_attention_heads=2, **SHAPES[shape])
    model.double()
    found = dynamics(model, IDS, 3)
    for row in (0, 1):
        loop_map = LoopMap(model, IDS[row : row + 1], 3)
        state = loop_map(loop_map.state, 0).detach()
        whole = torch.autograd.functional.jacobian(lambda h, to=loop_map: to(h, 1), state)
        radius = torch.linalg.eigvals(whole.view(state.numel(), -1)).abs().max()
        assert found[0]["radius"][row].item() == pytest.approx(radius.item(), rel=0.02)
    assert found[-1]["radius"].isnan().all()  # no loop follows


def test_steps_angles_and_radius_of_a_loop_that_is_known():
    """A loop that turns the first two dimensions by a right angle, and forgets the others."""
    model = make_model()
    turn = torch.zeros(model.config.hidden_size, model.config.hidden_size)
    turn[0, 1], turn[1, 0] = 1, -1
    model.model.run_loop = lambda state, embeds, context, loop: state @ turn
    model.model.connection.open = lambda start, embeds: torch.eye(model.config.hidden_size)[:1, None]
    found = dynamics(model, IDS[:1, :1], 3)
    assert [each["step"].item() for each in found] == pytest.approx([2**0.5] * 3)
    assert [each["angle"].item() for each in found[:2]] == pytest.approx([90.0] * 2)
    assert [each["radius"].item() for each in found[:2]] == pytest.approx([1.0] * 2)
    assert found[2]["angle"].isnan().all()


def test_no_radius_where_a_loop_reads_what_others_left():
    for shape in ("gated", "first"):
        rows = dynamics_rows(shaken(**SHAPES[shape]), {"toys": [IDS]}, 3)
        assert {row["radius"] for row in rows} == {None}
        assert all(row["step"] > 0 for row in rows)


@pytest.mark.parametrize("task", ["hops", "text", "molecules"])
def test_every_task_has_rows_to_watch(task, trained, tmp_path):
    run = trained.copy(tmp_path, task)
    assert main(["dynamics", str(run), "--loops", "2", "--limit", "2"]) == 0
    rows = [json.loads(line) for line in (run / "dynamics.jsonl").read_text().splitlines()]
    assert [row["loops"] for row in rows] == [1, 2] * (len(rows) // 2)
    assert (run / "figures" / "dynamics.png").is_file()
