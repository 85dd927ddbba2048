import importlib.util

import pytest
import torch
from support.step_cases import poisoned

from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.fp8 import Fp8Linears, Fp8Weight, matmul, obstacle, quantize_rows
from l2v_kernels.fp8.reference import power_of_two, scaled_matmul_reference
from l2v_kernels.lora_linear import Adapter, InputDropout, Linears, lora_linear, op

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (32, 16, 16)


def every_number():
    """All finite numbers of e4m3 from 0 up, fp64."""
    return torch.arange(127, dtype=torch.uint8).view(E4M3).double()


def rows(T, K, dtype=torch.float32, seed=0):
    """Numbers over 15 powers of ten, rows of very different size, some of them zero."""
    torch.manual_seed(seed)
    x = torch.randn(T, K) * (4 * torch.randn(T, K)).exp() * (3 * torch.randn(T, 1)).exp()
    x[:, ::7] = 0
    return x.clamp(-6e4, 6e4).to(dtype)


def same_bytes(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def hard_rows():
    """fp32 rows that begin with 448, so that their scale is 1: all that lies exactly between two numbers of e4m3, and what
    lies next to it on either side; and what is below the smallest."""
    numbers = every_number()
    between = ((numbers[1:] + numbers[:-1]) / 2).float()
    above, below = (torch.nextafter(between, torch.tensor(x)) for x in (1e9, -1.0))
    tiny = torch.tensor([2.0**-10, 2.0**-11, 1e-20, 1e-45, 0.0])
    half = torch.cat([torch.tensor([448.0]), numbers.float(), between, above, below, tiny])
    return torch.stack([half, -half])


def nearest(x, numbers):
    """By search, fp64: the nearest number, of two equally near the one whose last bit is 0."""
    at = torch.searchsorted(numbers, x.abs().contiguous()).clamp(1, len(numbers) - 1)
    low, high = numbers[at - 1], numbers[at]
    up = (high - x.abs() < x.abs() - low) | ((high - x.abs() == x.abs() - low) & (at % 2 == 0))
    return torch.where(up, high, low) * x.sign()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_the_nearest_under_the_smallest_scale(dtype):
    x = rows(40, 96, dtype)
    q, scale = quantize_rows(x)
    assert q.dtype == E4M3 and q.shape == x.shape and q.is_contiguous() and scale.dtype == torch.float32
    assert torch.equal(scale, scale.double().log2().round().exp2().float())
    largest = x.double().abs().amax(1)
    assert (largest <= 448 * scale.double()).all() and (largest > 224 * scale.double()).all()
    want = nearest(x.double() / scale.double()[:, None], every_number())
    assert torch.equal(q.double(), want)


def test_ties_go_to_even():
    x = hard_rows()
    q, scale = quantize_rows(x)
    assert torch.equal(scale, torch.ones(2))
    assert torch.equal(q.double(), nearest(x.double(), every_number()))


@pytest.mark.parametrize("exponent", [-149, -140, -126, -120, 0, 100, 127])
def test_rows_of_any_size(exponent):
    """To the ends of fp32: below its normal numbers the scale ends at 2^-126 and nothing is larger than 448 of it."""
    x = torch.tensor([[1.0, -0.75, 0.375, 0.0]]) * 2.0**exponent
    q, scale = quantize_rows(x)
    assert scale.item() == 2.0 ** max(exponent - 8, -126)
    if exponent >= -126:
        assert torch.equal(q.float() * scale, x)
    assert (q.float() * scale - x).abs().max() <= scale.item() * 2.0**-10


def test_rows_of_zeros():
    q, scale = quantize_rows(torch.zeros(2, 8))
    assert not q.float().any() and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_not_made_finite(bad):
    """The other rows are not affected; a matmul of the row is NaN in every column."""
    x = rows(5, 32)
    want = quantize_rows(x)
    x[2, 7] = bad
    q, scale = quantize_rows(x)
    others = torch.arange(5) != 2
    assert same_bytes(q[others], want[0][others]) and torch.equal(scale[others], want[1][others])
    assert scale[2].isnan() and not q[2].float().any()
    linears = Fp8Linears(Fp8Weight.of([torch.randn(16, 32)]), [16], emulate=True)
    assert linears.matmul(x).isfinite().all(1).equal(others)


def test_factors_are_exact():
    x, factors = rows(9, 64, torch.bfloat16), power_of_two(torch.randint(-20, 5, (64,)))
    q, scale = quantize_rows(x, factors)
    want_q, want_scale = quantize_rows(x.float() * factors)
    assert same_bytes(q, want_q) and torch.equal(scale, want_scale)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (1, 1)], ids=str)
