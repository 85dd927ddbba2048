"""What only a GPU can show: bf16, the compiled kernels, full sizes, no host sync."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.attention_cases import HEAD_DIMS, assert_close_to_exact, inputs, kept, layouts

from l2v_kernels import AttentionPlan, attention, attention_padded, rope
from l2v_kernels.rope.reference import rope_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def run(q, k, v, do, cu_seqlens, seeds_S, **chosen):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, cu_seqlens, seeds_S=seeds_S, **chosen)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


# Each combination is a build of three kernels, and builds are what these tests take their time for.
CASES = [(torch.bfloat16, 4, 1, D) for D in HEAD_DIMS]
CASES += [(torch.bfloat16, H, K, 64) for H, K in ((2, 2), (8, 1), (6, 2))]
CASES += [(torch.float16, 4, 1, 128), (torch.float32, 4, 1, 64), (torch.float32, 2, 1, 128)]


@pytest.mark.parametrize(("dtype", "H", "K", "D"), CASES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[30, 0, 17, 1, 41, 5, 64], [300, 1, 517]], ids=["short", "long"])
def test_against_float64(lengths, dropout_p, D, H, K, dtype):
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, H, K, D, dtype, device="cuda")
    got = run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=dropout_p)
    assert_close_to_exact(got, q, k, v, do, lengths, seeds_S, dropout_p=dropout_p)


@seed(0)
@hypothesis_settings(
    max_examples=150, phases=[Phase.generate], deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(layouts(longest=200, total=300), st.booleans(), st.sampled_from([0.0, 0.1, 0.3]))
def test_random_layouts(lengths, causal, dropout_p):
    chosen = {"causal": causal, "dropout_p": dropout_p, "stream": 7}
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, 4, 1, 64, torch.bfloat16, seed=sum(lengths), device="cuda")
    assert_close_to_exact(run(q, k, v, do, cu_seqlens, seeds_S, **chosen), q, k, v, do, lengths, seeds_S, **chosen)


@pytest.mark.parametrize("chosen", [{"window": 20}, {"softcap": 5.0}, {"window": 20, "causal": True}], ids=str)
def test_rare_settings(chosen):
    lengths = [70, 1, 33]
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, 4, 2, 128, torch.bfloat16, device="cuda")
    assert_close_to_exact(run(q, k, v, do, cu_seqlens, seeds_S, **chosen), q, k, v, do, lengths, seeds_S, **chosen)


def test_dropout_mask_bit_for_bit():
    lengths = [7, 0, 40, 1, 19, 64, 3]
    q, k, v, _do, cu_seqlens, seeds_S = inputs(lengths, 4, 2, 64, torch.bfloat16, device="cuda")
    rows = torch.cat([torch.arange(n) for n in lengths])
    v = torch.eye(64)[rows][:, None].expand(-1, 2, -1).to(q)
    o = attention(torch.zeros_like(q), k, v, cu_seqlens, dropout_p=0.3, seeds_S=seeds_S, stream=9).cpu()
    for s, part in enumerate(o.split(lengths)):
        for h in range(4):
            assert torch.equal(part[:, h, : lengths[s]] != 0, kept(seeds_S[s].cpu(), lengths[s], h, 9, 0.3))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_isolated_and_the_same_every_time(dropout_p):
    lengths = [30, 17, 0, 1, 200, 41, 5]
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, 8, 2, 128, torch.bfloat16, device="cuda")
    before = run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=dropout_p)
    for _ in range(3):
        again = run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=dropout_p)
        assert all(torch.equal(x, y) for x, y in zip(before, again, strict=True))
    inside = slice(int(cu_seqlens[4]), int(cu_seqlens[5]))
    for x in (q, k, v, do):
        x[inside] = 30 * torch.randn_like(x[inside])
    for x, y in zip(before, run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=dropout_p), strict=True):
        same = (x == y).flatten(1).all(1)
        same[inside] = True
        assert same.all() and not torch.equal(x[inside], y[inside])


def test_nothing_waits_for_the_device():
    lengths = [30, 17, 200, 41]
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, 8, 2, 128, torch.bfloat16, device="cuda")
    run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=0.3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=0.3)
        plan = AttentionPlan.from_lengths(lengths, "cuda")
        run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=0.3, plan=plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_segments_past_two_to_the_31_elements():
    lengths, H, K, D = [3, 2, 4, 2], 4, 1, 64
    far = torch.empty_strided((11, H + 2 * K, D), (2**28, D, 1), dtype=torch.bfloat16, device="cuda")
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, H, K, D, torch.bfloat16, device="cuda")
    views = far.split([H, K, K], 1)
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    got = run(*views, do, cu_seqlens, seeds_S, dropout_p=0.3)
    assert all(
        torch.equal(x, y) for x, y in zip(got, run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=0.3), strict=True)
    )


def test_wrong_segments_give_nan_and_no_fault():
    q, k, v, do, _, seeds_S = inputs([4, 8, 8], 2, 1, 64, torch.bfloat16, device="cuda")
    for bounds in ([0, 12, 4, 20], [0, 4, 12, 19], [1, 4, 12, 20], [0, 4, 12, 99], [-5, 4, 12, 20]):
        for dropout_p in (0.0, 0.3):
            o, *_ = run(q, k, v, do, torch.tensor(bounds, device="cuda"), seeds_S, dropout_p=dropout_p)
            assert o.isnan().all()
    torch.cuda.synchronize()


def test_padded_and_rope_agree_with_the_cpu():
    q, k, v = (torch.randn(3, n, 20, 64) for n in (4, 2, 2))
    mask = torch.rand(3, 20) < 0.6
    want = attention_padded(q, k, v, mask)
    got = attention_padded(q.cuda(), k.cuda(), v.cuda(), mask.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    x, cos, sin = torch.randn(50, 4, 128), torch.randn(50, 128), torch.randn(50, 128)
    for dtype in DTYPES:
        for inplace in (False, True):
            moved = x.to("cuda", dtype)
            got, _ = rope(moved, moved[:, :1].clone(), cos.cuda(), sin.cuda(), inplace=inplace)
            exact = rope_reference(x.to(dtype).double(), cos.double(), sin.double(), False)
            error = (got.cpu().double() - exact).abs()
            assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs().clamp(min=1)).all()
            assert (got.data_ptr() == moved.data_ptr()) == inplace


def test_a_search(monkeypatch, tmp_path):
    monkeypatch.setenv("L2V_AUTOTUNE", "1")
    monkeypatch.setenv("L2V_CACHE", str(tmp_path))
    lengths = [30] * 40
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, 4, 1, 64, torch.bfloat16, device="cuda")
    got = run(q, k, v, do, cu_seqlens, seeds_S)
    assert_close_to_exact(got, q, k, v, do, lengths, seeds_S)
    assert len(list((tmp_path / "attention").iterdir())) == 1
