import importlib.util

import pytest
import torch
from support.launches import launches
from support.step_cases import poisoned

from l2v_kernels import dropout
from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.lora_linear import Adapter, InputDropout, Linears, lora_linear, op, stack_weights
from l2v_kernels.lora_linear.reference import lora_linear_reference
from l2v_kernels.lora_linear.settings import Adapters

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")

T, E = 37, 50
SIZES = (24, 7, 9)


def problem(dtype=torch.float64, *, ranks=(3, 4, 5), sizes=SIZES, biases=True, p=0.0, tokens=T, width=E, seed=0):
    """x, weights, biases, adapters (None rank: a bare linear), keys of the dropout; leaves require grad."""
    torch.manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)

    x = random(tokens, width).requires_grad_()
    weights = [random(n, width, scale=width**-0.5) for n in sizes]
    bias = [random(n) if biases and i != 1 else None for i, n in enumerate(sizes)]
    adapters = tuple(
        Adapter(
            part,
            random(rank, width, scale=width**-0.5).requires_grad_(),
            random(sizes[part], rank).requires_grad_(),
            scaling=0.5 + part,
            stream=64 + part,
        )
        for part, rank in enumerate(ranks)
        if rank is not None
    )
    segment = torch.arange(tokens) // 10
    keys = InputDropout(p, segment * 2**35 - 5, torch.arange(tokens) % 10)
    return x, weights, bias, adapters, keys


def gradients(y, x, adapters, dy):
    leaves = [x, *(m for a in adapters for m in (a.a_RE, a.b_OR))]
    return torch.autograd.grad(y, leaves, dy.to(y.dtype))


def as64(x, weights, bias, adapters):
    """The same problem in float64, with leaves of its own."""

    def up(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    wide = tuple(Adapter(a.part, up(a.a_RE), up(a.b_OR), a.scaling, a.stream) for a in adapters)
    return up(x), [up(w) for w in weights], [up(b) for b in bias], wide


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(3, 4, 5), (None, 2, None), (None, None, None), (1, None, 16)])
def test_is_its_definition(ranks, p):
    x, weights, bias, adapters, keys = problem(ranks=ranks, p=p)
    dy = torch.randn(T, sum(SIZES), dtype=torch.float64)
    y = lora_linear(x, Linears(weights, bias), adapters, keys)
    want = lora_linear_reference(x, weights, bias, adapters, keys)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for got, expected in zip(gradients(y, x, adapters, dy), gradients(want, x, adapters, dy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_mask_is_that_of_dropout():
    """Each adapter sees its own stream of `l2v_kernels.dropout`; the frozen matmul sees all of x."""
    x, weights, bias, adapters, keys = problem(p=0.4)
    y = lora_linear(x, Linears(weights, bias), adapters, keys)
    for part, (w, b, a) in zip(y.split(SIZES, 1), zip(weights, bias, adapters, strict=True), strict=True):
        dropped = dropout(x, 0.4, keys.seeds_T, keys.rows_T, a.stream)
        want = torch.nn.functional.linear(x, w, b) + a.scaling * dropped @ a.a_RE.t() @ a.b_OR.t()
        torch.testing.assert_close(part, want)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    x, weights, bias, adapters, keys = problem(tokens=6, width=17, sizes=(4, 3, 2), ranks=(2, None, 3), p=p)
    leaves = [x, *(m for a in adapters for m in (a.a_RE, a.b_OR))]

    def call(x, a0, b0, a1, b1):
        found = (Adapter(0, a0, b0, 0.5, 1), Adapter(2, a1, b1, 2.0, 2))
        return lora_linear(x, Linears(weights, bias), found, keys)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_most_twice_the_error_of_pytorch(dtype):
    x, weights, bias, adapters, keys = problem(
        dtype, p=0.05, tokens=200, width=256, sizes=(128, 64, 64), ranks=(16, 16, 16)
    )
    dy = torch.randn(200, 256).to(dtype)
    exact_x, *exact = as64(x, weights, bias, adapters)
    want = lora_linear_reference(exact_x, *exact, keys)
    wanted = [want, *gradients(want, exact_x, exact[2], dy)]
    plain = lora_linear_reference(x, weights, bias, adapters, keys)
    plains = [plain, *gradients(plain, x, adapters, dy)]
    ours = lora_linear(x, Linears(weights, bias), adapters, keys)
    found = [ours, *gradients(ours, x, adapters, dy)]
    for got, same_dtype, exact_value in zip(found, plains, wanted, strict=True):
        error, allowed = ((v.double() - exact_value).abs().max() for v in (got, same_dtype))
        assert error <= 2 * allowed + 1e-6 * exact_value.abs().max()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    x, weights, bias, adapters, keys = problem(tokens=tokens, p=0.2)
    y = lora_linear(x, Linears(weights, bias), adapters, keys)
    assert y.shape == (tokens, sum(SIZES))
    found = gradients(y, x, adapters, torch.ones_like(y))
    want = gradients(lora_linear_reference(x, weights, bias, adapters, keys), x, adapters, torch.ones_like(y))
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_token_sees_no_other():
    x, weights, bias, adapters, keys = problem(torch.float32, p=0.3)
    y = lora_linear(x, Linears(weights, bias), adapters, keys)
    other = x.detach().clone()
    other[5] += 1
    z = lora_linear(other, Linears(weights, bias), adapters, keys)
    same = (y == z).all(1)
    assert not same[5] and same[:5].all() and same[6:].all()


def test_stacked_weights_take_one_matmul_and_stay_themselves():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(E, n, bias=False).requires_grad_(False) for n in SIZES]
    before = [(linear.weight, linear.weight.clone()) for linear in linears]
    x = torch.randn(5, E)
    separate = Linears([linear.weight for linear in linears], [None] * 3)
    assert separate.stacked_OE is None
    want = [separate.matmul(x), separate.input_gradient(torch.ones(5, sum(SIZES)))]
    stack_weights(linears)
    one = Linears([linear.weight for linear in linears], [None] * 3)
    assert one.stacked_OE.shape == (sum(SIZES), E)
    for linear, (parameter, value) in zip(linears, before, strict=True):
        assert linear.weight is parameter and parameter.is_contiguous() and torch.equal(parameter, value)
    found = [one.matmul(x), one.input_gradient(torch.ones(5, sum(SIZES)))]
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)
    # A cast separates them again: one matmul each, and right.
    for linear in linears:
        linear.double()
    cast = Linears([linear.weight for linear in linears], [None] * 3)
    assert cast.stacked_OE is None
    torch.testing.assert_close(cast.matmul(x.double()).float(), want[0])