def test_few_numbers(shape):
    q, scale = quantize_rows(torch.ones(shape))
    assert q.shape == shape and scale.shape == shape[:1] and scale.isfinite().all()


def weights(dtype=torch.bfloat16, width=48, seed=1):
    """Rows of very different size, which is what the scales are for."""
    torch.manual_seed(seed)
    return [(torch.randn(n, width) * torch.randn(n, 1).exp() * width**-0.5).to(dtype) for n in SIZES]


def test_a_weight_is_its_rows_twice():
    found = Fp8Weight.of(weights())
    assert found.rows_OE.shape == (64, 48) and found.columns_EO.shape == (48, 64)
    assert found.rows_OE.is_contiguous() and found.columns_EO.is_contiguous()
    assert same_bytes(found.columns_EO, found.rows_OE.view(torch.uint8).t().contiguous().view(E4M3))
    whole, values = torch.cat(weights()).float(), found.dequantized()
    assert torch.equal(values, values.bfloat16().float())  # bf16 holds them exactly
    assert 0.02 < ((values - whole).norm() / whole.norm()).item() < 0.03
    assert found.scale_O.shape == (64,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_numbers(dtype, bias):
    weight = Fp8Weight.of(weights())
    bias_N = torch.randn(64).to(dtype) if bias else None
    linears = Fp8Linears(weight, SIZES, bias_N, emulate=True)
    x, dy = torch.randn(21, 48).to(dtype), torch.randn(21, 64).to(dtype)
    exact_W = weight.dequantized().double()

    def rounded(z, factors=None):
        q, scale = quantize_rows(z, factors)
        return q.double() * scale.double()[:, None]

    y, dx = linears.matmul(x), linears.input_gradient(dy)
    want_y = rounded(x) @ exact_W.t() + (0 if bias_N is None else bias_N.double())
    want_dx = rounded(dy, weight.scale_O) @ weight.rows_OE.double()
    for got, want in ((y, want_y), (dx, want_dx)):
        assert got.dtype == dtype and got.shape == want.shape
        bar = (torch.finfo(dtype).eps / 2 + 1e-6) * want.abs().max()
        assert (got.double() - want).abs().max() <= bar
    # And those are near the exact ones, though not as near as bf16.
    for got, want in ((y, x.double() @ torch.cat(weights()).double().t()), (dx, dy.double() @ exact_W)):
        error = (
            (got.double() - want - (0 if got is not y or bias_N is None else bias_N.double())).norm() / want.norm()
        ).item()
        assert 0.01 < error < 0.05


def test_torch_multiplies_the_same():
    """The oracle: torch's own scaled matmul, with our rows and scales."""
    weight = Fp8Weight.of(weights())
    q, scale = quantize_rows(torch.randn(37, 48).bfloat16())
    bias = torch.randn(64).bfloat16()
    try:
        want = torch._scaled_mm(
            q,
            weight.rows_OE.t(),
            scale_a=scale[:, None],
            scale_b=weight.scale_O[None],
            bias=bias,
            out_dtype=torch.float32,
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"this torch multiplies no FP8 on a CPU: {error}")
    got = scaled_matmul_reference(q, scale, weight.rows_OE, weight.scale_O, bias, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Rounded(torch.autograd.Function):
    """x W^T as FP8 has it, written down once more in float64: forward and gradient of the rounded numbers."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        q, scale = quantize_rows(x.float())
        return (q.double() * scale.double()[:, None]) @ weight.dequantized().double().t()

    @staticmethod
    def backward(ctx, dy):
        q, scale = quantize_rows(dy.float(), ctx.weight.scale_O)
        return (q.double() * scale.double()[:, None]) @ ctx.weight.rows_OE.double(), None


def problem(dtype, ranks=(3, 4, 5), p=0.3, tokens=21, width=48):
    torch.manual_seed(0)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    adapters = tuple(
        Adapter(
            part,
            (torch.randn(r, width) * width**-0.5).to(dtype).requires_grad_(),
            torch.randn(SIZES[part], r).to(dtype).requires_grad_(),
            scaling=0.5 + part,
            stream=64 + part,
        )
        for part, r in enumerate(ranks)
        if r is not None
    )
    return x, adapters, InputDropout(p, torch.arange(tokens) // 10 * 2**35, torch.arange(tokens) % 10)


def gradients(y, x, adapters, dy):
    return torch.autograd.grad(y, [x, *(m for a in adapters for m in (a.a_RE, a.b_OR))], dy)


def with_lora(dtype, ranks, p, tokens=21):
    """What `lora_linear` gives on FP8 linears, forward and gradients, and what it must give, in float64."""
    x, adapters, keys = problem(dtype, ranks, p, tokens)
    weight = Fp8Weight.of(weights())
    dy = torch.randn(tokens, 64).to(dtype)
    y = lora_linear(x, Fp8Linears(weight, SIZES, emulate=True), adapters, keys)
    found = [y, *gradients(y, x, adapters, dy)]
    exact_x = x.detach().double().requires_grad_()
    exact = tuple(
        Adapter(a.part, *(m.detach().double().requires_grad_() for m in (a.a_RE, a.b_OR)), a.scaling, a.stream)
        for a in adapters
    )
    nothing = Linears([torch.zeros(n, 48, dtype=torch.float64) for n in SIZES], [None] * 3)
    want = Rounded.apply(exact_x, weight) + lora_linear(exact_x, nothing, exact, keys)
    return found, [want, *gradients(want, exact_x, exact, dy.double())]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(3, 4, 5), (None, 2, None), (None, None, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_stands_on_top(dtype, ranks, p):
    found, wanted = with_lora(dtype, ranks, p)
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    found, wanted = with_lora(torch.float32, (3, None, 5), 0.3, tokens)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_token_sees_no_other():
    """Forward and backward: a token with a number a thousand times as large changes its own row alone."""
    x, adapters, keys = problem(torch.float32)
    linears = Fp8Linears(Fp8Weight.of(weights()), SIZES, emulate=True)
    dy, other, other_dy = torch.randn(21, 64), x.detach().clone(), None
    other[5, 3] = 1000.0
    other_dy = dy.clone()
    other_dy[5, 3] = 1000.0
    y, z = lora_linear(x, linears, adapters, keys), lora_linear(other.requires_grad_(), linears, adapters, keys)
    pairs = ((y, z), (gradients(y, x, adapters, dy)[0], gradients(z, other, adapters, other_dy)[0]))
    for a, b in pairs:
        same = (a == b).all(1)
        assert not same[5] and same[:5].all() and same[6:].all()


def test_kept_bytes():
    """As with bf16: x, which exists anyway, xa and the masks. Nothing in 8 bits survives the forward."""
    x, adapters, keys = problem(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, Fp8Linears(Fp8Weight.of(weights()), SIZES, emulate=True), adapters, keys)
    known = {x.data_ptr(), *(m.data_ptr() for a in adapters for m in (a.a_RE, a.b_OR))}
    own = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.numel() * t.element_size() for t in own) == 21 * (3 + 4 + 5) * 2 + 3 * 21 * 48


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: quantize_rows(torch.ones(3)), r"needs x \[T, E\] in fp32, fp16 or bf16, got torch.float32 \(3,\)"),
        (lambda: quantize_rows(torch.ones(3, 4).double()), "got torch.float64"),
        (lambda: quantize_rows(torch.ones(3, 4), torch.ones(3)), r"factors must be fp32 \[4\] on cpu"),
        (lambda: quantize_rows(torch.ones(3, 4), torch.ones(4).half()), "got torch.float16"),
        (lambda: Fp8Linears(Fp8Weight.of(weights()), (32, 16), emulate=True), r"do not fit a weight of \(64, 48\)"),
        (lambda: Fp8Linears(Fp8Weight.of(weights()), SIZES, torch.ones(3), emulate=True), r"biases \(3,\) do not fit"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def gpu(monkeypatch, name, capability, cuda="12.9"):
    """A GPU that need not be there, as far as torch tells of it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    matmul._cuda_obstacle.cache_clear()
    try:
        return obstacle(torch.device("cuda", 0))
    finally:
        matmul._cuda_obstacle.cache_clear()


def test_where_there_is_no_fp8(monkeypatch):
    assert (
        gpu(monkeypatch, "NVIDIA A100-SXM4-80GB", (8, 0))
        == "NVIDIA A100-SXM4-80GB is sm_80, and FP8 needs sm_89 or later"
    )
    assert "is no NVIDIA GPU" in gpu(monkeypatch, "AMD Instinct MI300X", (9, 4), cuda=None)
    for name, capability in (("NVIDIA L40S", (8, 9)), ("NVIDIA H200", (9, 0)), ("NVIDIA B200", (10, 0))):
        assert gpu(monkeypatch, name, capability) is None
    with pytest.raises(
        ValueError, match=r"an FP8 matmul cannot run here: there is no GPU, and FP8 needs one from sm_89"
    ):
        Fp8Linears(Fp8Weight.of(weights()), SIZES)


def test_what_the_tensor_cores_do_not_take(monkeypatch):
    monkeypatch.setattr("l2v_kernels.fp8.linears.obstacle", lambda device: None)
    with pytest.raises(ValueError, match=r"sides that are multiples of 16, got \(64, 40\)"):
        Fp8Linears(Fp8Weight.of(weights(width=40)), SIZES)
    linears = Fp8Linears(Fp8Weight.of(weights()), SIZES)
    with pytest.raises(ValueError, match=r"takes and returns bf16, got torch.float32 \(2, 48\)"):
        linears.matmul(torch.ones(2, 48))


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K"), [(5, 37), (70, 96), (1, 1), (2, 16384), (2, 16385), (3, 28672), (0, 16)])
def test_interpreted_bytes_are_those_of_the_reference(T, K, dtype):
    """In a wider buffer, whose other columns are poison."""
    wide = torch.full((T, K + 6), float("nan"), dtype=dtype)
    wide[:, :K] = rows(T, K, dtype)
    x = wide[:, :K]
    for factors in (None, power_of_two(torch.randint(-30, 5, (K,)))):
        want_q, want_scale = quantize_rows(x, factors)
        with triton_everywhere(), poisoned():
            q, scale = quantize_rows(x, factors)
        assert same_bytes(q, want_q) and torch.equal(scale, want_scale)


def test_interpreted_hard_numbers():
    x = hard_rows()
    for z in (x, x.t().contiguous().t(), x[:, torch.arange(20000) % x.shape[1]]):
        want_q, want_scale = quantize_rows(z)
        with triton_everywhere():
            q, scale = quantize_rows(z)
        assert same_bytes(q, want_q) and torch.equal(scale, want_scale)


@pytest.mark.parametrize("K", [24, 20000])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_interpreted_rows_that_are_not_finite(bad, K):
    x = rows(4, K)
    x[1, 7], x[2] = bad, 0
    want_q, want_scale = quantize_rows(x)
    with triton_everywhere():
        q, scale = quantize_rows(x)
    assert same_bytes(q, want_q) and torch.equal(scale.nan_to_num(7), want_scale.nan_to_num(7)) and scale[1].isnan()


@pytest.mark.parametrize("ranks", [(3, 4, 5), (None, 17, None), (2, None, 2)])
def test_interpreted_lora_stands_on_top(ranks):
    with triton_everywhere():
        found, wanted = with_lora(torch.float32, ranks, 0.3)
    for got, want in zip(found, wanted, strict=True):
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_interpreted_more_adapters_than_a_kernel_takes():
    """The second group adds to what the first has left."""
    torch.manual_seed(0)
    x, sizes = torch.randn(9, 32), (16,) * 5
    adapters = tuple(Adapter(i, torch.randn(2, 32), torch.randn(16, 2), 1.0, i) for i in range(5))
    dy, keys = torch.randn(9, 80), InputDropout()
    blank = [torch.randn(16, 32) for _ in sizes]
    found = []
    for linears in (Linears(blank, [None] * 5), Fp8Linears(Fp8Weight.of(blank), sizes, emulate=True)):
        for context in (triton_everywhere, torch.no_grad):
            with context():
                y, kept = op.forward(x, linears, adapters, keys)
                back = op.backward(dy, x, kept, linears, adapters, keys)
            found.append([y, back.dx_TE, *back.da, *back.db])
    for kernels, reference in (found[:2], found[2:]):
        for got, want in zip(kernels, reference, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
