import itertools
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.attention_cases import HEAD_DIMS, assert_close_to_exact, layouts, plain, settings
from support.attention_cases import inputs as random_inputs

from l2v_kernels import AttentionPlan, attention
from l2v_kernels.attention import batched
from l2v_kernels.attention.reference import attention_reference
from l2v_kernels.attention.settings import Settings
from l2v_kernels.attention.tables import TokenTables

LENGTHS = [5, 0, 17, 1, 5, 33, 1, 17, 2]
SETTINGS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 4},
    "causal window": {"causal": True, "window": 4},
    "softcap": {"softcap": 1.5},
    "softcap causal": {"softcap": 1.5, "causal": True},
    "scale": {"scale": 0.3},
    "dropout": {"dropout_p": 0.3, "stream": 5},
    "all": {"dropout_p": 0.1, "stream": 31, "softcap": 2.0, "causal": True, "window": 9, "scale": 0.5},
}


def inputs(lengths=LENGTHS, H=8, K=4, D=16, dtype=torch.float32):
    T = sum(lengths)
    tensors = [torch.randn(T, n, D).to(dtype).requires_grad_() for n in (H, K, K)]
    return (
        tensors,
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.randint(-(2**62), 2**62, (len(lengths),)),
    )


@pytest.mark.parametrize("chosen", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_output_and_gradients_against_float64(chosen, kv_heads):
    qkv, cu_seqlens, seeds = inputs(K=kv_heads)
    grad = torch.randn(sum(LENGTHS), 8, 16)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    want = plain(*exact, LENGTHS, seeds_S=seeds, **chosen)
    want.backward(grad.double())
    got = attention(*qkv, cu_seqlens, seeds_S=seeds, **chosen)
    got.backward(grad)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 2e-6 * want.abs().max()
    for ours, theirs in zip(qkv, exact, strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 4e-6 * theirs.grad.abs().max()


@pytest.mark.parametrize("chosen", [SETTINGS["plain"], SETTINGS["dropout"]], ids=["plain", "dropout"])
def test_bf16_is_as_good_as_a_plain_bf16_softmax(chosen):
    (q, k, v), cu_seqlens, seeds = inputs(dtype=torch.bfloat16)
    want = plain(q.double(), k.double(), v.double(), LENGTHS, seeds_S=seeds, **chosen)
    same = plain(q, k, v, LENGTHS, seeds_S=seeds, **chosen)
    got = attention(q, k, v, cu_seqlens, seeds_S=seeds, **chosen)
    assert got.dtype == torch.bfloat16
    rounding = 2 * (want + 0.3 - 0.3 - want).abs().max()
    assert (got - want).abs().max() <= 2 * (same - want).abs().max() + rounding


@pytest.mark.parametrize("name", ["plain", "causal", "window", "dropout", "softcap"])
@pytest.mark.parametrize("lengths", [LENGTHS, [5, 5, 5, 2, 2]], ids=["shuffled", "grouped"])
def test_segments_are_isolated_bitwise(name, lengths):
    qkv, cu_seqlens, seeds = inputs(lengths)
    grad = torch.randn(sum(lengths), 8, 16)

    def run(tensors):
        tensors = [x.detach().clone().requires_grad_() for x in tensors]
        out = attention(*tensors, cu_seqlens, seeds_S=seeds, **SETTINGS[name])
        out.backward(grad)
        return [out.detach(), *(x.grad for x in tensors)]

    before = run(qkv)
    for segment, n in enumerate(lengths):
        if n == 0:
            continue
        inside = slice(int(cu_seqlens[segment]), int(cu_seqlens[segment + 1]))
        changed = [x.detach().clone() for x in qkv]
        for x in changed:
            x[inside] = 100 * torch.randn_like(x[inside])
        after = run(changed)
        for x, y in zip(before, after, strict=True):
            same = (x == y).flatten(1).all(1)
            same[inside] = True
            assert same.all()
        assert not torch.equal(before[0][inside], after[0][inside])


def test_dropout_does_not_depend_on_the_pack():
    (q, k, v), cu_seqlens, seeds = inputs([4, 9, 4])
    chosen = {"dropout_p": 0.3, "stream": 2}
    packed = attention(q, k, v, cu_seqlens, seeds_S=seeds, **chosen)
    alone = attention(q[4:13], k[4:13], v[4:13], torch.tensor([0, 9], dtype=torch.int32), seeds_S=seeds[1:2], **chosen)
    torch.testing.assert_close(packed[4:13], alone)
    other_stream = attention(q, k, v, cu_seqlens, seeds_S=seeds, dropout_p=0.3, stream=3)
    assert not torch.allclose(packed, other_stream)


def test_heads_and_positions_have_their_own_masks():
    v = torch.eye(32)[:, None]
    q = torch.zeros(32, 2, 32)
    weights = attention(q, q[:, :1], v, torch.tensor([0, 32]), dropout_p=0.5, seeds_S=torch.tensor([3]))
    assert not torch.equal(weights[:, 0], weights[:, 1])
    assert not torch.equal(weights[0, 0], weights[1, 0])
    assert 0.45 < (weights == 0).double().mean() < 0.55


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1, 0]])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_tiny_packs(lengths, dropout_p):
    qkv, cu_seqlens, seeds = inputs(lengths)
    out = attention(*qkv, cu_seqlens, dropout_p=dropout_p, seeds_S=seeds)
    out.sum().backward()
    assert out.shape == (sum(lengths), 8, 16)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in qkv)
    if lengths and sum(lengths) and not dropout_p:
        torch.testing.assert_close(out, qkv[2].repeat_interleave(2, 1))


