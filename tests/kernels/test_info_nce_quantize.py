"""Quantised embeddings in InfoNCE: the codes by hand, the straight-through gradient, rows without a direction, memory."""

import numpy as np
import pytest
import torch
from support.info_nce_cases import assert_close, ours, plain, problem

from l2v_kernels import info_nce
from l2v_kernels.info_nce.quantize import codes, inverse_steps, straight_through

KINDS = ["int8", "binary"]


def test_codes_by_hand():
    x = torch.tensor([[2.54, -1.27, 0.0, 0.011], [-0.001, 0.0, 0.0005, 0.0], [0.0, 0.0, 0.0, 0.0]])
    int8 = codes(x, inverse_steps(x, "int8", 4), "int8")
    assert int8.tolist() == [[127, -63, 0, 1], [-127, 0, 64, 0], [0, 0, 0, 0]]  # -63.5 and 63.5 are rounded up
    binary = codes(x, inverse_steps(x, "binary", 4), "binary")
    assert binary.tolist() == [[1, -1, -1, 1], [-1, -1, 1, -1], [0, 0, 0, 0]]
    bits = np.unpackbits(np.packbits(x[:2].numpy() > 0, axis=1), axis=1)[:, :4]
    assert (binary[:2].numpy() > 0).tolist() == bits.astype(bool).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_one_code_in_every_dtype_and_at_every_length_of_a_row(kind):
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    want = codes(x.float(), inverse_steps(x.float(), kind, 96), kind)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = codes(x.to(dtype), inverse_steps(x.to(dtype), kind, 96), kind)
        assert found.dtype == dtype and torch.equal(found.float(), want)
    assert torch.equal(codes(x.float() * 4, inverse_steps(x.float() * 4, kind, 96), kind), want)
    assert want.abs().max() == (127 if kind == "int8" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_quantised_rows(kind):
    """Written out without autograd through the codes: what the loss of the quantised rows has as its gradient there."""
    (queries, candidates), targets, _ = problem(6, 9, 24, dtype=torch.float64)
    small = []
    for x in (queries, candidates):
        step = x.abs().amax(1, keepdim=True) / 127 if kind == "int8" else x.abs().mean(1, keepdim=True)
        rounded = torch.floor(x / step + 0.5) if kind == "int8" else torch.where(x > 0, 1.0, -1.0).double()
        small.append((step * rounded).requires_grad_())
    unit = [x / x.norm(dim=1, keepdim=True) for x in small]
    loss = torch.nn.functional.cross_entropy(20 * unit[0] @ unit[1].T, targets)
    loss.backward()
    got = ours([queries, candidates], targets, {"scale": 20.0, "quantize": kind})
    assert got[0].item() == pytest.approx(loss.item(), rel=1e-9)
    for mine, theirs in zip(got[1:3], small, strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefixes_are_cut_after_quantisation(kind, dtype):
    """The largest entry stands beyond the first prefix: its step is that of the whole row."""
    (queries, candidates), targets, chosen = problem(8, 13, 40, dtype=dtype, prefixes=(8, 32), quantize=kind)
    queries[:, 20] *= 30
    candidates[:, 33:] *= 1000  # beyond the last prefix, which plays no part
    assert_close(ours([queries, candidates], targets, chosen), [queries, candidates], targets, chosen)
    whole = straight_through(queries.float(), kind, 32)[:, :8]
    alone = straight_through(queries[:, :8].float(), kind, 8)
    same = torch.nn.functional.cosine_similarity(whole, alone)
    assert (same < 0.99).any() if kind == "int8" else torch.allclose(same, torch.ones(8))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_rows_that_are_no_numbers(kind):
    (queries, candidates), targets, chosen = problem(4, 6, 17, quantize=kind)
    candidates[5] = 0
    leaves = [queries.clone().requires_grad_(), candidates.clone().requires_grad_()]
    info_nce(*leaves, targets, scale=5.0, quantize=kind).backward()
    assert not leaves[1].grad[5].any() and leaves[1].grad[:5].abs().amax(1).min() > 0
    got, want = (f([queries, candidates], targets, chosen) for f in (ours, plain))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = queries.clone()
        spoilt[2, 3] = bad
        losses = info_nce(spoilt, candidates, targets, scale=5.0, quantize=kind, reduction="none", check_values=False)
        assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_workspace_gives_the_same(kind):
    """Codes of a few rows at a time, from one pass and from two."""
    given = problem(150, 300, 64, quantize=kind, directions=("query_to_doc", "query_to_query"))
    for workspace in (1 << 29, 300_000, 5_000):
        assert_close(ours(*given, workspace=workspace), *given)


def test_it_is_another_loss_than_that_of_the_floats():
    given = problem(7, 12, 17, quantize="binary")
    floats = problem(7, 12, 17)
    assert abs(float(plain(*given)[0] - plain(*floats)[0])) > 0.01


def test_an_unknown_kind_is_named():
    (queries, candidates), targets, _ = problem(4, 6, 17)
    with pytest.raises(ValueError, match='quantize is "int8", "binary" or None, got \'int4\''):
        info_nce(queries, candidates, targets, scale=1.0, quantize="int4")