def test_kept_bytes():
    """x exists anyway; besides it only xa, and without Triton the masks."""
    saved = []
    x, weights, bias, adapters, keys = problem(torch.float32, p=0.1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, Linears(weights, bias), adapters, keys)
    known = {x.data_ptr(), *(m.data_ptr() for a in adapters for m in (a.a_RE, a.b_OR))}
    own = [t for t in saved if t.data_ptr() not in known]
    assert sum(t.numel() * t.element_size() for t in own) == T * (3 + 4 + 5) * 4 + 3 * T * E


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, a: (x[0], (a,)), r"floating x \[T, E\]"),
        (lambda x, a: (x, (a, a)), "at most one adapter"),
        (lambda x, a: (x, (Adapter(3, a.a_RE, a.b_OR),)), "there are 3 linears"),
        (lambda x, a: (x, (Adapter(1, a.a_RE, a.b_OR),)), r"needs A \[R, 50\] and B \[7, R\]"),
        (lambda x, a: (x.float(), (a,)), "dtype and device of x"),
        (lambda x, a: (x, (Adapter(0, a.a_RE, a.b_OR, stream=-1),)), "stream must be at least 0"),
    ],
)
def test_bad_input(change, says):
    x, weights, bias, adapters, keys = problem()
    x, adapters = change(x, adapters[0])
    with pytest.raises(ValueError, match=says):
        lora_linear(x, Linears(weights, bias), adapters, keys)


def test_dropout_needs_addresses():
    x, weights, bias, adapters, _ = problem()
    for keys in (InputDropout(0.1), InputDropout(0.1, torch.zeros(T), torch.zeros(T, dtype=torch.int64))):
        with pytest.raises(ValueError, match="dropout needs seeds_T int64"):
            lora_linear(x, Linears(weights, bias), adapters, keys)


