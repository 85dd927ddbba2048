"""Attention over packed segments, with grouped heads, windows, softcap and addressed dropout."""

import torch

from l2v_kernels.attention.plan import AttentionPlan
from l2v_kernels.attention.reference import attention_reference
from l2v_kernels.philox import threshold

__all__ = ["AttentionPlan", "attention"]


def attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seeds_S: torch.Tensor | None = None,
    stream: int = 0,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    plan: AttentionPlan | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v within each segment of a packed sequence; returns o_THD in q's dtype.

    Args:
        q_THD, k_TKD, v_TKD: queries [T, H, D], keys and values [T, K, D] of one floating dtype, H a multiple
            of K: query head h reads key head h // (H // K).
        cu_seqlens: int32 or int64 [S + 1], segment s holds tokens cu_seqlens[s] .. cu_seqlens[s + 1]; empty
            ones are fine.
        scale: default D ** -0.5.
        dropout_p: drop probability of attention weights, rounded to 1/256 (see `philox.threshold`).
        seeds_S: int64 [S], one seed per segment; needed with dropout_p > 0. Whether weight (h, i, j) of a
            segment is dropped depends on its seed, `stream` (by convention the layer), h, i and j alone.
        causal: attend to j <= i instead of to the whole segment.
        window: attend to |i - j| < window only.
        softcap: scores become softcap * tanh(scores / softcap) before the softmax (Gemma 2).
        plan: `AttentionPlan` of these segments, built once a batch. Without it cu_seqlens is read on the
            host, which waits for the device.
    Errors: ValueError on shapes, dtypes or settings outside the above, with the shapes in the message.
    """
    if plan is None:
        plan = AttentionPlan.from_cu_seqlens(cu_seqlens)
    _check(q_THD, k_TKD, v_TKD, cu_seqlens, dropout_p, seeds_S, window, softcap, plan)
    if scale is None:
        scale = q_THD.shape[-1] ** -0.5
    return attention_reference(
        q_THD,
        k_TKD,
        v_TKD,
        plan,
        scale=scale,
        dropout_p=dropout_p,
        seeds_S=seeds_S,
        stream=stream,
        causal=causal,
        window=window,
        softcap=softcap,
    )


def _check(q_THD, k_TKD, v_TKD, cu_seqlens, dropout_p, seeds_S, window, softcap, plan):
    shapes = f"q {tuple(q_THD.shape)}, k {tuple(k_TKD.shape)}, v {tuple(v_TKD.shape)}"
    if q_THD.ndim != 3 or k_TKD.ndim != 3 or k_TKD.shape != v_TKD.shape:
        raise ValueError(f"attention needs q [T, H, D] and k, v [T, K, D], got {shapes}")
    if q_THD.shape[0] != k_TKD.shape[0] or q_THD.shape[2] != k_TKD.shape[2]:
        raise ValueError(f"q, k and v must agree in tokens and head dimension, got {shapes}")
    if k_TKD.shape[1] == 0 or q_THD.shape[1] % k_TKD.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the key heads, got {shapes}")
    if not q_THD.is_floating_point() or not q_THD.dtype == k_TKD.dtype == v_TKD.dtype:
        raise ValueError(
            f"q, k and v must have one floating dtype, got {q_THD.dtype}, {k_TKD.dtype}, {v_TKD.dtype} for {shapes}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] != plan.n_segments + 1 or plan.n_tokens != q_THD.shape[0]:
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} and a plan of {plan.n_segments} segments, "
            f"{plan.n_tokens} tokens do not describe {shapes}"
        )
    if plan.device is not None and plan.device != q_THD.device:
        raise ValueError(f"the plan is on {plan.device} and q on {q_THD.device} for {shapes}")
    if threshold(dropout_p):
        if seeds_S is None:
            raise ValueError(f"attention dropout needs seeds_S [S], one int64 seed a segment, got none for {shapes}")
        if seeds_S.dtype != torch.int64 or seeds_S.shape != (plan.n_segments,):
            raise ValueError(
                f"seeds_S must be int64 [{plan.n_segments}], got {seeds_S.dtype} {tuple(seeds_S.shape)} for {shapes}"
            )
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the token itself, got {window=} for {shapes}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap} for {shapes}")
