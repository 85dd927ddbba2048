"""Attention over packed segments, with grouped heads, windows, softcap and counter-based (Philox) dropout."""

import functools
import warnings

import torch

from l2v_kernels.attention.batched import BatchedAttention
from l2v_kernels.attention.op import FusedAttention
from l2v_kernels.attention.padded import attention_padded
from l2v_kernels.attention.plan import AttentionPlan
from l2v_kernels.attention.reference import attention_reference
from l2v_kernels.attention.settings import Settings
from l2v_kernels.dispatch import has_triton, takes_triton
from l2v_kernels.philox import threshold
from l2v_kernels.spans import spanned

__all__ = ["AttentionPlan", "attention", "attention_padded"]

MAX_HEAD_DIM = 256


@spanned("attention")
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
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v within each segment of a packed sequence.

    On CUDA the Triton kernels compute it, on a CPU PyTorch does, in fp32 (bf16 and fp16 too,
    but for a forward without a gradient): its flash kernel, or with dropout or a softcap batched matmuls.

    Args:
        q_THD: queries [T, H, D], H a multiple of K: query head h reads key head h // (H // K). On CUDA fp16, bf16 or fp32,
            and D a multiple of 8 up to 256; fp64 takes the reference there too, with a warning.
        k_TKD: keys [T, K, D] in the same dtype.
        v_TKD: values [T, K, D] in the same dtype.
        cu_seqlens: int32 or int64 [S + 1], segment s holds tokens cu_seqlens[s] .. cu_seqlens[s + 1]; segments may be empty.
        scale: of the scores; default D ** -0.5.
        dropout_p: drop probability of attention weights, rounded to 1/256 (see `philox.threshold`).
        seeds_S: int64 [S], one seed a segment; needed with dropout_p > 0. Whether weight (h, i, j) of a segment is dropped
            depends on its seed, `stream`, h, i and j alone.
        stream: which dropout of the model this is, by convention the layer; 0 <= stream < 2**31.
        causal: attend to j <= i instead of to the whole segment.
        window: attend to |i - j| < window only.
        softcap: scores become softcap * tanh(scores / softcap) before the softmax (Gemma 2).
        plan: `AttentionPlan` of these segments, built once a batch. Without it cu_seqlens is read on its device: on the CPU
            it is checked; on CUDA it is used without a host sync, and wrong values give NaN (see
            `AttentionPlan.on_device`).
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        o [T, H, D] in q's dtype, differentiable once in q, k and v (in fp64 as often as wanted); with return_lse
        (o, lse), lse [H, T] fp32 (fp64 for fp64), through which no gradient flows.

    Raises:
        ValueError: shapes, dtypes or settings are outside the above; the message names the shapes.
        NotImplementedError: there is no kernel for this device, dtype or head dimension.

    Source: Dao et al. 2022 (FlashAttention, arXiv 2205.14135); running softmax of Milakov & Gimelshein 2018 (arXiv
    1805.02867).
    """
    plan = _plan(cu_seqlens, q_THD) if plan is None else plan
    _check(q_THD, k_TKD, v_TKD, cu_seqlens, dropout_p, seeds_S, stream, window, softcap, plan)
    if scale is None:
        scale = q_THD.shape[-1] ** -0.5
    settings = Settings(scale, dropout_p, stream, causal, window, softcap)
    if _takes_kernel(q_THD):
        o_THD, lse_HT = FusedAttention.apply(q_THD, k_TKD, v_TKD, plan.tables, seeds_S, settings)
    elif _takes_batches(q_THD, settings) and not return_lse:
        o_THD, lse_HT = BatchedAttention.apply(q_THD, k_TKD, v_TKD, plan, seeds_S, settings), None
    else:
        o_THD, lse_HT = attention_reference(q_THD, k_TKD, v_TKD, plan, seeds_S, settings, return_lse)
    return (o_THD, lse_HT) if return_lse else o_THD


def _plan(cu_seqlens: torch.Tensor, q_THD: torch.Tensor) -> AttentionPlan:
    if cu_seqlens.is_cuda:
        return AttentionPlan.on_device(cu_seqlens, q_THD.shape[0])
    return AttentionPlan.from_cu_seqlens(cu_seqlens, q_THD.device)


def _takes_batches(q_THD, settings: Settings) -> bool:
    """Whether segments of like length go through batched matmuls: on a CPU, with what PyTorch's flash kernel lacks."""
    needed = bool(threshold(settings.dropout_p)) or settings.softcap is not None
    return needed and q_THD.device.type == "cpu" and q_THD.dtype != torch.float64


def _takes_kernel(q_THD):
    """Whether the kernels compute it. Raises NotImplementedError where there is neither a kernel nor a CPU."""
    on_cpu = not q_THD.is_cuda and q_THD.device.type == "cpu"
    if on_cpu and not takes_triton(q_THD):
        return False
    where = f"q {tuple(q_THD.shape)} {q_THD.dtype} on {q_THD.device}"
    if not (q_THD.is_cuda or on_cpu) or not has_triton():
        raise NotImplementedError(f"attention runs on the CPU, and on CUDA with Triton installed; got {where}")
    if q_THD.dtype == torch.float64:
        _warn_once("l2v_kernels.attention: fp64 has no kernel and takes the slow PyTorch reference")
        return False
    if q_THD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise NotImplementedError(f"the attention kernel takes fp32, fp16 and bf16, got {where}")
    if q_THD.shape[2] % 8 or not 8 <= q_THD.shape[2] <= MAX_HEAD_DIM:
        raise NotImplementedError(
            f"the attention kernel takes head dimensions that are multiples of 8 up to {MAX_HEAD_DIM}, got {where}"
        )
    return True


@functools.cache
def _warn_once(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=4)


def _check(q_THD, k_TKD, v_TKD, cu_seqlens, dropout_p, seeds_S, stream, window, softcap, plan):
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
    if not q_THD.device == k_TKD.device == v_TKD.device == plan.device:
        devices = f"{q_THD.device}, {k_TKD.device}, {v_TKD.device} and {plan.device}"
        raise ValueError(f"q, k, v and the plan must be on one device, got {devices} for {shapes}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] != plan.n_segments + 1 or plan.n_tokens != q_THD.shape[0]:
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} and a plan of {plan.n_segments} segments, "
            f"{plan.n_tokens} tokens do not describe {shapes}"
        )
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be at least 0 and below 2**31, got {stream} for {shapes}")
    if threshold(dropout_p):
        if seeds_S is None:
            raise ValueError(f"attention dropout needs seeds_S [S], one int64 seed a segment, got none for {shapes}")
        if seeds_S.dtype != torch.int64 or seeds_S.shape != (plan.n_segments,) or seeds_S.device != q_THD.device:
            raise ValueError(
                f"seeds_S must be int64 [{plan.n_segments}] on {q_THD.device}, got {seeds_S.dtype} "
                f"{tuple(seeds_S.shape)} on {seeds_S.device} for {shapes}"
            )
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the token itself, got {window=} for {shapes}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap} for {shapes}")
