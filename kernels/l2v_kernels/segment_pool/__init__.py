"""From token states to one vector a segment, with the decoder's final norm inside on request."""

import os

import torch

from l2v_kernels.segment_pool.op import SegmentPool

__all__ = ["segment_pool"]


def segment_pool(
    x_TE: torch.Tensor,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
) -> torch.Tensor:
    """Weighted mean of each segment's tokens: sum_t w_t norm(x_t) / max(sum_t w_t, 1e-9) over the segment.

    Args:
        x_TE: token states [T, E] of a floating dtype; rows may lie apart in memory.
        weights_T: fp32 [T], without a gradient. 1 for the pooled tokens of a mean, 1, 2, .. for a position-weighted mean
            (Muennighoff 2022, arXiv 2202.08904), a single 1 in each segment for the last or the first token. A token of
            weight 0 has no effect, whatever its state; it is not even read.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: segment s holds tokens cu_seqlens[s] .. cu_seqlens[s + 1].
        norm_weight_E: weight [E] of an RMSNorm (see `l2v_kernels.rms_norm`) applied to each token first; None for none.
            Normalised tokens are neither rounded nor written to memory.
        eps: that of the norm, at least 0.
        offset: added to the norm's weight in fp32 (see `l2v_kernels.rms_norm`).

    Returns:
        [S, E] fp32 (fp64 for fp64), zeros for a segment whose weights are all 0. A segment's bits depend on its own tokens
        alone, not on its place in the pack. Differentiable once in x and the norm's weight. Kept for the backward: with a
        norm x and 8 bytes a token, without one 4 bytes a token.

    Raises:
        ValueError: shapes, dtypes, devices or eps are outside the above; on the CPU, and with L2V_CHECK=1 on CUDA, also
            cu_seqlens that decrease or do not run from 0 to T. Unchecked, wrong ones give wrong vectors and gradients, but
            no memory fault.

    Source: mean pooling of Reimers & Gurevych 2019 (arXiv 1908.10084), the norm of Zhang & Sennrich 2019.
    """
    _check(x_TE, weights_T, cu_seqlens, norm_weight_E, eps)
    if norm_weight_E is None or not norm_weight_E.requires_grad:
        return SegmentPool.apply(x_TE, weights_T, cu_seqlens, norm_weight_E, eps, offset)
    # The mean of norm(x) * weight is the mean of norm(x), times weight: autograd differentiates that multiplication itself.
    ones_E = torch.ones_like(norm_weight_E, requires_grad=False)
    vectors_SE = SegmentPool.apply(x_TE, weights_T, cu_seqlens, ones_E, eps, 0.0)
    return vectors_SE * (offset + norm_weight_E.to(vectors_SE.dtype))


def _check(x_TE, weights_T, cu_seqlens, norm_weight_E, eps):
    shapes = f"x {tuple(x_TE.shape)}, weights {tuple(weights_T.shape)}, cu_seqlens {tuple(cu_seqlens.shape)}"
    if norm_weight_E is not None:
        shapes += f", norm weight {tuple(norm_weight_E.shape)}"
    if x_TE.ndim != 2 or x_TE.shape[1] == 0 or weights_T.shape != x_TE.shape[:1]:
        raise ValueError(f"segment_pool needs x [T, E] and weights [T], got {shapes}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"segment_pool needs cu_seqlens int32 or int64 [S + 1], got {cu_seqlens.dtype} for {shapes}")
    if norm_weight_E is not None and norm_weight_E.shape != x_TE.shape[1:]:
        raise ValueError(f"segment_pool needs a norm weight [E], got {shapes}")
    floating = [x_TE] if norm_weight_E is None else [x_TE, norm_weight_E]
    if weights_T.dtype != torch.float32 or not all(x.is_floating_point() for x in floating):
        dtypes = ", ".join(str(x.dtype) for x in (*floating, weights_T))
        raise ValueError(f"segment_pool needs floating x and norm weight and fp32 weights, got {dtypes} for {shapes}")
    if weights_T.requires_grad:
        raise ValueError(f"segment_pool computes no gradient of the weights; pass weights_T.detach() for {shapes}")
    if any(x.device != x_TE.device for x in (*floating, weights_T, cu_seqlens)):
        raise ValueError(f"x, weights, cu_seqlens and the norm's weight must be on one device for {shapes}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps} for {shapes}")
    if x_TE.device.type == "cpu" or os.environ.get("L2V_CHECK") == "1":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != len(x_TE) or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must go from 0 to {len(x_TE)} and never decrease, got {bounds} for {shapes}")
