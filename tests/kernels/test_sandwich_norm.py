import importlib.util

import pytest
import torch
from support.step_cases import bytes_saved, check_sandwich_norm, plain_sandwich_norm, poisoned, sandwich_problem

from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.rms_norm import op as rms_norm
from l2v_kernels.sandwich_norm import op, sandwich_norm

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
SHAPES = [(1, 64), (5, 575), (7, 640), (2, 5376), (0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("T", "E"), SHAPES)
def test_against_float64(T, E, offset, dtype):
    check_sandwich_norm(T, E, dtype, offset)


def test_equals_a_gemma_layers_steps():
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    after, before = gemma.Gemma3RMSNorm(96, eps=1e-5), gemma.Gemma3RMSNorm(96, eps=1e-5)
    for norm in (after, before):
        torch.nn.init.normal_(norm.weight, std=0.3)
    delta, residual = torch.randn(7, 96), torch.randn(7, 96)
    want = residual + after(delta)
    total, y = sandwich_norm(delta, residual, after.weight, before.weight, 1e-5, offset=1.0)
    torch.testing.assert_close((total, y), (want, before(want)))
    alone, nothing, _, none = op.forward(delta, residual, after.weight, None, 1e-5, 1.0)
    assert torch.equal(alone, total) and nothing is None and none is None


def test_gradients():
    leaves, _ = sandwich_problem(5, 8, torch.float64)
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: sandwich_norm(*x, 1e-3, offset=1.0), leaves)
    for i in range(2):
        assert torch.autograd.gradcheck(lambda *x, i=i: sandwich_norm(*x, 1e-3, offset=1.0)[i], leaves)


@pytest.mark.parametrize("which", range(4))
def test_gradients_only_where_wanted(which):
    leaves, _ = sandwich_problem(5, 8, torch.float32)
    leaf = leaves[which].requires_grad_()
    found, want = (
        torch.autograd.grad((total * 2 + y).sum(), leaf)[0]
        for total, y in (sandwich_norm(*leaves, offset=1.0), plain_sandwich_norm()(*leaves))
    )
    torch.testing.assert_close(found, want)


def check_rounding(dtype):
    """The sum is rounded once, and y is the norm of the rounded sum, which can be recomputed bit for bit."""
    (delta, residual, after, before), _ = sandwich_problem(9, 100, dtype)
    with poisoned():
        total, y, delta_rstd, rstd = op.forward(delta, residual, after, before, 1e-6, 1.0)
        assert torch.equal(rms_norm.normalize(total, rstd, before, 1.0), y)
    assert delta_rstd.dtype == rstd.dtype == torch.float32 and rstd.shape == (9,)
    exact, _ = plain_sandwich_norm()(*(x.double() for x in (delta, residual, after, before)))
    largest = residual.double().abs() + (exact - residual.double()).abs()
    assert ((total.double() - exact).abs() <= 0.505 * torch.finfo(dtype).eps * exact.abs() + 5e-7 * largest).all()
    _, of_sum = plain_sandwich_norm()(torch.zeros_like(total).double(), total.double(), after.double(), before.double())
    assert ((y.double() - of_sum).abs() <= (0.505 * torch.finfo(dtype).eps + 5e-7) * of_sum.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_once_and_gives_the_same_bits_again(dtype):
    check_rounding(dtype)


def test_keeps_delta_the_sum_and_eight_bytes_a_row():
    (delta, residual, after, before), _ = sandwich_problem(6, 40, torch.bfloat16)
    delta.requires_grad_()
    kept = bytes_saved(lambda: sandwich_norm(delta, residual, after, before, offset=1.0))
    assert kept == sorted([2 * 40, 2 * 40, 4 * 6, 4 * 6, 2 * 6 * 40, 2 * 6 * 40])


@pytest.mark.parametrize(
    "change",
    [
        {"delta_TE": torch.zeros(5, 0), "residual_TE": torch.zeros(5, 0)},
        {"delta_TE": torch.zeros(5, 2, 3), "residual_TE": torch.zeros(5, 2, 3)},
        {"delta_TE": torch.zeros(5, 6, dtype=torch.int32)},
        {"residual_TE": torch.zeros(4, 6)},
        {"residual_TE": torch.zeros(5, 6, dtype=torch.float16)},
        {"residual_TE": torch.zeros(5, 6, device="meta")},
        {"after_E": torch.zeros(5)},
        {"before_E": torch.zeros(1, 6)},
        {"before_E": torch.zeros(6, dtype=torch.int32)},
        {"after_E": torch.zeros(6, device="meta")},
        {"eps": -1.0},
        {"eps": float("nan")},
    ],
)
def test_bad_input(change):
    good = {"delta_TE": torch.zeros(5, 6), "residual_TE": torch.zeros(5, 6)}
    good |= {"after_E": torch.zeros(6), "before_E": torch.zeros(6), "eps": 1e-6}
    sandwich_norm(**good)
    with pytest.raises(ValueError, match=r"delta \("):
        sandwich_norm(**{**good, **change})


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("T", "E"), [*SHAPES, (70, 96)])
def test_interpreted_against_float64(T, E, offset, dtype):
    with triton_everywhere():
        check_sandwich_norm(T, E, dtype, offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_rounds_once_and_gives_the_same_bits_again(dtype):
    with triton_everywhere():
        check_rounding(dtype)


def test_interpreted_strided_rows_and_one_norm():
    """Slices of a wider buffer are read where they lie, other layouts through a copy; without the second norm, no y."""
    (_, residual, after, before), (dy, dsum) = sandwich_problem(6, 16, torch.float32)
    wide = torch.randn(6, 80)
    for delta in (wide[:, 8:24], wide[:, ::5], wide.t()[:16].t()):
        for second in (before, None):
            with triton_everywhere(), poisoned():
                ours = op.forward(delta, residual, after, second, 1e-6, 1.0)
            for found, want in zip(ours, op.forward(delta, residual, after, second, 1e-6, 1.0), strict=True):
                assert (found is None) == (want is None)
                torch.testing.assert_close(found, want)
        total, _, delta_rstd, rstd = op.forward(delta, residual, after, before, 1e-6, 1.0)
        for added in (dsum, dsum.t().contiguous().t(), None):
            arguments = (dy.t().contiguous().t(), added, total, rstd, before, delta, delta_rstd, after, 1.0)
            with triton_everywhere(), poisoned():
                found = op.backward(*arguments)
            torch.testing.assert_close(found, op.backward(*arguments))
