"""Packed attention in plain PyTorch: the definition of the op, and the path taken where no kernel is."""

import torch
import torch.nn.functional as F

from l2v_kernels.attention.plan import AttentionPlan
from l2v_kernels.attention.settings import Settings
from l2v_kernels.philox import DOMAIN_ATTENTION, keep_bytes, keep_scale, threshold


def attention_reference(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    plan: AttentionPlan,
    seeds_S: torch.Tensor | None,
    settings: Settings,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `l2v_kernels.attention`, which checks the arguments. o_THD is differentiable in q, k and v; lse [H, T], fp32
    or better, is made when asked for and is not."""
    _T, H, D = q_THD.shape
    dropout_p, softcap, causal, window = settings.dropout_p, settings.softcap, settings.causal, settings.window
    if plan.n_tokens == 0:
        lse_HT = q_THD.new_empty((H, 0), dtype=torch.promote_types(q_THD.dtype, torch.float32))
        return q_THD + 0.0 * (k_TKD.sum() + v_TKD.sum()), lse_HT if return_lse else None
    tokens_per_group = [group.tokens_nL.numel() for group in plan.groups]
    q_parts, k_parts, v_parts = (_in_order(x, plan).split(tokens_per_group) for x in (q_THD, k_TKD, v_TKD))
    explicit = bool(threshold(dropout_p)) or softcap is not None or return_lse
    out, lse_parts = [], []
    for group, q, k, v in zip(plan.groups, q_parts, k_parts, v_parts, strict=True):
        shape_nL = group.tokens_nL.shape
        # Views [n, heads, L, D]: packed tokens are never copied into a padded batch.
        q, k, v = (x.view(*shape_nL, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        visible_LL = _visible(group.length, causal, window, q.device)
        if explicit:
            drop = None
            if threshold(dropout_p):
                drop = _dropped(seeds_S[group.segments_n], H, group.length, settings.stream, dropout_p)
            o, lse_nHL = _explicit(q, k, v, settings.scale, visible_LL, softcap, drop, return_lse)
            if drop is not None:
                o = o * keep_scale(dropout_p)
            if return_lse:
                lse_parts.append(lse_nHL.transpose(1, 2).reshape(-1, H))
        else:
            # Without a mask SDPA takes its flash kernel also for causal attention.
            fast_causal = causal and (window is None or window >= group.length)
            o = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if fast_causal else visible_LL,
                is_causal=fast_causal,
                scale=settings.scale,
                enable_gqa=k.shape[1] != H,
            )
        out.append(o.to(q.dtype).transpose(1, 2).reshape(-1, H, D))
    lse_HT = _back(torch.cat(lse_parts), plan).t() if return_lse else None
    return _back(torch.cat(out), plan), lse_HT


def _explicit(q_nHLD, k_nKLD, v_nKLD, scale, visible_LL, softcap, drop_nHLL, return_lse):
    """Attention with every step spelled out, in fp32 or better: o [n, H, L, D] and, if asked for, lse [n, H, L]."""
    n, H, L, D = q_nHLD.shape
    K = k_nKLD.shape[1]
    dtype = torch.promote_types(q_nHLD.dtype, torch.float32)
    # The query heads of a key head stand below each other as rows, so keys and values are never repeated.
    q = (q_nHLD.to(dtype) * scale).reshape(n, K, H // K * L, D)
    scores = q @ k_nKLD.to(dtype).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(n, H, L, L)
    if visible_LL is not None:
        scores = scores.masked_fill(~visible_LL, float("-inf"))
    weights = scores.softmax(-1)
    lse_nHL = scores.detach().logsumexp(-1) if return_lse else None
    if drop_nHLL is not None:
        weights = weights.masked_fill(drop_nHLL, 0.0)
    return (weights.view(n, K, H // K * L, L) @ v_nKLD.to(dtype)).view(n, H, L, D), lse_nHL


def _dropped(seeds_n, n_heads, length, stream, dropout_p):
    """bool [n, H, L, L], true where the weight of (query, key) is dropped."""
    heads_H11 = torch.arange(n_heads, device=seeds_n.device)[:, None] << 8 | DOMAIN_ATTENTION
    rows_L = torch.arange(length, device=seeds_n.device)
    return keep_bytes(seeds_n[:, None, None], rows_L, length, stream, heads_H11) < threshold(dropout_p)


def _visible(length, causal, window, device):
    """bool [L, L], true where query (row) may see key (column); None where all may."""
    if not causal and (window is None or window >= length):
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return visible if window is None else visible & (distance.abs() < window)


def _in_order(x, plan):
    return x if plan.order_T is None else Permute.apply(x, plan.order_T, plan.inverse_T)


def _back(x, plan):
    return x if plan.order_T is None else Permute.apply(x, plan.inverse_T, plan.order_T)


class Permute(torch.autograd.Function):
    """Rows in another order. The gradient is a gather too; index_select's own adds, by atomics on CUDA."""

    @staticmethod
    def forward(ctx, x, order_T, inverse_T):
        ctx.save_for_backward(order_T, inverse_T)
        return x.index_select(0, order_T)

    @staticmethod
    def backward(ctx, grad):
        order_T, inverse_T = ctx.saved_tensors
        return Permute.apply(grad, inverse_T, order_T), None, None
