"""The autograd function of segment pooling. With a norm it keeps x and 4 bytes a token, without one no token state."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.segment_pool import functional


class SegmentPool(torch.autograd.Function):
    """vectors = weighted mean of norm(x) over each segment; a gradient for x alone."""

    @staticmethod
    def forward(ctx, x_TE, weights_T, cu_seqlens, norm_weight_E, eps):
        vectors_SE, rstd_T, totals_S = functional.forward(x_TE, weights_T, cu_seqlens, norm_weight_E, eps)
        kept_TE = None if norm_weight_E is None else x_TE
        ctx.save_for_backward(kept_TE, weights_T, cu_seqlens, norm_weight_E, rstd_T, totals_S)
        ctx.dtype = x_TE.dtype
        return vectors_SE

    @staticmethod
    @once_differentiable
    def backward(ctx, dvectors_SE):
        return functional.backward(dvectors_SE, *ctx.saved_tensors, ctx.dtype), None, None, None, None