@pytest.mark.parametrize("ranks", [(3, None, 5), (None, None, None)])
def test_the_frozen_matmul_alone(ranks):
    """The frozen matmul alone, and with it all that the share and the backward take."""
    x, weights, bias, adapters, keys = problem(ranks=ranks, p=0.3)
    linears = Linears(weights, bias)
    with torch.no_grad():
        want, kept = op.forward(x, linears, adapters, keys)
        y, kept_alone = op.forward_frozen(x, linears, adapters, keys)
        torch.testing.assert_close(y, linears.matmul(x), rtol=0, atol=0)
        parts = y.split(SIZES, 1)
        for adapter, columns in zip(adapters, Adapters.of(adapters).slices, strict=True):
            parts[adapter.part].add_(kept_alone.xa_TR[:, columns] @ adapter.b_OR.t())
    torch.testing.assert_close(y, want)
    assert len(kept.tensors()) == len(kept_alone.tensors())
    for got, expected in zip(kept_alone.tensors(), kept.tensors(), strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)


@needs_triton
def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "width", "ranks", "p"),
    [
        (37, 50, (3, 4, 5), 0.3),
        (70, 144, (16, None, None), 0.05),
        (1, 16, (None, 1, 2), 0.0),
        (130, 80, (17, 33, None), 0.3),
        (0, 50, (3, 4, 5), 0.3),
    ],
)
def test_interpreted_kernels_equal_the_reference(tokens, width, ranks, p, dtype):
    x, weights, bias, adapters, keys = problem(dtype, tokens=tokens, width=width, ranks=ranks, p=p)
    exact_x, *exact = as64(x, weights, bias, adapters)
    dy = torch.randn(tokens, sum(SIZES)).to(dtype)
    want = lora_linear_reference(exact_x, *exact, keys)
    wanted = [want, *gradients(want, exact_x, exact[2], dy)]
    # A wider buffer, whose other columns are poison: only x may be read.
    wide = torch.full((tokens, width + 6), float("nan"), dtype=dtype)
    wide[:, :width] = x.detach()
    strided = wide[:, :width].requires_grad_()
    with triton_everywhere():
        y = lora_linear(strided, Linears(weights, bias), adapters, keys)
        found = [y, *gradients(y, strided, adapters, dy)]
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for got, expected in zip(found, wanted, strict=True):
        assert got.isfinite().all()
        largest = expected.abs().max() if expected.numel() else 0
        assert (got.double() - expected).abs().max().item() <= tolerance * largest if expected.numel() else True


def test_interpreted_without_a_gradient_of_x():
    x, weights, bias, adapters, keys = problem(torch.float32, p=0.3)
    linears, dy = Linears(weights, bias), torch.randn(T, sum(SIZES))
    with triton_everywhere(), torch.no_grad():
        _, kept = op.forward(x.detach(), linears, adapters, keys)
        both = [op.backward(dy, x.detach(), kept, linears, adapters, keys, want_dx=w) for w in (True, False)]
    assert both[1].dx_TE is None and both[0].dx_TE is not None
    for a, b in zip((*both[0].da, *both[0].db), (*both[1].da, *both[1].db), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "tokens", "sums"), [(torch.float16, 300, 1), (torch.float32, 5, 0)])
def test_interpreted_gradients_of_all_a_are_summed_and_rounded_in_one_launch(dtype, tokens, sums, monkeypatch):
    x, weights, bias, adapters, keys = problem(dtype, ranks=(4, 4, 4), tokens=tokens, p=0.3)
    dy, linears = torch.randn(tokens, sum(SIZES)).to(dtype), Linears(weights, bias)
    with triton_everywhere(), torch.no_grad(), launches() as names:
        _, kept = op.forward(x, linears, adapters, keys)
        names.clear()
        op.backward(dy, x, kept, linears, adapters, keys)
    assert names == ["lora_up_backward_kernel", "up_sums_kernel", "lora_backward_kernel"] + sums * [
        "ordered_sum_kernel"
    ]


