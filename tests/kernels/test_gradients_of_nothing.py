"""A backward fills no zeros for a result that has no gradient, and gives none where it gets none."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from l2v_kernels import linear_cross_entropy
from l2v_kernels.attention.op import FusedAttention


class Ops(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket).removeprefix("aten.")] += 1
        return function(*args, **(kwargs or {}))


def filled(ops):
    return [name for name in ops.counts if "zero" in name or "fill" in name or "full" in name]


def test_attention_fills_no_gradient_of_lse(monkeypatch):
    pytest.importorskip("triton")
    from l2v_kernels.attention import launch

    monkeypatch.setattr(launch, "forward", lambda q, k, v, *_: (q * 2, q.new_ones(q.shape[1], q.shape[0])))
    monkeypatch.setattr(launch, "backward", lambda do, *_: (do * 2, do * 3, do * 5))
    q, k, v = (torch.randn(7, 2, 8, requires_grad=True) for _ in range(3))
    o, lse = FusedAttention.apply(q, k, v, None, None, None)
    assert not lse.requires_grad
    do = torch.randn_like(o)
    with Ops() as ops:
        found = torch.autograd.grad(o, (q, k, v), do)
    assert not filled(ops) and ops.counts["mul"] == 3
    assert all(torch.equal(x, do * n) for x, n in zip(found, (2, 3, 5), strict=True))


class Ignored(torch.autograd.Function):
    """The identity, whose backward has no gradient to give."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_result_without_a_gradient_gives_none(monkeypatch):
    pytest.importorskip("triton")
    from l2v_kernels.attention import launch

    monkeypatch.setattr(launch, "forward", lambda q, k, v, *_: (q * 2, q.new_ones(q.shape[1], q.shape[0])))
    monkeypatch.setattr(launch, "backward", lambda *_: pytest.fail("there is nothing to differentiate"))
    leaves = [torch.randn(7, 2, 8, requires_grad=True) for _ in range(3)]
    o, _ = FusedAttention.apply(*leaves, None, None, None)
    hidden, weight, labels = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4), torch.arange(5)
    loss, _ = linear_cross_entropy(hidden, weight, labels, count=1)
    (Ignored.apply(o).sum() + Ignored.apply(loss)).backward()
    assert all(x.grad is None or not x.grad.any() for x in (*leaves, hidden))


def test_cross_entropy_fills_no_gradient_of_the_hits():
    hidden, weight, labels = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4), torch.arange(5)
    loss, hits = linear_cross_entropy(hidden, weight, labels, count=1)
    assert not hits.requires_grad
    with Ops() as ops:
        (gradient,) = torch.autograd.grad(loss, hidden, torch.tensor(0.5))
    assert not filled(ops), ops.counts
    share = (hidden.detach() @ weight.T).softmax(1) - torch.nn.functional.one_hot(labels, 9)
    torch.testing.assert_close(gradient, 0.5 * share @ weight)
