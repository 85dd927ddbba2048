"""The sandwich norm with autograd, and without it for code that writes its own backward.

The functions do not check their arguments. Rows may lie apart in memory; where the last dimension is not of stride 1, it is
copied. `rms_norm.op.normalize` recomputes y from the sum and its rstd, with the same bits.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.rms_norm import op as rms_norm
from l2v_kernels.sandwich_norm import reference
from l2v_kernels.spans import spanned


@spanned("norm")
def forward(
    delta_TE: torch.Tensor,
    residual_TE: torch.Tensor,
    after_E: torch.Tensor,
    before_E: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(sum [T, E], y [T, E], rstd of delta [T], rstd of the sum [T]), rstds in fp32 (fp64 for fp64).

    sum = residual + norm(delta) * (offset + after), y = norm(sum) * (offset + before) of the rounded sum. All arithmetic is
    fp32 (fp64 for fp64), and each result is rounded once. Without `before`, after a layer's last block, y and the second rstd
    are None.
    """
    if not takes_triton(delta_TE):
        return reference.forward_reference(delta_TE, residual_TE, after_E, before_E, eps, offset)
    from l2v_kernels.sandwich_norm.kernel import launch_forward

    sum_TE = torch.empty_like(delta_TE, memory_format=torch.contiguous_format)
    delta_rstd_T = delta_TE.new_empty(len(delta_TE), dtype=torch.float32)
    y_TE, rstd_T = (None, None) if before_E is None else (torch.empty_like(sum_TE), torch.empty_like(delta_rstd_T))
    launch_forward(delta_TE, residual_TE, after_E, before_E, eps, offset, sum_TE, y_TE, delta_rstd_T, rstd_T)
    return sum_TE, y_TE, delta_rstd_T, rstd_T


@spanned("norm")
def backward(
    dy_TE: torch.Tensor,
    dsum_TE: torch.Tensor | None,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    before_E: torch.Tensor,
    delta_TE: torch.Tensor,
    delta_rstd_T: torch.Tensor,
    after_E: torch.Tensor,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dresidual [T, E], ddelta [T, E]), each rounded once; ddelta is that of the rounded dresidual.

    The first is the gradient through the second norm, plus that of the sum (dsum) if given. Without the second norm,
    `rms_norm.op.backward` of dsum is ddelta, and dsum is dresidual.
    """
    arguments = (dy_TE, dsum_TE, sum_TE, rstd_T, before_E, delta_TE, delta_rstd_T, after_E, offset)
    if not takes_triton(sum_TE):
        return reference.backward_reference(*arguments)
    from l2v_kernels.sandwich_norm.kernel import launch_backward

    return launch_backward(*arguments)


class SandwichNorm(torch.autograd.Function):
    """(sum, y). Kept: delta, the sum, which the residual stream holds anyway, and two rstds."""

    @staticmethod
    def forward(ctx, delta_TE, residual_TE, after_E, before_E, eps, offset):
        sum_TE, y_TE, delta_rstd_T, rstd_T = forward(delta_TE, residual_TE, after_E, before_E, eps, offset)
        ctx.save_for_backward(delta_TE, sum_TE, delta_rstd_T, rstd_T, after_E, before_E)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return sum_TE, y_TE

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_TE, dy_TE):
        delta_TE, sum_TE, delta_rstd_T, rstd_T, after_E, before_E = ctx.saved_tensors
        _, _, to_after, to_before, _, _ = ctx.needs_input_grad
        dafter_E = dbefore_E = None
        if dy_TE is None:
            if dsum_TE is None:
                return None, None, None, None, None, None
            dresidual_TE = dsum_TE
            ddelta_TE = rms_norm.backward(dsum_TE, delta_TE, delta_rstd_T, after_E, offset=ctx.offset)
        else:
            dresidual_TE, ddelta_TE = backward(
                dy_TE, dsum_TE, sum_TE, rstd_T, before_E, delta_TE, delta_rstd_T, after_E, ctx.offset
            )
            if to_before:
                dbefore_E = rms_norm.weight_gradient(dy_TE, sum_TE, rstd_T).to(before_E.dtype)
        if to_after:
            dafter_E = rms_norm.weight_gradient(dresidual_TE, delta_TE, delta_rstd_T).to(after_E.dtype)
        return ddelta_TE, dresidual_TE, dafter_E, dbefore_E, None, None
