"""DDP has to know whether an update may leave parameters without a gradient."""

import pytest
import torch

from looplab.training.model import may_lack_gradients
from looplab.training.objectives import ExitLoss, LabelLoss
from looplab.training.recipe import build_recipe
from toys import make_model

HYPER = {"loop_connection": "hyper", "num_streams": 2}


def make_recipe(**fields):
    return build_recipe({"name": "run", "model": {}, "max_steps": 1, "depth": {"kind": "fixed", "mean": 2}} | fields)


@pytest.mark.parametrize(
    ("config", "fields", "lacks"),
    [
        ({}, {}, False),
        ({"kv_sharing": "last"}, {}, False),
        ({}, {"num_grad_loops": 1}, True),
        (HYPER | {"hyper_gates": "shared"}, {}, False),
        (HYPER, {}, True),
        ({"kv_sharing": "gated"}, {}, True),
        ({"exit_gate": True, "exit_loss": "gate"}, {}, True),
    ],
)
def test_ddp_knows_whether_parameters_may_have_no_gradient(config, fields, lacks):
    """Of one loop and of as many as the model has."""
    recipe, model = make_recipe(**fields), make_model(num_loops=2, num_prelude_layers=1, **config)
    objective = (ExitLoss if model.config.exit_gate else LabelLoss)(recipe, 0)
    ids, without = torch.arange(1, 13).view(2, 6), set()
    for num_loops in (1, 2):
        model.zero_grad(set_to_none=True)
        objective(model, {"input_ids": ids}, ids + 1, num_loops, 0.0).backward()
        without |= {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert bool(without) == lacks, without
    assert may_lack_gradients(recipe, model.config) == lacks
