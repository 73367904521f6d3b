"""Attention of short heads is computed in float32 where a training on a CPU is in bfloat16, which is slow there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from toys import make_ids, make_model


class Attention(TorchDispatchMode):
    """Notes the precision in which attention runs, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func):
            self.seen |= {arg.dtype for arg in args if torch.is_tensor(arg) and arg.ndim == 4}
        return func(*args, **(kwargs or {}))


def trained(model, autocast: bool, **inputs) -> set[torch.dtype]:
    """The precisions of attention in a forward and backward pass."""
    with Attention() as attention:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(labels=inputs["input_ids"], use_cache=False, **inputs).loss
        loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    return attention.seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("position_embedding", ["rope", "none"])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("head_dim", [8, 24, 48, 64])
def test_short_heads_are_trained_in_float32(head_dim, autocast, position_embedding, padded):
    model = make_model(head_dim=head_dim, position_embedding=position_embedding).train()
    model = model if autocast else model.to(torch.bfloat16)
    ids = make_ids()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if padded else {})
    assert trained(model, autocast, **inputs) == {torch.float32 if head_dim < 48 else torch.bfloat16}


def test_nothing_else_changes():
    """In float32 attention was float32; without a gradient it stays bfloat16, whose forward pass alone is not slow, as
    do what layers return and what a prepared mask of bfloat16 means."""
    ids = make_ids()
    assert trained(make_model().train(), False, input_ids=ids) == {torch.float32}
    model = make_model().to(torch.bfloat16)
    with torch.no_grad(), Attention() as attention:
        model(ids)
    assert attention.seen == {torch.bfloat16}
    blocked = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bfloat16)
    blocked = blocked.masked_fill(torch.ones_like(blocked, dtype=torch.bool).triu(1), float("-inf"))
    prepared, causal = model(ids, attention_mask=blocked, use_cache=False), model(ids, use_cache=False)
    assert prepared.logits.dtype == torch.bfloat16
    torch.testing.assert_close(prepared.logits, causal.logits, atol=2e-2, rtol=0)
