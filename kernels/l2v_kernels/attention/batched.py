"""Attention with dropout or a softcap on a CPU: segments of like length in one batched matmul, forward and backward.

PyTorch's flash kernel has neither, and an operation of torch for each length costs more than the arithmetic: texts of a batch
have about as many lengths as there are texts. Here a batch is a handful of calls. All sums are in fp32, whatever the dtype of the
inputs: a CPU multiplies bf16 into bf16, and a score rounded to 8 bits is a wrong weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.attention.plan import AttentionPlan, LikeLengths
from l2v_kernels.attention.settings import Settings
from l2v_kernels.philox import DOMAIN_ATTENTION, keep_bytes, keep_scale, threshold

TILE = 1 << 19
"""Scores of a tile, 2 MiB: what softmax, dropout and the matmuls around them read again is still in a cache."""
MIN_ROWS = 32
"""Tokens of a tile at least: fewer rows make matmuls slow."""


@dataclass(frozen=True)
class Tile:
    """Segments, query rows and the keys that these may see, as slices of a batch of like lengths."""

    segments: slice
    rows: slice
    keys: slice

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """A view [n K, rows G, D] of [s, K, t, G, D]."""
        return x[self.segments, :, self.rows].flatten(2, 3).flatten(0, 1)

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """A view [n K, keys, D] of [s, K, t, 1, D]."""
        return x[self.segments, :, self.keys].flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True)
class Kept:
    """Of a tile, for the backward: weights fp32 before dropout [n K, rows G, keys], bool where kept, tanh of a softcap."""

    weights: torch.Tensor
    kept: torch.Tensor | None
    bent: torch.Tensor | None


class BatchedAttention(torch.autograd.Function):
    """o [T, H, D]. Kept for the backward: q, k, v, and for each segment and head weights and dropout mask [t, t]."""

    @staticmethod
    def forward(ctx, q_THD, k_TKD, v_TKD, plan: AttentionPlan, seeds_S, settings: Settings):
        with torch.autocast("cpu", enabled=False):
            o_THD, kept = forward(q_THD, k_TKD, v_TKD, plan, seeds_S, settings, keep=any(ctx.needs_input_grad))
        ctx.plan, ctx.settings = plan, settings
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, *(x for tile in kept for x in (tile.weights, tile.kept, tile.bent)))
        return o_THD

    @staticmethod
    @once_differentiable
    def backward(ctx, do_THD):
        q_THD, k_TKD, v_TKD, *rest = ctx.saved_tensors
        kept = [Kept(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
        with torch.autocast("cpu", enabled=False):
            return *backward(do_THD, q_THD, k_TKD, v_TKD, kept, ctx.plan, ctx.settings), None, None, None


def forward(
    q_THD, k_TKD, v_TKD, plan: AttentionPlan, seeds_S, settings: Settings, *, keep: bool
) -> tuple[torch.Tensor, list[Kept]]:
    """o [T, H, D], and with `keep` what the backward needs of all tiles in turn. Arguments as in `attention`."""
    H, K = q_THD.shape[1], k_TKD.shape[1]
    o_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    kept: list[Kept] = []
    for batch in plan.like_lengths:
        q, k, v = (_gather(x, batch, K) for x in (q_THD, k_TKD, v_TKD))
        o = torch.empty_like(q)
        for tile in _tiles(batch, H, settings):
            scores, bent = _scores(tile.of_rows(q), tile.of_keys(k), settings)
            _hide(scores, batch, tile, K, settings)
            weights = shares = torch.softmax(scores, -1)
            survives = None
            if threshold(settings.dropout_p):
                survives = _survives(batch, tile, seeds_S, (K, H // K), settings).view(weights.shape)
                shares = torch.mul(weights, _factor(survives, settings), out=scores)  # which nobody reads again
            tile.of_rows(o).baddbmm_(shares, tile.of_keys(v), beta=0)
            if keep:
                kept.append(Kept(weights, survives, bent))
        _put(o_THD, o, batch)
    return o_THD, kept


def backward(do_THD, q_THD, k_TKD, v_TKD, kept: list[Kept], plan: AttentionPlan, settings: Settings):
    """(dq [T, H, D], dk [T, K, D], dv [T, K, D]) in the dtypes of q, k and v. kept: of `forward`."""
    H, K, left = q_THD.shape[1], k_TKD.shape[1], iter(kept)
    found = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q_THD, k_TKD, v_TKD))
    for batch in plan.like_lengths:
        q, k, v, do = (_gather(x, batch, K) for x in (q_THD, k_TKD, v_TKD, do_THD))
        if batch.padding_st is not None:  # a place beyond a text's end holds a copy of its last token
            do.masked_fill_(batch.padding_st[:, None, :, None, None], 0.0)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile in _tiles(batch, H, settings):
            of, do_tile = next(left), tile.of_rows(do)
            dweights, shares = torch.bmm(do_tile, tile.of_keys(v).transpose(1, 2)), of.weights
            if of.kept is not None:
                factor = _factor(of.kept, settings)
                dweights.mul_(factor)
                shares = factor.mul_(of.weights)
            tile.of_keys(dv).baddbmm_(shares.transpose(1, 2), do_tile)
            dscores = torch._softmax_backward_data(dweights, of.weights, -1, of.weights.dtype)
            if of.bent is not None:  # of cap * tanh(x / cap): 1 - tanh(x / cap)^2
                dscores.mul_(1 - of.bent.square())
            tile.of_rows(dq).baddbmm_(dscores, tile.of_keys(k), beta=0, alpha=settings.scale)
            tile.of_keys(dk).baddbmm_(dscores.transpose(1, 2), tile.of_rows(q), alpha=settings.scale)
        for out, gradient in zip(found, (dq, dk, dv), strict=True):
            _put(out, gradient, batch)
    return found


def _factor(kept: torch.Tensor, settings: Settings) -> torch.Tensor:
    """0 where dropped, else what scales the rest up. Multiplying by numbers takes a third of filling by a mask."""
    return kept.to(torch.float32).mul_(keep_scale(settings.dropout_p))


def _scores(q, k, settings: Settings) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores [n K, rows G, keys] before anything is hidden, and with a softcap tanh(scores / cap)."""
    scores = torch.empty(q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=settings.scale, out=scores)
    if settings.softcap is None:
        return scores, None
    bent = scores.div_(settings.softcap).tanh_()
    return bent * settings.softcap, bent


