"""Segment pooling with autograd, and without it for code that writes its own backward. Arguments are not checked here."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.segment_pool.reference import backward_reference, forward_reference
from l2v_kernels.spans import spanned


@spanned("pooling")
def forward(
    x_TE: torch.Tensor,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(vectors [S, E], rstd [T], totals [S]), all fp32 (fp64 for fp64).

    rstd is None without a norm, and holds anything for tokens of weight 0; totals are the sums of each segment's weights.
    """
    if not takes_triton(x_TE):
        return forward_reference(x_TE, weights_T, cu_seqlens, norm_weight_E, eps, offset)
    from l2v_kernels.segment_pool.kernel import launch_forward

    (T, E), S = x_TE.shape, len(cu_seqlens) - 1
    vectors_SE, totals_S = weights_T.new_empty(S, E), weights_T.new_empty(S)
    rstd_T = None if norm_weight_E is None else weights_T.new_empty(T)
    launch_forward(x_TE, weights_T, cu_seqlens, norm_weight_E, eps, vectors_SE, totals_S, rstd_T, offset)
    return vectors_SE, rstd_T, totals_S


@spanned("pooling")
def backward(
    dvectors_SE: torch.Tensor,
    x_TE: torch.Tensor | None,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    rstd_T: torch.Tensor | None,
    totals_S: torch.Tensor,
    dtype: torch.dtype,
    offset: float = 0.0,
) -> torch.Tensor:
    """dx [T, E] in `dtype`, that of x; x and rstd are needed only with a norm. A token of weight 0 gets 0."""
    if not takes_triton(dvectors_SE):
        return backward_reference(
            dvectors_SE, x_TE, weights_T, cu_seqlens, norm_weight_E, rstd_T, totals_S, dtype, offset
        )
    from l2v_kernels.segment_pool.kernel import launch_backward

    dx_TE = dvectors_SE.new_empty(len(weights_T), dvectors_SE.shape[1], dtype=dtype)
    return launch_backward(dvectors_SE, x_TE, weights_T, cu_seqlens, norm_weight_E, rstd_T, totals_S, dx_TE, offset)


class SegmentPool(torch.autograd.Function):
    """vectors = weighted mean of norm(x) over each segment; a gradient for x alone.

    Kept: with a norm x and 8 bytes a token, without one only the weights.
    """

    @staticmethod
    def forward(ctx, x_TE, weights_T, cu_seqlens, norm_weight_E, eps, offset):
        vectors_SE, rstd_T, totals_S = forward(x_TE, weights_T, cu_seqlens, norm_weight_E, eps, offset)
        kept_TE = None if norm_weight_E is None else x_TE
        ctx.save_for_backward(kept_TE, weights_T, cu_seqlens, norm_weight_E, rstd_T, totals_S)
        ctx.dtype, ctx.offset = x_TE.dtype, offset
        return vectors_SE

    @staticmethod
    @once_differentiable
    def backward(ctx, dvectors_SE):
        return backward(dvectors_SE, *ctx.saved_tensors, ctx.dtype, ctx.offset), None, None, None, None, None
