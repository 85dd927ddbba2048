import importlib.util

import pytest
import torch
from support.step_cases import bytes_saved, check_segment_pool, gradients, plain_pool, poisoned

from l2v.batch import Segment, pack
from l2v.model.pooling import pool
from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.rms_norm import rms_norm
from l2v_kernels.segment_pool import op, segment_pool

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
LENGTHS = {
    "one token": [1],
    "short": [3, 0, 1, 30, 0, 0, 17, 5],
    "at the edges of pieces": [32, 31, 33, 64, 1, 65, 0],
    "long": [0, 700, 2],
    "one long": [97],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_against_float64(lengths, norm, dtype):
    check_segment_pool(lengths, 37, dtype, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_an_offset_of_the_norm(trained, dtype):
    check_segment_pool([3, 40, 1, 0, 70], 24, dtype, True, trained=trained, offset=1.0)


def test_gradients():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    norm_weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weights, cu = torch.tensor([1.0, 0, 2, 0, 0, 0.5, 1]), torch.tensor([0, 3, 3, 5, 7])
    assert torch.autograd.gradcheck(lambda x: segment_pool(x, weights, cu), (x,))
    assert torch.autograd.gradcheck(lambda x: segment_pool(x, weights, cu, norm_weight.detach()), (x,))
    assert torch.autograd.gradcheck(lambda *a: segment_pool(a[0], weights, cu, a[1], 1e-3), (x, norm_weight))


def weights_of(batch, how):
    """What each pooling of `l2v.model.pooling` weighs tokens with, written out in a loop."""
    weights = torch.zeros(batch.tokens)
    for first, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        pooled = [t for t in range(first, end) if batch.pool_mask_T[t]]
        for rank, t in enumerate(pooled):
            chosen = {"mean": 1, "weighted_mean": rank + 1, "first": rank == 0, "last": rank == len(pooled) - 1}
            weights[t] = float(chosen[how])
    return weights


@pytest.mark.parametrize("how", ["mean", "weighted_mean", "last", "first"])
def test_agrees_with_the_poolings_of_the_model(how):
    lengths, starts = [5, 1, 9, 40], [2, 0, 9, 3]
    batch = pack([Segment(torch.arange(n).numpy(), pool_start=at) for n, at in zip(lengths, starts, strict=True)])
    weights, x, norm_weight = weights_of(batch, how), torch.randn(55, 12), torch.randn(12)
    torch.testing.assert_close(segment_pool(x, weights, batch.cu_seqlens), pool(x, batch, how))
    want = pool(rms_norm(x, norm_weight), batch, how)
    torch.testing.assert_close(segment_pool(x, weights, batch.cu_seqlens, norm_weight), want)
    assert (want[2] == 0).all()


@pytest.mark.parametrize("norm_weight", [None, torch.ones(4)], ids=["plain", "norm"])
def test_tokens_of_weight_zero_take_no_part(norm_weight):
    x = torch.randn(6, 4)
    weights, cu = torch.tensor([1.0, 0, 2, 0, 0, 0]), torch.tensor([0, 3, 6])
    dvectors = torch.randn(2, 4)
    want = gradients(lambda x: segment_pool(x, weights, cu, norm_weight), (x,), [dvectors], torch.float32)
    x[weights == 0] = float("nan")
    with poisoned():
        got = gradients(lambda x: segment_pool(x, weights, cu, norm_weight), (x,), [dvectors], torch.float32)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert (got[0][1] == 0).all() and (got[1][weights == 0] == 0).all()


def test_empty_packs():
    x = torch.zeros(0, 4, requires_grad=True)
    for S in (0, 3):
        vectors = segment_pool(x, torch.zeros(0), torch.zeros(S + 1, dtype=torch.int32), torch.ones(4))
        assert torch.equal(vectors, torch.zeros(S, 4))
        assert torch.autograd.grad(vectors.sum(), x)[0].shape == (0, 4)


@pytest.mark.parametrize(("norm", "want"), [(False, []), (True, [6 * 40 * 2, 6 * 4, 40 * 2])])
def test_what_is_kept(norm, want):
    """No fp32 copy of the token states; without a norm not even they."""
    x, norm_weight = torch.randn(6, 40, dtype=torch.bfloat16, requires_grad=True), torch.ones(40, dtype=torch.bfloat16)
    weights, cu = torch.ones(6), torch.tensor([0, 4, 6], dtype=torch.int32)
    kept = bytes_saved(lambda: segment_pool(x, weights, cu, norm_weight if norm else None))
    assert kept == sorted([*want, 6 * 4, 3 * 4, 2 * 4])


@pytest.mark.parametrize(
    "change",
    [
        {"x_TE": torch.zeros(5)},
        {"x_TE": torch.zeros(4, 6)},
        {"x_TE": torch.zeros(5, 0), "norm_weight_E": None},
        {"x_TE": torch.zeros(5, 6, dtype=torch.int64)},
        {"weights_T": torch.zeros(5, 1)},
        {"weights_T": torch.zeros(5, dtype=torch.bool)},
        {"weights_T": torch.zeros(5, dtype=torch.float64)},
        {"weights_T": torch.zeros(5, requires_grad=True)},
        {"weights_T": torch.zeros(5, device="meta")},
        {"cu_seqlens": torch.tensor(5)},
        {"cu_seqlens": torch.tensor([], dtype=torch.int64)},
        {"cu_seqlens": torch.tensor([0.0, 5.0])},
        {"cu_seqlens": torch.tensor([0, 4])},
        {"cu_seqlens": torch.tensor([1, 5])},
        {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
        {"norm_weight_E": torch.zeros(5)},
        {"norm_weight_E": torch.zeros(6, dtype=torch.int64)},
        {"eps": -1.0},
    ],
)
def test_bad_input(change):
    good = {"x_TE": torch.zeros(5, 6), "weights_T": torch.zeros(5), "cu_seqlens": torch.tensor([0, 2, 5])}
    good |= {"norm_weight_E": torch.zeros(6), "eps": 1e-6}
    segment_pool(**good)
    with pytest.raises(ValueError, match=r"x \("):
        segment_pool(**{**good, **change})


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_interpreted_against_float64(lengths, norm, dtype):
    with triton_everywhere():
        check_segment_pool(lengths, 70, dtype, norm, cu_dtype=torch.int64 if dtype == torch.float16 else torch.int32)


def test_interpreted_offset_of_the_norm():
    with triton_everywhere():
        check_segment_pool([3, 40, 1, 0, 70], 640, torch.float32, True, offset=1.0)


@pytest.mark.parametrize("E", [1, 512, 4096])
def test_interpreted_widths(E):
    with triton_everywhere():
        check_segment_pool([2, 40], E, torch.float32, norm=True, trained=E == 512)


def test_interpreted_zero_weights_and_empty_packs():
    with triton_everywhere():
        test_tokens_of_weight_zero_take_no_part(None)
        test_tokens_of_weight_zero_take_no_part(torch.ones(4))
        test_empty_packs()


def test_interpreted_a_segment_has_its_bits_wherever_it_lies():
    x, weights, norm_weight = torch.randn(70, 20), torch.rand(70), torch.randn(20)
    with triton_everywhere():
        alone = segment_pool(x, weights, torch.tensor([0, 70]), norm_weight)
        for before in ([5], [33, 0, 1], [96]):
            n = sum(before)
            cu = torch.tensor([0, *before, 70, 2]).cumsum(0)
            more = torch.cat([torch.randn(n, 20), x, torch.randn(2, 20)])
            packed = segment_pool(more, torch.cat([torch.rand(n), weights, torch.rand(2)]), cu, norm_weight)
            assert torch.equal(packed[len(before)], alone[0])


def test_interpreted_strided_states():
    wide, weights, cu = torch.randn(50, 60), torch.rand(50), torch.tensor([0, 3, 45, 50])
    norm_weight, dvectors = torch.randn(60)[::3], torch.ones(()).expand(3, 20)
    for x in (wide[:, 8:28], wide[:, ::3]):
        with triton_everywhere(), poisoned():
            vectors, rstd, totals = op.forward(x, weights, cu, norm_weight, 1e-6)
            dx = op.backward(dvectors, x, weights, cu, norm_weight, rstd, totals, x.dtype)
        torch.testing.assert_close(vectors, plain_pool(weights, [3, 42, 5])(x, norm_weight))
        torch.testing.assert_close(dx, op.backward(dvectors, x, weights, cu, norm_weight, rstd, totals, x.dtype))


@pytest.mark.parametrize("cu", [[0, 90, 20, 50], [-5, 3, 400], [40, 45, 50], [50, 0], [0, -3, 0, 50]])
def test_interpreted_wrong_bounds_never_leave_the_pack(cu):
    """On a GPU nothing checks them. Rows around the pack are NaN to read, and must be what they were after writing."""
    around = torch.full((150, 8), float("nan"))
    around[50:100] = torch.randn(50, 8)
    weights = torch.full((150,), float("nan"))
    weights[50:100] = 1
    cu = torch.tensor(cu)
    with triton_everywhere():
        vectors, rstd, totals = op.forward(around[50:100], weights[50:100], cu, torch.ones(8), 1e-6)
        assert not vectors.isnan().any() and not totals.isnan().any()
        from l2v_kernels.segment_pool.kernel import launch_backward

        dx = torch.full((150, 8), 7.0)
        tensors = (around[50:100], weights[50:100], cu, torch.ones(8), rstd, totals)
        launch_backward(torch.ones(len(vectors), 8), *tensors, dx[50:100])
    assert (dx[:50] == 7).all() and (dx[100:] == 7).all()
