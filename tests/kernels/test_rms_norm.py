import importlib.util

import pytest
import torch
from support.step_cases import bytes_saved, check_rms_norm, plain_rms_norm, poisoned

from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.rms_norm import op, reference, rms_norm

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
SHAPES = [(1, 64), (5, 575), (7, 128), (2, 4096), (5, 3, 64), (2, 8, 128), (0, 8), (3, 0, 8), (4, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 16384)], ids=str)
def test_against_float64(shape, residual, dtype):
    check_rms_norm(shape, dtype, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(5, 575), (5, 3, 256), (0, 8)], ids=str)
def test_an_offset_against_float64(shape, residual, dtype):
    check_rms_norm(shape, dtype, residual, offset=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_an_offset_equals_gemma(dtype):
    """Its weight plus 1 is formed in fp32: 1 + w rounded to bf16 would lose most of a small w."""
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    theirs = gemma.Gemma3RMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(theirs.weight, std=1e-2)
    x = torch.randn(7, 96).to(dtype)
    ours = rms_norm(x, theirs.weight, 1e-5, offset=1.0)
    torch.testing.assert_close(ours, theirs(x))
    assert dtype == torch.float32 or not torch.equal(ours, rms_norm(x, 1 + theirs.weight, 1e-5))


def test_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = llama.LlamaRMSNorm(96, eps=1e-5)
    torch.nn.init.normal_(theirs.weight)
    x, residual = torch.randn(7, 96), torch.randn(7, 96)
    total, y = rms_norm(x, theirs.weight, 1e-5, residual)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, theirs(x + residual))
    torch.testing.assert_close(rms_norm(x, theirs.weight, 1e-5), theirs(x))


def test_gradients():
    x, residual = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: rms_norm(a[0], a[1], 1e-3, a[2]), (x, weight, residual))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-3), (x.view(5, 2, 4), weight[:4]))
    for i in range(2):
        assert torch.autograd.gradcheck(lambda a, i=i: rms_norm(a, weight, 1e-3, residual)[i], (x,))


@pytest.mark.parametrize("which", range(3))
def test_gradients_only_where_wanted(which):
    tensors = [torch.randn(5, 8), torch.randn(8), torch.randn(5, 8)]
    leaf = tensors[which].requires_grad_()
    x, weight, residual = tensors
    total, y = rms_norm(x, weight, 1e-6, residual)
    (gradient,) = torch.autograd.grad((total * 2 + y).sum(), leaf)
    total, y = plain_rms_norm()(x, weight, residual)
    torch.testing.assert_close(gradient, torch.autograd.grad((total * 2 + y).sum(), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_once_and_gives_the_same_bits_again(dtype):
    x, delta, weight = torch.randn(9, 100).to(dtype), torch.randn(9, 100).to(dtype), torch.randn(100).to(dtype)
    total, y, rstd = op.forward(x, weight, 1e-6, delta)
    assert torch.equal(total, x + delta) and rstd.dtype == torch.float32 and rstd.shape == (9,)
    exact = plain_rms_norm()(total.double(), weight.double())
    assert ((y.double() - exact).abs() <= (0.505 * torch.finfo(dtype).eps + 5e-7) * exact.abs() + 1e-7).all()
    assert torch.equal(op.normalize(total, rstd, weight), y)
    same, _, _ = op.forward(x, weight, 1e-6)
    assert same is x


def test_backward_into_what_is_there():
    """A slice of a wider buffer, and the incoming gradients themselves."""
    dy, total, dsum, weight = torch.randn(5, 3, 16), torch.randn(5, 3, 16), torch.randn(5, 3, 16), torch.randn(16)
    rstd = op.forward(total, weight, 1e-6)[2]
    want = op.backward(dy, total, rstd, weight, dsum)
    buffer = torch.full((5, 4, 16), float("nan"))
    for out in (buffer[:, :3], dy.clone(), dsum.clone()):
        assert op.backward(dy, total, rstd, weight, dsum, out) is out and torch.equal(out, want)
    assert buffer[:, 3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(11, 6), (11, 3, 8)], ids=str)
def test_blocks_of_rows_change_no_bit(shape, dtype, monkeypatch):
    """Eleven rows in blocks of four, also into dsum itself and into a part of a wider buffer."""
    (dy, x, dsum), weight = (torch.randn(shape).to(dtype) for _ in range(3)), torch.randn(shape[-1]).to(dtype)
    rstd = op.forward(x, weight, 1e-6)[2]
    want = op.backward(dy, x, rstd, weight, dsum, offset=1.0)
    monkeypatch.setattr(reference, "BLOCK", 4 * x[0].numel())
    wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
    assert torch.equal(op.backward(dy, x, rstd, weight, dsum, wide[..., : shape[-1]], offset=1.0), want)
    assert torch.equal(wide[..., : shape[-1]], want) and not wide[..., shape[-1] :].any()
    assert op.backward(dy, x, rstd, weight, dsum, dsum, offset=1.0) is dsum and torch.equal(dsum, want)


@pytest.mark.parametrize("residual", [False, True])
def test_keeps_the_sum_and_four_bytes_a_row(residual):
    x, weight = torch.randn(6, 40, dtype=torch.bfloat16, requires_grad=True), torch.ones(40, dtype=torch.bfloat16)
    delta = torch.randn_like(x) if residual else None
    results = []
    kept = bytes_saved(lambda: results.append(rms_norm(x, weight, 1e-6, delta)))
    assert kept == sorted([6 * 40 * 2, 6 * 4, 40 * 2])
    if residual:
        # The sum is the next layer's input: it costs nothing.
        total, y = results[0]
        assert total.data_ptr() in {t.data_ptr() for t in y.grad_fn.saved_tensors}


@pytest.mark.parametrize(
    "change",
    [
        {"x_TE": torch.zeros(6)},
        {"x_TE": torch.zeros(2, 3, 4, 6)},
        {"x_TE": torch.zeros(5, 0), "weight_E": torch.zeros(0), "residual_TE": None},
        {"x_TE": torch.zeros(5, 6, dtype=torch.int64), "residual_TE": None},
        {"weight_E": torch.zeros(5)},
        {"weight_E": torch.zeros(1, 6)},
        {"weight_E": torch.zeros(6, dtype=torch.int32)},
        {"weight_E": torch.zeros(6, device="meta")},
        {"residual_TE": torch.zeros(4, 6)},
        {"residual_TE": torch.zeros(5, 6, dtype=torch.float16)},
        {"residual_TE": torch.zeros(5, 6, device="meta")},
        {"eps": -1.0},
        {"eps": float("nan")},
    ],
)
def test_bad_input(change):
    good = {"x_TE": torch.zeros(5, 6), "weight_E": torch.zeros(6), "residual_TE": torch.zeros(5, 6), "eps": 1e-6}
    rms_norm(**good)
    with pytest.raises(ValueError, match=r"x \("):
        rms_norm(**{**good, **change})


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (70, 96), (33, 5, 64)], ids=str)
def test_interpreted_against_float64(shape, residual, dtype):
    with triton_everywhere():
        check_rms_norm(shape, dtype, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(5, 640), (5, 3, 256)], ids=str)
