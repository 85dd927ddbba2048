"""InfoNCE on a GPU: both variants against float64, memory, the same bits, and no wait for the device."""

import pytest
import torch
from support.info_nce_cases import VARIANTS, assert_close, ours, problem

from l2v_kernels import info_nce

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WAYS = ["chunked", "fused"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("workspace", [512 << 20, 300_000])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_options(variant, dtype, way, workspace):
    given = problem(150, 333, 129, dtype=dtype, device="cuda", **VARIANTS[variant])
    assert_close(ours(*given, variant=way, workspace=workspace), *given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "M", "E"), [(1, 2, 17), (64, 64, 64), (257, 513, 1024), (100, 2000, 4096), (1000, 1000, 384)]
)
def test_sizes(N, M, E, dtype, way):
    given = problem(N, M, E, dtype=dtype, scale=50.0, device="cuda", ids=1)
    assert_close(ours(*given, variant=way), *given)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefixes", [(16, 64, 256), (7, 100, 511), (32, 64, 128, 256, 384, 512)])
def test_prefixes(prefixes, way):
    given = problem(300, 700, 512, dtype=torch.bfloat16, device="cuda", ids=1, prefixes=prefixes)
    assert_close(ours(*given, variant=way), *given)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_every_time(way):
    given = problem(
        700, 1900, 256, dtype=torch.bfloat16, device="cuda", **VARIANTS["everything"] | {"prefixes": (64, 256)}
    )
    first, *others = (ours(*given, variant=way, workspace=2 << 20) for _ in range(3))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_nothing_waits_for_the_device(variant, way):
    given = problem(64, 200, 64, dtype=torch.bfloat16, device="cuda", **VARIANTS[variant])
    tensors, targets, chosen = given
    ours(*given, variant=way)  # compiles, and copies the prefixes over once
    leaves = [x.clone().requires_grad_() for x in tensors]
    more = {"all_queries_QE": leaves[2]} if len(leaves) == 3 else {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        info_nce(*leaves[:2], targets, variant=way, **chosen, **more).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("way", WAYS)
def test_memory_beyond_inputs_and_gradients_is_the_workspace_and_the_sums(way):
    N, E = 16384, 1024
    leaves = [torch.randn(N, E, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    targets = torch.arange(N, device="cuda")
    info_nce(*(x[:256] for x in leaves), targets[:256], scale=20, variant=way).backward()
    for x in leaves:
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(*leaves, targets, scale=20, variant=way, workspace=128 << 20).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 2 * N * E * 2
    # The candidates' gradient is summed in fp32; the scores would be 1 GiB.
    assert extra < gradients + N * E * 4 + (128 << 20) + (48 << 20)


def test_unchecked_bad_values_give_nan_and_no_fault():
    (queries, candidates), targets, _ = problem(40, 90, 64, dtype=torch.bfloat16, device="cuda")
    for way in WAYS:
        wrong = targets.clone()
        wrong[3], wrong[7] = 90, -5
        losses = info_nce(queries, candidates, wrong, scale=20, reduction="none", variant=way)
        assert losses.isnan().nonzero().flatten().tolist() == [3, 7]
        bad = queries.clone()
        bad[5, 2] = float("nan")
        losses = info_nce(bad, candidates, targets, scale=20, reduction="none", variant=way)
        assert losses.isnan().nonzero().flatten().tolist() == [5]


def test_values_are_checked_where_asked(monkeypatch):
    (queries, candidates), targets, _ = problem(4, 6, 32, device="cuda")
    queries[1, 3] = float("inf")
    monkeypatch.setenv("L2V_CHECK", "1")
    with pytest.raises(ValueError, match=r"queries: row 1 holds NaN or Inf \(inf at 3\)"):
        info_nce(queries, candidates, targets, scale=20)


def test_fp64_takes_the_slow_path():
    given = problem(5, 9, 24, dtype=torch.float64, device="cuda", **VARIANTS["gte"])
    assert_close(ours(*given), *given)