def test_strided_views_and_a_prepared_plan():
    (q, k, v), cu_seqlens, _ = inputs()
    transposed = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    plan = AttentionPlan.from_lengths(LENGTHS)
    torch.testing.assert_close(attention(*transposed, cu_seqlens, plan=plan), attention(q, k, v, cu_seqlens))


def test_plan_groups_equal_lengths():
    plan = AttentionPlan.from_cu_seqlens(torch.tensor([0, 2, 2, 5, 7], dtype=torch.int32))
    assert plan.lengths == (2, 0, 3, 2) and plan.n_tokens == 7 and plan.n_segments == 4
    assert [group.length for group in plan.groups] == [2, 3]
    assert plan.groups[0].tokens_st.tolist() == [[0, 1], [5, 6]] and plan.groups[0].segments_s.tolist() == [
        0,
        3,
    ]
    assert plan.order_T.tolist() == [0, 1, 5, 6, 2, 3, 4]
    assert torch.equal(plan.order_T[plan.inverse_T], torch.arange(7))
    assert AttentionPlan.from_lengths([2, 2, 3]).order_T is None


@pytest.mark.parametrize("bounds", [[1, 2], [0, 3, 2], [], [[0, 1]], [0.0, 1.0]])
def test_bad_cu_seqlens(bounds):
    bounds = torch.tensor(bounds)
    bounds = bounds if bounds.ndim == 1 and bounds.numel() and bounds.is_floating_point() else bounds.int()
    with pytest.raises(ValueError, match="cu_seqlens"):
        AttentionPlan.from_cu_seqlens(bounds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_THD": torch.zeros(6, 8)}, r"q \[T, H, D\]"),
        ({"v_TKD": torch.zeros(6, 4, 8)}, r"k \(6, 4, 16\), v \(6, 4, 8\)"),
        ({"q_THD": torch.zeros(6, 8, 32)}, "head dimension"),
        ({"q_THD": torch.zeros(7, 8, 16)}, "tokens"),
        ({"q_THD": torch.zeros(6, 6, 16)}, "multiple"),
        ({"q_THD": torch.zeros(6, 8, 16, dtype=torch.float64)}, "one floating dtype"),
        ({"cu_seqlens": torch.tensor([0, 4, 5])}, "do not describe"),
        ({"cu_seqlens": torch.tensor([0, 6]), "plan": AttentionPlan.from_lengths([4, 2])}, "do not describe"),
        ({"dropout_p": 1.0}, "drop probability"),
        ({"dropout_p": 0.3}, "seeds_S"),
        ({"dropout_p": 0.3, "seeds_S": torch.zeros(3, dtype=torch.int64)}, r"int64 \[2\]"),
        ({"dropout_p": 0.3, "seeds_S": torch.zeros(2)}, r"int64 \[2\]"),
        ({"stream": -1}, "stream"),
        ({"stream": 2**31}, "stream"),
        ({"v_TKD": torch.zeros(6, 4, 16, device="meta")}, "one device"),
        ({"window": 0}, "window"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_bad_input(change, message):
    kv = torch.zeros(6, 4, 16)
    good = {"q_THD": torch.zeros(6, 8, 16), "k_TKD": kv, "v_TKD": kv, "cu_seqlens": torch.tensor([0, 4, 6])}
    attention(**good)
    with pytest.raises(ValueError, match=message):
        attention(**{**good, **change})


@seed(0)
@hypothesis_settings(
    max_examples=300 if os.environ.get("L2V_SLOW") == "1" else 100,
    phases=[Phase.generate],
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_random_layouts(data):
    H, K = data.draw(st.sampled_from([(1, 1), (4, 1), (8, 1), (2, 2), (6, 2)]))
    lengths, D = data.draw(layouts(total=150)), data.draw(st.sampled_from(HEAD_DIMS))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    chosen = data.draw(settings())
    q, k, v, do, cu_seqlens, seeds = random_inputs(lengths, H, K, D, dtype, seed=sum(lengths) + D)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*leaves, cu_seqlens, seeds_S=seeds, **chosen)
    o.backward(do)
    got = [o.detach(), *(x.grad for x in leaves)]
    assert_close_to_exact(got, *(x.detach() for x in leaves), do, lengths, seeds, **chosen)


@pytest.mark.parametrize("name", ["plain", "causal window", "dropout", "all"])
def test_lse(name):
    (q, k, v), cu_seqlens, seeds = inputs(K=1)
    o, lse = attention(q, k, v, cu_seqlens, seeds_S=seeds, return_lse=True, **SETTINGS[name])
    torch.testing.assert_close(o, attention(q, k, v, cu_seqlens, seeds_S=seeds, **SETTINGS[name]))
    assert lse.shape == (8, sum(LENGTHS)) and lse.dtype == torch.float32 and not lse.requires_grad
    if name == "plain":
        first = (q[:5].transpose(0, 1) @ k[:5, 0].t() / 4).logsumexp(-1)
        torch.testing.assert_close(lse[:, :5], first)


def test_token_tables():
    tables = TokenTables.build(torch.tensor([0, 2, 2, 20, 23], dtype=torch.int32), 23)
    assert tables.segment_T.tolist() == [0] * 2 + [2] * 18 + [3] * 3
    assert tables.start_T.tolist() == [0] * 2 + [2] * 18 + [20] * 3
    assert tables.end_T.tolist() == [2] * 2 + [20] * 18 + [23] * 3
    assert tables.first_block_T.tolist() == [0] * 2 + [1] * 18 + [3] * 3
    assert tables.block_first_X.tolist() == [0, 2, 18, 20, 23]
    assert tables.block_end_X.tolist() == [2, 20, 20, 23, 23]


def test_plan_on_device_does_not_look_at_values(monkeypatch):
    bounds = torch.tensor([0, 5, 3, 9])
    plan = AttentionPlan.on_device(bounds, 9)
    assert (plan.n_segments, plan.n_tokens) == (3, 9) and plan.tables.n_tokens == 9
    with pytest.raises(ValueError, match="never decrease"):
        _ = plan.lengths
    with pytest.raises(ValueError, match="pack of 9"):
        _ = AttentionPlan.on_device(torch.tensor([0, 5]), 9).groups
    monkeypatch.setenv("L2V_CHECK", "1")
    with pytest.raises(ValueError, match="never decrease"):
        AttentionPlan.on_device(bounds, 9)
    with pytest.raises(ValueError, match="pack of 9"):
        AttentionPlan.on_device(torch.tensor([0, 5]), 9)
    assert AttentionPlan.on_device(torch.tensor([0, 5, 9]), 9).lengths == (5, 4)


def test_a_device_without_kernels():
    q = torch.zeros(6, 4, 64, device="meta")
    with pytest.raises(NotImplementedError, match=r"on CUDA with Triton.*\(6, 4, 64\)"):
        attention(q, q, q, torch.tensor([0, 6]))


@pytest.mark.parametrize("name", ["dropout", "softcap", "softcap causal", "all"])
@pytest.mark.parametrize("tile", [1, 4000], ids=["rows", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_like_lengths_in_tiles(name, tile, dtype, monkeypatch):
    """Also where a segment is so long that its rows are computed a few at a time, and keys outside the window never."""
    monkeypatch.setattr(batched, "TILE", tile)
    monkeypatch.setattr(batched, "MIN_ROWS", 3)
    lengths = [41, 0, 33, 38, 1, 7, 2, 41, 5]
    (q, k, v), cu_seqlens, seeds = inputs(lengths, H=6, K=2, D=24, dtype=dtype)
    grad = torch.randn(q.shape).to(dtype)
    out = attention(q, k, v, cu_seqlens, seeds_S=seeds, **SETTINGS[name])
    out.backward(grad)
    assert_close_to_exact([out, q.grad, k.grad, v.grad], q, k, v, grad, lengths, seeds, **SETTINGS[name])
    with torch.inference_mode():
        again = attention(q, k, v, cu_seqlens, seeds_S=seeds, **SETTINGS[name])
    assert torch.equal(again, out), "nothing is kept, and nothing else differs"


@pytest.mark.parametrize("lengths", [[9, 30, 12, 30, 31], [8, 8, 8]])
def test_the_dropout_mask_of_batches_is_the_references_bit_by_bit(lengths):
    """Queries of zeros weigh all keys alike, so with an identity as values the output is the mask."""
    T, most = sum(lengths), max(lengths)
    v = torch.cat([torch.eye(most)[:n] for n in lengths])[:, None].expand(T, 2, most)
    q, seeds = torch.zeros(T, 4, most), torch.randint(-(2**62), 2**62, (len(lengths),))
    plan, chosen = AttentionPlan.from_lengths(lengths), Settings(1.0, 0.4, 7)
    want = attention_reference(q, q[:, :2], v, plan, seeds, chosen)[0]
    got = attention(
        q,
        q[:, :2],
        v,
        torch.tensor([0, *lengths]).cumsum(0),
        plan=plan,
        scale=1.0,
        dropout_p=0.4,
        stream=7,
        seeds_S=seeds,
    )
    assert torch.equal(got != 0, want != 0) and 0.5 < (got[: lengths[0], :, : lengths[0]] != 0).double().mean() < 0.7
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@given(st.lists(st.integers(0, 70), max_size=30))
@hypothesis_settings(max_examples=60, deadline=None)
def test_like_lengths_hold_every_token_once(lengths):
    plan = AttentionPlan.from_lengths(lengths)
    starts, found, segments = [0, *itertools.accumulate(lengths)], [], []
    for batch in plan.like_lengths:
        longest = batch.tokens_st.shape[1]
        segments += batch.segments_s.tolist()
        assert longest == max(lengths[i] for i in batch.segments_s)
        for row, segment in enumerate(batch.segments_s.tolist()):
            n = lengths[segment]
            assert longest - n <= max(8, min(longest // 4, 16)), "few places are padding"
            own = batch.tokens_st[row].tolist()
            assert own[:n] == list(range(starts[segment], starts[segment] + n)) and set(own[n:]) <= {own[n - 1]}
            padding = [False] * longest if batch.padding_st is None else batch.padding_st[row].tolist()
            assert padding == [False] * n + [True] * (longest - n)
            found += own[:n]
        if batch.begin is not None:
            assert batch.tokens_st.flatten().tolist() == list(range(batch.begin, batch.begin + batch.tokens_st.numel()))
    assert sorted(found) == list(range(sum(lengths))) and sorted(segments) == [i for i, n in enumerate(lengths) if n]


@pytest.mark.parametrize("name", ["plain", "causal", "window", "dropout"])
def test_bf16_gradients_are_summed_in_fp32(name):
    """Nearer to float64 than a plain bf16 attention, and equal to that of the same numbers in fp32, rounded once."""
    (q, k, v), cu_seqlens, seeds = inputs([40, 17, 40], dtype=torch.bfloat16)
    grad = torch.randn(q.shape).bfloat16()
    attention(q, k, v, cu_seqlens, seeds_S=seeds, **SETTINGS[name]).backward(grad)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    attention(*wide, cu_seqlens, seeds_S=seeds, **SETTINGS[name]).backward(grad.float())
    for narrow, exact in zip((q, k, v), wide, strict=True):
        assert torch.equal(narrow.grad, exact.grad.bfloat16())
