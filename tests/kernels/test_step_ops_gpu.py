"""rms_norm, swiglu and segment_pool on a GPU: bf16, the compiled kernels, full sizes, no host sync."""

import pytest
import torch
from support.step_cases import check_rms_norm, check_segment_pool, check_swiglu

from l2v_kernels.rms_norm import op, rms_norm
from l2v_kernels.segment_pool import segment_pool
from l2v_kernels.swiglu import op as swiglu_op
from l2v_kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (5, 575), (999, 4096), (301, 5120), (33, 16384), (257, 32, 128)], ids=str)
def test_rms_norm(shape, residual, dtype):
    check_rms_norm(shape, dtype, residual, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "F"), [(1, 1), (5, 33), (513, 14336), (0, 8)])
def test_swiglu(T, F, dtype):
    check_swiglu(T, F, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("E", [37, 576, 4096, 16384])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 30, 0, 32, 33, 5], [0, 5000, 64, 2]], ids=["short", "long"])
def test_segment_pool(lengths, E, norm, dtype):
    check_segment_pool(lengths, E, dtype, norm, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_gives_the_same_bits_again(dtype):
    x, delta = (torch.randn(513, 4096, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.randn(4096, device="cuda", dtype=dtype)
    total, y, rstd = op.forward(x, weight, 1e-6, delta)
    assert torch.equal(total, x + delta) and torch.equal(op.normalize(total, rstd, weight), y)


def test_no_host_sync_and_the_same_bits_twice():
    T, E = 2000, 1024
    x, gate_up = torch.randn(T, E, device="cuda"), torch.randn(T, 2 * E, device="cuda")
    weight, weights = torch.randn(E, device="cuda"), torch.rand(T, device="cuda")
    cu = torch.tensor([0, 30, 30, 1500, T], device="cuda", dtype=torch.int32)

    def run():
        leaves = [t.detach().requires_grad_() for t in (x, weight, gate_up)]
        total, y = rms_norm(leaves[0], leaves[1], 1e-6, leaves[0])
        product = swiglu(leaves[2]) + y
        vectors = segment_pool(product + total, weights, cu, leaves[1])
        return [vectors.detach(), *torch.autograd.grad(vectors.square().sum(), leaves)]

    first = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_more_than_two_to_the_31_elements():
    T, F = 76_000, 14336
    gate_up = torch.zeros(T, 2 * F, device="cuda", dtype=torch.bfloat16)
    assert gate_up.numel() > 2**31
    gate_up[-3:] = torch.randn(3, 2 * F, device="cuda", dtype=torch.bfloat16)
    last = gate_up[-3:].clone()
    product = swiglu_op.forward(gate_up)
    assert torch.equal(product[-3:], swiglu_op.forward(last)) and not product[:-3].any()
    dproduct = product.fill_(1)
    want = swiglu_op.backward(dproduct[-3:], last)
    assert torch.equal(swiglu_op.backward(dproduct, gate_up, gate_up)[-3:], want)
    # The same memory as rows of a norm and of a pool; the last token is a segment of its own.
    x, weight = gate_up.view(-1, 4096), torch.ones(4096, device="cuda")
    total, y, rstd = op.forward(x, weight, 1e-6)
    alone = op.forward(x[-3:].clone(), weight, 1e-6)
    assert torch.equal(y[-3:], alone[1])
    dx = op.backward(y, total, rstd, weight, out=y)
    assert torch.equal(dx[-3:], op.backward(alone[1], *alone[::2], weight))
    weights = torch.ones(len(x), device="cuda")
    cu = torch.tensor([0, len(x) - 1, len(x)], device="cuda")
    vectors = segment_pool(x, weights, cu, weight)
    torch.testing.assert_close(vectors[1:], segment_pool(x[-1:], weights[-1:], cu[:2].clamp(max=1), weight))
