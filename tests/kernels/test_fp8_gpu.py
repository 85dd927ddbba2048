"""FP8 on a GPU that multiplies it: the compiled kernels against the reference, tensor cores against the emulation."""

import pytest
import torch
from test_fp8 import SIZES, hard_rows, problem, rows, same_bytes

from l2v_kernels.fp8 import Fp8Linears, Fp8Weight, obstacle, quantize_rows
from l2v_kernels.fp8.matmul import scaled_matmul
from l2v_kernels.fp8.reference import power_of_two, quantize_rows_reference
from l2v_kernels.lora_linear import Adapter, InputDropout, lora_linear

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and obstacle(torch.device("cuda")) is not None, reason="this GPU has no FP8"
    ),
]

LLAMA = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
"""[outputs, inputs] of q, k, v, of o, of gate and up, and of down."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (999, 4096), (33, 16384), (301, 28672), (7, 16385)], ids=str)
@pytest.mark.parametrize("factors", [False, True])
def test_bytes_are_those_of_the_reference(shape, factors, dtype):
    x = rows(*shape, dtype).cuda()
    factors_K = power_of_two(torch.randint(-30, 5, shape[1:])).cuda() if factors else None
    q, scale = quantize_rows(x, factors_K)
    # On the CPU: another implementation of the cast as well.
    want_q, want_scale = quantize_rows_reference(x.cpu(), None if factors_K is None else factors_K.cpu())
    assert same_bytes(q.cpu(), want_q) and torch.equal(scale.cpu(), want_scale)
    there_q, there_scale = quantize_rows_reference(x, factors_K)
    assert same_bytes(q, there_q) and torch.equal(scale, there_scale)


@pytest.mark.parametrize("width", [1, 200])
def test_hard_numbers_and_rows_that_are_not_finite(width):
    x = hard_rows().repeat(1, width)
    x = torch.cat([x, x, x]).cuda()
    x[2, 3], x[4, 5] = float("nan"), -float("inf")
    q, scale = quantize_rows(x)
    want_q, want_scale = quantize_rows_reference(x.cpu())
    assert same_bytes(q.cpu(), want_q) and torch.equal(scale.cpu().nan_to_num(7), want_scale.nan_to_num(7))


def weight_of(N, K):
    torch.manual_seed(1)
    return Fp8Weight.of(
        [(torch.randn(N, K, device="cuda") * torch.randn(N, 1, device="cuda").exp() * K**-0.5).bfloat16()]
    )


@pytest.mark.parametrize("T", [1, 17, 1000])
@pytest.mark.parametrize(("N", "K"), LLAMA)
def test_tensor_cores_against_the_emulation(N, K, T):
    """Forward and gradient of every matmul of a Llama-3-8B layer: one rounding to bf16 apart, of sums of fp32 in two orders."""
    weight = weight_of(N, K)
    x, dy = (torch.randn(T, n, device="cuda").bfloat16() for n in (K, N))
    found, emulated = (Fp8Linears(weight, [N], emulate=e) for e in (False, True))
    for got, want in ((found.matmul(x), emulated.matmul(x)), (found.input_gradient(dy), emulated.input_gradient(dy))):
        assert got.dtype == torch.bfloat16 and got.shape == want.shape
        # Half a unit in the last place each, and what fp32 sums of the tensor cores lose to those of the vector units.
        bar = torch.finfo(torch.bfloat16).eps * want.float().abs() + 1e-3 * want.float().abs().max()
        assert ((got.float() - want.float()).abs() <= bar).all()


def test_the_bias_is_added_before_rounding():
    weight, x = weight_of(64, 32), torch.randn(5, 32, device="cuda").bfloat16()
    bias = torch.randn(64, device="cuda").bfloat16()
    q, scale = quantize_rows(x)
    got, want = (
        scaled_matmul(q, scale, weight.rows_OE, weight.scale_O, bias, torch.bfloat16, emulate=e) for e in (False, True)
    )
    torch.testing.assert_close(got, want, rtol=8e-3, atol=1e-3)


def test_a_token_sees_no_other():
    weight = weight_of(4096, 4096)
    x = torch.randn(64, 4096, device="cuda").bfloat16()
    linears = Fp8Linears(weight, [4096])
    want, want_dx = linears.matmul(x), linears.input_gradient(x)
    x[5] *= 1000
    for got, before in ((linears.matmul(x), want), (linears.input_gradient(x), want_dx)):
        same = (got == before).all(1)
        assert not same[5] and same[:5].all() and same[6:].all()


def test_lora_on_tensor_cores_and_on_the_emulation_without_a_host_sync():
    x, adapters, keys = problem(torch.bfloat16, tokens=300)
    weight = Fp8Weight.of([torch.randn(n, 48, device="cuda").bfloat16() for n in SIZES])
    keys = InputDropout(keys.p, keys.seeds_T.cuda(), keys.rows_T.cuda())
    dy = torch.randn(300, 64, device="cuda").bfloat16()

    # Outside of what runs without a host sync: a copy from pageable memory waits for the device.
    leaf = x.detach().cuda().requires_grad_()
    on = [
        Adapter(a.part, *(m.detach().cuda().requires_grad_() for m in (a.a_RE, a.b_OR)), a.scaling, a.stream)
        for a in adapters
    ]

    def run(emulate):
        y = lora_linear(leaf, Fp8Linears(weight, SIZES, emulate=emulate), on, keys)
        leaves = [leaf, *(m for a in on for m in (a.a_RE, a.b_OR))]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    first = run(False)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for got, want in zip(first, run(True), strict=True):
        assert (got.float() - want.float()).abs().max() <= 1.5e-2 * want.float().abs().max()


def test_more_than_two_to_the_31_elements():
    x = torch.zeros(76_000, 28672, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-3:] = torch.randn(3, 28672, device="cuda").bfloat16()
    last = quantize_rows(x[-3:].clone())
    for shape in ((-1, 28672), (-1, 4096)):
        q, scale = quantize_rows(x.view(shape))
        if shape[1] == 28672:
            assert same_bytes(q[-3:], last[0]) and torch.equal(scale[-3:], last[1])
        assert same_bytes(q[-1:], quantize_rows(x.view(shape)[-1:].clone())[0]) and not q[:1000].float().any()
