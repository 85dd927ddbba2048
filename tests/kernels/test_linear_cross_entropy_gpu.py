"""Cross-entropy of a linear head on a GPU: against float64, memory, the same bits, and no wait for the device."""

import pytest
import torch

from l2v_kernels import linear_cross_entropy
from l2v_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(L, V, E, dtype, bias=False):
    hidden, weight = torch.randn(L, E, device="cuda"), torch.randn(V, E, device="cuda") * 3 / E**0.5
    labels = (hidden @ weight.T + 2 * torch.randn(L, V, device="cuda")).argmax(1)
    bias_V = torch.randn(V, device="cuda").to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), labels, bias_V


def results(given, dtype, op):
    """Loss, hits and gradient, computed in dtype."""
    hidden, weight, labels, bias = (None if x is None else x if x.dtype == torch.int64 else x.to(dtype) for x in given)
    hidden = hidden.detach().requires_grad_()
    loss, hits = op(hidden, weight, labels, bias)
    return loss.detach().double(), hits, torch.autograd.grad(loss, hidden)[0].double()


def definition(hidden, weight, labels, bias):
    losses, hits = linear_cross_entropy_reference(hidden, weight, labels, bias)
    return losses.sum(), hits.sum()


def ours(hidden, weight, labels, bias, **more):
    return linear_cross_entropy(hidden, weight, labels, bias_V=bias, count=1, **more)


@pytest.mark.parametrize("workspace", [768 << 20, 3 << 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("L", "V", "E"), [(1, 1, 1), (7, 203, 33), (300, 4096, 64), (513, 32003, 576), (257, 49152, 1024)]
)
def test_equals_float64(L, V, E, dtype, bias, workspace):
    given = problem(L, V, E, dtype, bias)
    want, same_dtype = results(given, torch.float64, definition), results(given, dtype, definition)
    got = results(given, dtype, lambda *x: ours(*x, workspace=workspace))
    for mine, exact, other in zip(got[::2], want[::2], same_dtype[::2], strict=True):
        bar = 2 * (other - exact).abs().max() + 1e-5 * exact.abs().max().clamp(min=1e-3)
        assert (mine - exact).abs().max() <= bar
    # Logits are summed and kept in fp32, so the loss and the largest logit are exact in any dtype.
    torch.testing.assert_close(got[0], want[0], rtol=2e-5, atol=1e-5)
    assert (got[1] - want[1]).abs() <= 1


def test_the_same_bits_every_time():
    given = problem(700, 32000, 256, torch.bfloat16)
    first, *others = (results(given, torch.bfloat16, lambda *x: ours(*x, workspace=16 << 20)) for _ in range(3))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_nothing_waits_for_the_device():
    hidden, weight, labels, _ = problem(300, 32000, 256, torch.bfloat16)
    count = torch.tensor(300.0, device="cuda")
    ours(hidden.requires_grad_(), weight, labels, None)[0].backward()  # compiles
    labels[5] = 32000  # and nobody looks at the labels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, hits = linear_cross_entropy(hidden, weight, labels, count=count)
        loss.backward()
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels, count=count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isnan() and 0 <= hits <= 299
    assert hidden.grad[5].isnan().all() and hidden.grad[torch.arange(300) != 5].isfinite().all()


def test_labels_are_looked_at_where_asked(monkeypatch):
    hidden, weight, labels, _ = problem(5, 100, 16, torch.bfloat16)
    labels[2] = -1
    monkeypatch.setenv("L2V_CHECK", "1")
    with pytest.raises(ValueError, match=r"labels\[2\] is -1 and the head has 100 rows"):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("gradient", [True, False])
def test_memory_beyond_the_inputs_is_the_workspace_and_two_gradients(gradient):
    L, V, E = 4096, 128256, 1024
    hidden = torch.randn(L, E, device="cuda", dtype=torch.bfloat16, requires_grad=gradient)
    weight = torch.randn(V, E, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(V, (L,), device="cuda")

    def step():
        loss, _ = linear_cross_entropy(hidden, weight, labels, workspace=256 << 20)
        if gradient:
            loss.backward()

    step()
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    # The logits would be 1 GiB in bf16.
    assert extra <= (256 << 20) + 2 * L * E * 2 + (4 << 20)