def _hide(scores, batch: LikeLengths, tile: Tile, K: int, settings: Settings) -> None:
    """Scores of what a row may not see become -inf. A row beyond its text's end, which nobody reads, sees every key."""
    rows, keys = (torch.arange(part.start, part.stop) for part in (tile.rows, tile.keys))
    hidden = None  # [n or 1, 1, rows, 1, keys]
    if settings.causal or settings.window is not None:
        distance = rows[:, None] - keys
        hidden = distance < 0 if settings.causal else torch.zeros_like(distance, dtype=torch.bool)
        if settings.window is not None:
            hidden |= distance.abs() >= settings.window
        hidden = hidden[None, None, :, None]
    if batch.padding_st is not None:
        padding_sr = batch.padding_st[tile.segments, tile.rows][:, None, :, None, None]
        padding_sk = batch.padding_st[tile.segments, tile.keys][:, None, None, None, :]
        if hidden is None:
            hidden = padding_sk
        else:
            hidden = (hidden | padding_sk) & ~padding_sr
    if hidden is not None:
        n = tile.segments.stop - tile.segments.start
        scores.view(n, K, len(rows), -1, len(keys)).masked_fill_(hidden, float("-inf"))


def _survives(batch: LikeLengths, tile: Tile, seeds_S, heads: tuple[int, int], settings: Settings) -> torch.Tensor:
    """bool [n, K, rows, G, keys], true where the weight of (query head, query, key) is kept."""
    K, G = heads
    seeds = seeds_S[batch.segments_s[tile.segments]][:, None, None, None]
    rows = torch.arange(tile.rows.start, tile.rows.stop)[:, None]
    domain = torch.arange(K * G).view(K, 1, G) << 8 | DOMAIN_ATTENTION
    data = keep_bytes(seeds, rows, tile.keys.stop, settings.stream, domain)[..., tile.keys]
    return (data >= threshold(settings.dropout_p)).contiguous()


def _tiles(batch: LikeLengths, H: int, settings: Settings) -> Iterator[Tile]:
    """All segments and rows of a batch; several segments a tile, or where one is too large some of its rows."""
    s, t = batch.tokens_st.shape
    window = settings.window or t
    rows = t if H * t * t <= TILE else min(t, max(MIN_ROWS, TILE // (H * min(t, 2 * window))))
    step = max(1, TILE // (H * t * t))
    for first in range(0, s, step):
        for begin in range(0, t, rows):
            end = min(begin + rows, t)
            last = end if settings.causal else min(t, end + window - 1)
            keys = slice(max(0, begin - window + 1), last)
            yield Tile(slice(first, min(first + step, s)), slice(begin, end), keys)


def _gather(x_TND, batch: LikeLengths, K: int) -> torch.Tensor:
    """fp32 [s, K, t, N // K, D]: the G query heads that read one key head become rows of one matmul."""
    s, t = batch.tokens_st.shape
    if batch.begin is None:
        rows = x_TND.index_select(0, batch.tokens_st.flatten())
    else:
        rows = x_TND[batch.begin : batch.begin + s * t]
    found = rows.unflatten(0, (s, t)).unflatten(2, (K, -1)).transpose(1, 2)
    return torch.empty(found.shape).copy_(found)


def _put(out_TND, found: torch.Tensor, batch: LikeLengths) -> None:
    """Write [s, K, t, N // K, D] where its tokens lie."""
    found = found.transpose(1, 2)
    if batch.begin is not None:
        s, t = batch.tokens_st.shape
        out_TND[batch.begin : batch.begin + s * t].view(found.shape).copy_(found)
        return
    rows = found.to(out_TND.dtype).flatten(2, 3).flatten(0, 1)
    tokens = batch.tokens_st.flatten()
    if batch.padding_st is not None:
        real = (~batch.padding_st).flatten().nonzero().squeeze(1)
        rows, tokens = rows.index_select(0, real), tokens.index_select(0, real)
    out_TND.index_copy_(0, tokens, rows)
