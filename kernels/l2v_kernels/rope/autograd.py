"""The autograd function of the rotary embedding. Its gradient is the transposed rotation of the incoming one."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.rope.reference import rope_reference


class Rotary(torch.autograd.Function):
    """y = rope(x), into x itself if inplace. Only cos and sin are kept."""

    @staticmethod
    def forward(ctx, x_THD, cos_TD, sin_TD, inplace):
        ctx.save_for_backward(cos_TD, sin_TD)
        if inplace:
            ctx.mark_dirty(x_THD)
        return _rotate(x_THD, cos_TD, sin_TD, inverse=False, inplace=inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THD):
        return _rotate(grad_THD, *ctx.saved_tensors, inverse=True, inplace=False), None, None, None


def _rotate(x_THD, cos_TD, sin_TD, *, inverse, inplace):
    if takes_triton(x_THD):
        from l2v_kernels.rope.kernel import launch

        y_THD = x_THD if inplace else torch.empty_like(x_THD, memory_format=torch.contiguous_format)
        return launch(x_THD, y_THD, cos_TD, sin_TD, inverse)
    y_THD = rope_reference(x_THD, cos_TD, sin_TD, inverse)
    return x_THD.copy_(y_THD) if inplace else y_THD
