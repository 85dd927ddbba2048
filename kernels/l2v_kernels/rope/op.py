"""The rotation, with autograd and without it for layers that decide themselves what they keep."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.rope.reference import rope_reference
from l2v_kernels.spans import spanned


@spanned("rope")
def rotate(
    x_THD: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    *,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, H, D] rotated, in its dtype; with `inverse` rotated back, which is the map of the gradient.

    Args:
        out: where to write, [T, H, D] of any strides; may be x. Arguments are not checked.
    """
    if takes_triton(x_THD):
        from l2v_kernels.rope.kernel import launch

        if out is None:
            out = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
        return launch(x_THD, out, cos_TD, sin_TD, inverse)
    y_THD = rope_reference(x_THD, cos_TD, sin_TD, inverse)
    return y_THD if out is None else out.copy_(y_THD)


class Rotary(torch.autograd.Function):
    """y = rope(x), into x itself if inplace. Its gradient is the transposed rotation; only cos and sin are kept."""

    @staticmethod
    def forward(ctx, x_THD, cos_TD, sin_TD, inplace):
        ctx.save_for_backward(cos_TD, sin_TD)
        if inplace:
            ctx.mark_dirty(x_THD)
        return rotate(x_THD, cos_TD, sin_TD, out=x_THD if inplace else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THD):
        cos_TD, sin_TD = ctx.saved_tensors
        return rotate(grad_THD, cos_TD, sin_TD, inverse=True), None, None, None
