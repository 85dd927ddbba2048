"""The rotation, with autograd and without it for layers that decide themselves what they keep."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.rope.reference import add_and_rotate_reference, rope_reference
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


MAX_RANK = 64
"""Up to this rank `add_and_rotate` reads xa and B in one piece."""
MIN_HEAD_DIM = 32
"""Half a head is a side of a matrix instruction, of which 16 is the least."""


def takes_shares(head_dim: int, rank: int) -> bool:
    """Whether `add_and_rotate` has a kernel for these sizes."""
    return head_dim >= MIN_HEAD_DIM and head_dim % 2 == 0 and rank <= MAX_RANK


@spanned("rope")
def add_and_rotate(
    qkv_TN: torch.Tensor,
    xa_TR: torch.Tensor,
    b_NR: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    heads: tuple[int, int],
) -> None:
    """Adds the adapters' share to queries, keys and values and rotates queries and keys, in place and rounded once.

    It saves writing the share, and reading it again in the frozen matmul. Arguments are not checked; `takes_shares` holds.

    Args:
        qkv_TN: [T, (H + 2 K) D] of the frozen linears alone, of stride 1 along N.
        xa_TR: [T, 3 R], factors in it already: R columns for each of q, k and v.
        b_NR: [(H + 2 K) D, R], their B one below the other.
        cos_TD: [T, D], as in `rotate`. sin_TD: likewise.
        heads: (H, K).
    """
    if takes_triton(qkv_TN):
        from l2v_kernels.rope.kernel import launch_heads

        launch_heads(qkv_TN, xa_TR, b_NR, cos_TD, sin_TD, heads)
        return
    add_and_rotate_reference(qkv_TN, xa_TR, b_NR, cos_TD, sin_TD, heads)


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
