"""What the tests of attention share: float64 ground truth, inputs, and strategies for random packs."""

import torch
from hypothesis import strategies as st

from l2v_kernels.philox import DOMAIN_ATTENTION, keep_bytes, keep_scale, threshold

HEAD_DIMS = (64, 96, 128, 256)


def kept(seed, length, head, stream, dropout_p):
    """bool [t, t] from the definition of the mask's Philox key."""
    rows = torch.arange(length)
    data = keep_bytes(torch.as_tensor(seed).expand(length), rows, length, stream, head << 8 | DOMAIN_ATTENTION)
    return data >= threshold(dropout_p)


def plain(
    q, k, v, lengths, seeds_S=None, *, scale=None, dropout_p=0.0, stream=0, causal=False, window=None, softcap=None
):
    """Segment by segment and head by head in q's dtype: what anyone would write. Slow, and differentiable."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ratio, out, start = q.shape[1] // k.shape[1], [], 0
    for s, n in enumerate(lengths):
        part, heads = slice(start, start + n), []
        start += n
        distance = (torch.arange(n)[:, None] - torch.arange(n)).to(q.device)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance.abs() >= window
        for h in range(q.shape[1]):
            scores = q[part, h] @ k[part, h // ratio].t() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            if threshold(dropout_p):
                mask = kept(seeds_S[s].cpu(), n, h, stream, dropout_p).to(q.device)
                weights = weights * mask * keep_scale(dropout_p)
            heads.append(weights @ v[part, h // ratio])
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


def plain_gradients(q, k, v, do, lengths, seeds_S, dtype, **settings):
    """[o, dq, dk, dv] of `plain`, computed in dtype, as float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    o = plain(*leaves, lengths, seeds_S, **settings)
    o.backward(do.to(dtype))
    return [o.detach().double(), *(x.grad.double() for x in leaves)]


def assert_close_to_exact(got, q, k, v, do, lengths, seeds_S, **settings):
    """got = [o, dq, dk, dv]: an error of at most twice that of plain PyTorch in the same dtype, and rounding.

    The bar of FlashAttention 3's tests. For fp32, where a short sum may come out exact in one order, a few units in
    the last place of the largest number are allowed too.
    """
    exact = plain_gradients(q, k, v, do, lengths, seeds_S, torch.float64, **settings)
    same = plain_gradients(q, k, v, do, lengths, seeds_S, q.dtype, **settings)
    largest = max((x.abs().max() for x in exact if x.numel()), default=0.0)
    for name, ours, theirs, want in zip(("o", "dq", "dk", "dv"), got, same, exact, strict=True):
        assert ours.dtype == q.dtype and ours.shape == want.shape
        if not want.numel():
            continue
        rounded = want.to(q.dtype)
        bar = 2 * (theirs - want).abs().max() + 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().double()
        bar += 8 * torch.finfo(torch.float32).eps * largest
        if want.abs().max() < 1e-12 * largest:
            # No row has two keys, so its gradient is dO V^T - delta = 0, with a delta made of the rounded output.
            bar += torch.finfo(q.dtype).eps * largest**2
        error = (ours.double() - want).abs().max()
        assert error <= bar, f"{name}: error {error:.2e} over {bar:.2e} for {lengths} {settings}"


def inputs(lengths, H, K, D, dtype, seed=0, device="cpu"):
    """q, k, v, do, cu_seqlens and seeds_S."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    tensors = [torch.randn(T, n, D, generator=generator).to(device, dtype) for n in (H, K, K, H)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    seeds_S = torch.randint(-(2**62), 2**62, (len(lengths),), generator=generator).to(device)
    return *tensors, cu_seqlens, seeds_S


def layouts(longest=70, total=120):
    """Lists of segment lengths: mostly short, with empty and single-token segments and some longer than a tile."""
    length = st.one_of(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33]), st.integers(0, longest))
    return st.lists(length, min_size=1, max_size=9).map(lambda x: _cut(x, total))


def _cut(lengths, total):
    out = []
    for n in lengths:
        out.append(min(n, total - sum(out)))
    return out


def settings():
    """Keyword arguments of attention: most of the time few of them."""
    choice = {
        "causal": st.booleans(),
        "dropout_p": st.sampled_from([0.0, 0.1, 0.3]),
        "stream": st.sampled_from([0, 5, 2**31 - 1]),
    }
    rare = {
        "window": st.integers(1, 40),
        "softcap": st.sampled_from([1.5, 30.0]),
        "scale": st.sampled_from([0.05, 0.3]),
    }
    return st.fixed_dictionaries(choice, optional=rare)