def test_interpreted_keeps_no_mask():
    x, weights, bias, adapters, keys = problem(torch.float32, p=0.3)
    with triton_everywhere(), torch.no_grad():
        _, kept = op.forward(x.detach(), Linears(weights, bias), adapters, keys)
    assert [tuple(t.shape) for t in kept.tensors()] == [(T, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "outputs", "rank"), [(290, 530, 16), (70, 515, 5), (257, 130, 20), (33, 33, 32), (1, 1, 1), (0, 40, 4)]
)
def test_interpreted_one_read_of_dy(tokens, outputs, rank, dtype):
    """Several blocks of outputs and splits of tokens, from and into columns of wider buffers whose others are poison."""
    from l2v_kernels.lora_linear import launch

    torch.manual_seed(0)

    def within(width):
        buffer = torch.full((tokens, width + 9), float("nan"), dtype=dtype)
        inside = buffer[:, 5 : 5 + width]
        return buffer, inside.copy_(torch.randn(tokens, width))

    (_, dy), (_, xa), (buffer, dxa) = within(outputs), within(rank), within(rank)
    b = torch.randn(outputs, rank).to(dtype)
    want = 0.75 * dy.double() @ b.double(), dy.double().t() @ xa.double()
    plain = (dy @ b).mul_(0.75), dy.t() @ xa
    adapters = Adapters([Adapter(0, b.new_empty(rank, 3), b, 0.75)])
    runs = []
    for _ in range(2):
        dxa.fill_(float("nan"))
        with poisoned():
            db = torch.full((outputs * rank,), float("nan"), dtype=dtype)
            launch.up_backward(dy, xa, (outputs,), adapters, InputDropout(), dxa, db)
        runs.append((dxa.clone(), db.view(outputs, rank)))
    assert buffer[:, :5].isnan().all() and buffer[:, 5 + rank :].isnan().all()
    for got, again, expected, same_dtype in zip(*runs, want, plain, strict=True):
        assert torch.equal(got, again) and got.dtype == dtype and got.shape == expected.shape
        if got.numel():
            error, allowed = ((v.double() - expected).abs().max() for v in (got, same_dtype))
            assert error <= 2 * allowed + 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 37), (torch.float16, 300), (torch.float32, 1)])
@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2), (1,)])
def test_interpreted_adapters_of_one_rank_share_a_launch(parts, tokens, dtype):
    """q, k and v of different widths, or some of them, with factors of their own; each as a launch of its own gives it."""
    from l2v_kernels.lora_linear import launch

    torch.manual_seed(1)
    sizes, rank, width = (700, 40, 130), 5, 5 * len(parts)
    dy, xa = torch.randn(tokens, sum(sizes)).to(dtype), torch.randn(tokens, width).to(dtype)
    adapters = Adapters(
        Adapter(part, torch.empty(rank, 3, dtype=dtype), torch.randn(sizes[part], rank).to(dtype), 0.5 + part)
        for part in parts
    )
    dxa, db = (torch.full(shape, float("nan"), dtype=dtype) for shape in ((tokens, width), (sum(adapters.sizes[1]),)))
    with poisoned(), launches() as names:
        launch.up_backward(dy, xa, sizes, adapters, InputDropout(), dxa, db)
    assert names == ["lora_up_backward_kernel", "up_sums_kernel"]
    for a, at, of_b in zip(adapters, adapters.slices, db.split(adapters.sizes[1]), strict=True):
        own = dy.split(sizes, 1)[a.part].double()
        for got, want in (
            (dxa[:, at], a.scaling * own @ a.b_OR.double()),
            (of_b.view_as(a.b_OR), own.t() @ xa[:, at].double()),
        ):
            assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max() + 1e-6


def test_interpreted_high_ranks_read_dy_twice():
    """A rank whose partial sums would cost more than they spare takes two matmuls, and the results do not depend on the way."""
    from l2v_kernels.lora_linear import launch

    x, weights, bias, adapters, keys = problem(torch.float32, ranks=(32, 33, None))
    assert [launch.takes_up_backward(run) for run in Adapters.of(adapters).runs] == [True, False]
    linears, dy = Linears(weights, bias), torch.randn(T, sum(SIZES))
    with torch.no_grad():
        with triton_everywhere():
            _, kept = op.forward(x, linears, adapters, keys)
            found = op.backward(dy, x, kept, linears, adapters, keys)
        _, kept = op.forward(x, linears, adapters, keys)
        want = op.backward(dy, x, kept, linears, adapters, keys)
    for got, expected in zip((found.dx_TE, *found.da, *found.db), (want.dx_TE, *want.da, *want.db), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
