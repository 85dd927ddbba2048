"""Packed attention in plain PyTorch: the definition of the op, and the path without Triton."""

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
    """(o [T, H, D], lse [H, T] or None). Arguments as in `l2v_kernels.attention`, which checks them.

    o is differentiable in q, k and v. lse, fp32 (fp64 for fp64), is not, and is computed only with return_lse.
    """
    _T, H, D = q_THD.shape
    dropout_p, softcap, causal, window = settings.dropout_p, settings.softcap, settings.causal, settings.window
    if plan.n_tokens == 0:
        empty_HT = q_THD.new_empty((H, 0), dtype=torch.promote_types(q_THD.dtype, torch.float32))
        return q_THD + 0.0 * (k_TKD.sum() + v_TKD.sum()), empty_HT if return_lse else None
    tokens_per_group = [group.tokens_st.numel() for group in plan.groups]
    q_parts, k_parts, v_parts = (_in_order(x, plan).split(tokens_per_group) for x in (q_THD, k_TKD, v_TKD))
    if (
        q_THD.device.type == "cpu"
        and q_THD.dtype in (torch.bfloat16, torch.float16)
        and _wants_gradient(q_THD, k_TKD, v_TKD)
    ):
        # PyTorch's flash backward takes five times as long in bf16 as in fp32 where the processor has no AMX.
        q_parts, k_parts, v_parts = ([x.float() for x in parts] for parts in (q_parts, k_parts, v_parts))
    explicit = bool(threshold(dropout_p)) or softcap is not None or return_lse
    out: list[torch.Tensor] = []
    lse_parts: list[torch.Tensor] = []
    for group, q, k, v in zip(plan.groups, q_parts, k_parts, v_parts, strict=True):
        shape_st = group.tokens_st.shape
        # Views [s, heads, t, D]: packed tokens are never copied into a padded batch.
        q, k, v = (x.view(*shape_st, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        visible_tt = _visible(group.length, causal, window, q.device)
        if explicit:
            drop = None
            if threshold(dropout_p):
                assert seeds_S is not None
                drop = _dropped(seeds_S[group.segments_s], H, group.length, settings.stream, dropout_p)
            o, lse_sHt = _explicit(q, k, v, settings.scale, visible_tt, softcap, drop, return_lse)
            if drop is not None:
                o = o * keep_scale(dropout_p)
            if return_lse:
                lse_parts.append(lse_sHt.transpose(1, 2).reshape(-1, H))
        else:
            # Without a mask SDPA takes its flash kernel also for causal attention.
            fast_causal = causal and (window is None or window >= group.length)
            o = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if fast_causal else visible_tt,
                is_causal=fast_causal,
                scale=settings.scale,
                enable_gqa=k.shape[1] != H,
            )
        out.append(o.to(q_THD.dtype).transpose(1, 2).reshape(-1, H, D))
    lse_HT = _back(torch.cat(lse_parts), plan).t() if return_lse else None
    return _back(torch.cat(out), plan), lse_HT


def _wants_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _explicit(q_sHtD, k_sKtD, v_sKtD, scale, visible_tt, softcap, drop_sHtt, return_lse):
    """Attention with every step spelled out, in fp32 (fp64 for fp64): o [s, H, t, D], and lse [s, H, t] or None."""
    s, H, t, D = q_sHtD.shape
    K = k_sKtD.shape[1]
    dtype = torch.promote_types(q_sHtD.dtype, torch.float32)
    # The query heads of a key head become rows one below the other, so keys and values are never repeated.
    q = (q_sHtD.to(dtype) * scale).reshape(s, K, H // K * t, D)
    scores = q @ k_sKtD.to(dtype).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(s, H, t, t)
    if visible_tt is not None:
        scores = scores.masked_fill(~visible_tt, float("-inf"))
    weights = scores.softmax(-1)
    lse_sHt = scores.detach().logsumexp(-1) if return_lse else None
    if drop_sHtt is not None:
        weights = weights.masked_fill(drop_sHtt, 0.0)
    return (weights.view(s, K, H // K * t, t) @ v_sKtD.to(dtype)).view(s, H, t, D), lse_sHt


def _dropped(seeds_s, n_heads, length, stream, dropout_p):
    """bool [s, H, t, t], true where the weight of (query, key) is dropped."""
    heads_H11 = torch.arange(n_heads, device=seeds_s.device)[:, None] << 8 | DOMAIN_ATTENTION
    rows_t = torch.arange(length, device=seeds_s.device)
    return keep_bytes(seeds_s[:, None, None], rows_t, length, stream, heads_H11) < threshold(dropout_p)


def _visible(length, causal, window, device):
    """bool [t, t], true where query (row) may see key (column); None where all may."""
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
    """Rows in another order. Its gradient is a gather too; that of index_select adds, with atomics on CUDA."""

    @staticmethod
    def forward(ctx, x, order_T, inverse_T):
        ctx.save_for_backward(order_T, inverse_T)
        return x.index_select(0, order_T)

    @staticmethod
    def backward(ctx, grad):
        order_T, inverse_T = ctx.saved_tensors
        return Permute.apply(grad, inverse_T, order_T), None, None
