"""The Triton kernels of packed attention under the interpreter, in fp32 and fp16 (it gets bf16 matmuls wrong)."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.attention_cases import HEAD_DIMS, assert_close_to_exact, inputs, kept, layouts, settings

pytest.importorskip("triton")

from l2v_kernels import attention
from l2v_kernels.attention import AttentionPlan, launch
from l2v_kernels.attention.config import Config
from l2v_kernels.attention.settings import Settings
from l2v_kernels.attention.tables import TokenTables

# Empty, of one token, longer than a block of keys, and an end inside a block.
LENGTHS = [5, 0, 17, 1, 33, 2]
SMALL = Config(32, 32, 4, 1)
TILES = Config(32, 32, 4, 1, tma=True)
"""Through tensor descriptors, as on sm_90 and later without dropout."""
CONFIGS = [SMALL, Config(16, 16, 4, 1), Config(32, 16, 4, 1), Config(16, 64, 4, 1), Config(64, 32, 4, 1)]


def run(q, k, v, do, cu_seqlens, seeds_S, config=SMALL, **chosen):
    """[o, dq, dk, dv] and lse of the kernels, [o] without `do`; every buffer starts as NaN, so what is not written shows."""
    chosen.setdefault("scale", q.shape[-1] ** -0.5)
    chosen = Settings(**chosen)
    tables = TokenTables.build(cu_seqlens, q.shape[0])
    empty, empty_like = torch.empty, torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))
        patch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(float("nan")))
        o, lse = launch.forward(q, k, v, tables, seeds_S, chosen, config)
        if do is None:
            return [o], lse
        gradients = launch.backward(do, q, k, v, o, lse, tables, seeds_S, chosen, (config, config))
    return [o, *gradients], lse


def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


def check(data):
    H, K = data.draw(st.sampled_from([(1, 1), (4, 1), (8, 1), (4, 2), (2, 2), (3, 1), (6, 1)]))
    D = data.draw(st.sampled_from([64, 64, *HEAD_DIMS]))
    lengths = data.draw(layouts(total=70 if H * D <= 256 else 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    config = data.draw(st.sampled_from(CONFIGS))
    chosen = data.draw(settings())
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, H, K, D, dtype, seed=sum(lengths) + D)
    got, _ = run(q, k, v, do, cu_seqlens, seeds_S, config, **chosen)
    assert_close_to_exact(got, q, k, v, do, lengths, seeds_S, **chosen)


RANDOM = {"phases": [Phase.generate], "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@seed(0)
@hypothesis_settings(max_examples=8, **RANDOM)
@given(st.data())
def test_interpreted_random_layouts(data):
    check(data)


if os.environ.get("L2V_SLOW") == "1":

    @seed(1)
    @hypothesis_settings(max_examples=300, **RANDOM)
    @given(st.data())
    def test_interpreted_many_random_layouts(data):
        check(data)


# Every head dimension and both precisions; each with each only where time is given.
HEADS = [(64, 4, 1, torch.float16), (96, 2, 1, torch.float32), (128, 2, 1, torch.float16), (256, 2, 1, torch.float32)]
if os.environ.get("L2V_SLOW") == "1":
    ratios = [(1, 1), (4, 1), (8, 1)]
    HEADS = [(D, *ratio, dtype) for D in HEAD_DIMS for ratio in ratios for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(("D", "H", "K", "dtype"), HEADS)
def test_interpreted_head_dims_and_ratios(D, H, K, dtype):
    lengths = [0, 9, 1, 20]
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, H, K, D, dtype)
    got, _ = run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=0.3)
    assert_close_to_exact(got, q, k, v, do, lengths, seeds_S, dropout_p=0.3)


@pytest.mark.parametrize("D", [8, 16, 40, 80])
def test_interpreted_other_head_dims(D):
    q, k, v, do, cu_seqlens, seeds_S = inputs(LENGTHS, 2, 1, D, torch.float32)
    got, _ = run(q, k, v, do, cu_seqlens, seeds_S, causal=True)
    assert_close_to_exact(got, q, k, v, do, LENGTHS, seeds_S, causal=True)


@pytest.mark.parametrize(("H", "K", "D"), [(4, 1, 64), (2, 2, 96)])
def test_interpreted_tensor_descriptors(H, K, D):
    """Odd lengths, empty segments and segments of one token, in slices of one packed buffer."""
    lengths = [5, 0, 17, 1, 33, 2]
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, H, K, D, torch.float16)
    q, k, v = torch.cat([q, k, v], 1).split([H, K, K], 1)
    assert launch.can_tma(q, k, v, do)
    got, lse = run(q, k, v, do, cu_seqlens, seeds_S, TILES)
    assert_close_to_exact(got, q, k, v, do, lengths, seeds_S)
    # Pointers read the same numbers: not a bit differs.
    plain, plain_lse = run(q, k, v, do, cu_seqlens, seeds_S)
    assert torch.equal(lse, plain_lse) and all(torch.equal(x, y) for x, y in zip(got, plain, strict=True))


@pytest.mark.parametrize("lengths", [[0, 0], [1], [0, 1, 0], [64]])
def test_interpreted_tensor_descriptors_at_the_edges(lengths):
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, 2, 1, 64, torch.float16)
    got, _ = run(q, k, v, do, cu_seqlens, seeds_S, TILES)
    assert_close_to_exact(got, q, k, v, do, lengths, seeds_S)


def test_interpreted_negative_scale():
    """The largest dot is the smallest score then, so the scale cannot be folded into the exponent."""
    q, k, v, do, cu_seqlens, seeds_S = inputs([9, 1], 2, 1, 64, torch.float16)
    got, _ = run(30 * q, k, v, do, cu_seqlens, seeds_S, scale=-1.0)
    assert_close_to_exact(got, 30 * q, k, v, do, [9, 1], seeds_S, scale=-1.0)


def test_interpreted_tensor_descriptors_need_aligned_rows():
    x = torch.zeros(4, 2, 64, dtype=torch.float16)
    assert launch.can_tma(x, x[1:])
    assert not launch.can_tma(x, x.float())
    assert not launch.can_tma(torch.zeros(4 * 2 * 64 + 1, dtype=torch.float16)[1:].view(4, 2, 64))
    assert not launch.can_tma(torch.zeros(4, 2, 68, dtype=torch.float16)[..., :64])
    assert not launch.can_tma(x[:1].expand(4, 2, 64))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3] if os.environ.get("L2V_SLOW") == "1" else [0.3])
@pytest.mark.parametrize("lengths", [[0, 0], [1], [1] * 18, [0, 1, 0], [64], [16, 16], [70]])
def test_interpreted_edge_layouts(lengths, dropout_p):
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, 2, 1, 64, torch.float32)
    got, _ = run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=dropout_p)
    assert_close_to_exact(got, q, k, v, do, lengths, seeds_S, dropout_p=dropout_p)


@pytest.mark.parametrize("chosen", [{}, {"causal": True, "window": 7}], ids=["plain", "causal window"])
def test_interpreted_dropout_mask_is_the_references_bit_for_bit(chosen):
    """Weights are uniform for q = 0, and values that are unit vectors bring each of them out on its own."""
    lengths = [7, 0, 40, 1, 19, 64, 3]
    q, k, v, _, cu_seqlens, seeds_S = inputs(lengths, 4, 2, 64, torch.float32)
    rows = torch.cat([torch.arange(n) for n in lengths])
    v = torch.eye(64)[rows][:, None].expand(-1, 2, -1)
    (o,), _ = run(torch.zeros_like(q), k, v, None, cu_seqlens, seeds_S, dropout_p=0.3, stream=9, **chosen)
    fractions = []
    for s, part in enumerate(o.split(lengths)):
        n = lengths[s]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        see = ((distance >= 0) & (distance < 7)) if chosen else torch.ones(n, n, dtype=torch.bool)
        for h in range(4):
            mask = kept(seeds_S[s], n, h, 9, 0.3)
            assert torch.equal(part[:, h, :n] != 0, mask & see)
            fractions.append(mask.double().flatten())
    assert abs(torch.cat(fractions).mean() - 179 / 256) < 0.01


@pytest.mark.parametrize("chosen", [{}, {"dropout_p": 0.3}, {"causal": True}, {"window": 5}], ids=str)
def test_interpreted_segments_are_isolated_bitwise(chosen):
    q, k, v, do, cu_seqlens, seeds_S = inputs(LENGTHS, 2, 1, 64, torch.float16)
    before, _ = run(q, k, v, do, cu_seqlens, seeds_S, **chosen)
    assert all(
        torch.equal(x, y) for x, y in zip(before, run(q, k, v, do, cu_seqlens, seeds_S, **chosen)[0], strict=True)
    )
    for segment in (2, 4):
        inside = slice(int(cu_seqlens[segment]), int(cu_seqlens[segment + 1]))
        changed = [x.clone() for x in (q, k, v, do)]
        for x in changed:
            x[inside] = 30 * torch.randn_like(x[inside])
        after, _ = run(*changed, cu_seqlens, seeds_S, **chosen)
        for x, y in zip(before, after, strict=True):
            same = (x == y).flatten(1).all(1)
            same[inside] = True
            assert same.all()
            assert not torch.equal(x[inside], y[inside])


def test_interpreted_a_segment_is_the_same_in_any_pack():
    q, k, v, do, cu_seqlens, seeds_S = inputs([37], 2, 1, 64, torch.float32)
    alone, _ = run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=0.3, stream=2)
    for before, after in (([3], [20]), ([1, 0, 29], [2]), ([32], [])):
        lengths = [*before, 37, *after]
        *others, cu_seqlens, seeds = inputs(lengths, 2, 1, 64, torch.float32, seed=1)
        inside, seeds[len(before)] = slice(sum(before), sum(before) + 37), seeds_S[0]
        for other, x in zip(others, (q, k, v, do), strict=True):
            other[inside] = x
        packed, _ = run(*others, cu_seqlens, seeds, dropout_p=0.3, stream=2)
        for x, y in zip(packed, alone, strict=True):
            torch.testing.assert_close(x[inside], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", [{}, {"causal": True, "softcap": 2.0, "dropout_p": 0.3}], ids=str)
def test_interpreted_lse(chosen):
    q, k, v, _, cu_seqlens, seeds_S = inputs(LENGTHS, 4, 2, 64, torch.float32)
    _, lse = run(q, k, v, None, cu_seqlens, seeds_S, **chosen)
    _, want = attention(q, k, v, cu_seqlens, seeds_S=seeds_S, return_lse=True, **chosen)
    assert lse.shape == (4, sum(LENGTHS))
    torch.testing.assert_close(lse, want)


def test_interpreted_segments_past_two_to_the_31_elements():
    """Tokens 2**28 elements apart: the ninth starts at 2**31. Only the touched pages of the 4 GB are ever real."""
    lengths, H, K, D = [3, 2, 4, 2], 2, 1, 64
    far = torch.empty_strided((11, H + 2 * K, D), (2**28, D, 1), dtype=torch.float16)
    q, k, v, do, cu_seqlens, seeds_S = inputs(lengths, H, K, D, torch.float16)
    views = far.split([H, K, K], 1)
    for view, x in zip(views, (q, k, v), strict=True):
        view.copy_(x)
    far_do = torch.empty_strided(do.shape, (2**28, D, 1), dtype=torch.float16)
    far_do.copy_(do)
    got, _ = run(*views, far_do, cu_seqlens, seeds_S, dropout_p=0.3)
    want, _ = run(q, k, v, do, cu_seqlens, seeds_S, dropout_p=0.3)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_interpreted_wrong_segments_give_nan_and_no_fault():
    q, k, v, do, _cu_seqlens, seeds_S = inputs([4, 8, 8], 2, 1, 64, torch.float32)
    for bounds in ([0, 12, 4, 20], [0, 4, 12, 19], [1, 4, 12, 20], [0, 4, 12, 99], [-5, 4, 12, 20]):
        for dropout_p in (0.0, 0.3):
            (o, *_), _ = run(q, k, v, do, torch.tensor(bounds), seeds_S, dropout_p=dropout_p)
            assert o.isnan().all()


def test_interpreted_autograd_path():
    """The public function's Triton branch, forward and backward, on tensors that claim to be on a GPU."""

    class OnDevice(torch.Tensor):
        is_cuda = True

    q, k, v, do, cu_seqlens, seeds_S = inputs(LENGTHS, 4, 2, 64, torch.float32)
    leaves = [x.as_subclass(OnDevice).requires_grad_() for x in (q, k, v)]
    plan = AttentionPlan.from_lengths(LENGTHS)
    o, lse = attention(*leaves, cu_seqlens, seeds_S=seeds_S, dropout_p=0.1, plan=plan, return_lse=True)
    assert not lse.requires_grad
    o.backward(do)
    got = [x.as_subclass(torch.Tensor) for x in (o.detach(), *(x.grad for x in leaves))]
    assert_close_to_exact(got, q, k, v, do, LENGTHS, seeds_S, dropout_p=0.1)
    with pytest.raises(NotImplementedError, match="multiples of 8"):
        attention(*(x.as_subclass(OnDevice)[..., :60] for x in (q, k, v)), cu_seqlens, plan=plan)
    with pytest.warns(RuntimeWarning, match="fp64 has no kernel"):
        attention(*(x.double().as_subclass(OnDevice) for x in (q, k, v)), cu_seqlens, plan=plan)