def test_interpreted_offset(shape, residual, dtype):
    with triton_everywhere():
        check_rms_norm(shape, dtype, residual, offset=1.0)


def test_interpreted_wide_row():
    with triton_everywhere():
        check_rms_norm((1, 16384), torch.float32, residual=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(9, 100), (5, 3, 64)], ids=str)
def test_interpreted_bits_again_and_in_place(shape, dtype):
    x, delta, dy, dsum = (torch.randn(shape).to(dtype) for _ in range(4))
    weight = torch.randn(shape[-1]).to(dtype)
    with triton_everywhere(), poisoned():
        total, y, rstd = op.forward(x, weight, 1e-6, delta)
        assert torch.equal(total, x + delta) and torch.equal(op.normalize(total, rstd, weight), y)
        assert op.forward(x, weight, 1e-6)[0] is x
        _, shifted, _ = op.forward(total, weight, 1e-6, offset=1.0)
        assert torch.equal(op.normalize(total, rstd, weight, 1.0), shifted) and not torch.equal(shifted, y)
        want = op.backward(dy, total, rstd, weight, dsum)
        buffer = torch.full((shape[0], 2 * shape[1], *shape[2:]), float("nan"), dtype=dtype)
        for out in (buffer[:, : shape[1]], dy.clone(), dsum.clone()):
            given = {"dy_TE": dy, "dsum_TE": dsum, "out": out}
            if out.data_ptr() != buffer.data_ptr():
                name = "dy_TE" if torch.equal(out, dy) else "dsum_TE"
                given[name] = out
            assert op.backward(sum_TE=total, rstd_T=rstd, weight_E=weight, **given) is out
            assert torch.equal(out, want)
        assert buffer[:, shape[1] :].isnan().all()


def test_interpreted_strided_rows():
    """Slices of a wider buffer are read where they lie, and other layouts through a copy."""
    wide, weight = torch.randn(6, 5, 80), torch.randn(16)
    for x in (wide[:, 1:3, 8:24], wide[:, :, ::5], wide.transpose(0, 2)[:16].transpose(0, 2), wide[:, 0, 8:24]):
        delta, dy = torch.randn(x.shape), torch.ones(()).expand(x.shape)
        with triton_everywhere(), poisoned():
            ours = op.forward(x, weight, 1e-6, delta)
            found = op.backward(dy, x, ours[2], weight), op.weight_gradient(dy, x, ours[2])
        torch.testing.assert_close(ours, op.forward(x, weight, 1e-6, delta))
        torch.testing.assert_close(found[0], op.backward(dy, x, ours[2], weight))
        torch.testing.assert_close(found[1], op.weight_gradient(dy, x, ours[2]))


def test_interpreted_weight_gradient_of_many_rows(monkeypatch):
    """Several programs along the rows, the last with a remainder."""
    from l2v_kernels.rms_norm import kernel

    monkeypatch.setattr(kernel, "MAX_WEIGHT_PROGRAMS", 6)
    for T, E in ((331, 130), (64, 256), (65, 256)):
        dy, total, rstd = torch.randn(T, E), torch.randn(T, E), torch.rand(T)
        with triton_everywhere(), poisoned():
            found = op.weight_gradient(dy, total, rstd)
        exact = op.weight_gradient(dy.double(), total.double(), rstd.double())
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
