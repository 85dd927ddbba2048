"""The autograd function of the rotary embedding. Its gradient is the transposed rotation of the incoming one."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.rope.functional import rotate


class Rotary(torch.autograd.Function):
    """y = rope(x), into x itself if inplace. Only cos and sin are kept."""

    @staticmethod
    def forward(ctx, x_THD, cos_TD, sin_TD, inplace):
        ctx.save_for_backward(cos_TD, sin_TD)
        if inplace:
            ctx.mark_dirty(x_THD)
        return rotate(x_THD, cos_TD, sin_TD, out=x_THD if inplace else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THD):
        return rotate(grad_THD, *ctx.saved_tensors, inverse=True), None, None, None
