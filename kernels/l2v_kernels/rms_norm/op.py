"""RMSNorm with autograd, and without it for code that writes its own backward.

The functions do not check their arguments. Where shapes say [T, E], [T, H, D] works as well, with rstd [T, H]: each head
of a token is a row. Rows may lie apart in memory; where the last dimension is not of stride 1, it is copied.
"""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.rms_norm import reference
from l2v_kernels.spans import spanned


@spanned("norm")
def forward(
    x_TE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float,
    delta_TE: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum [T, E], y [T, E], rstd [T]): sum = x + delta in x's dtype, x itself without a delta; y = norm(sum) * factor,
    factor = offset + weight (Gemma stores its norms' weights less 1).

    rstd = 1 / sqrt(mean(sum ** 2) + eps) of the rounded sum. All arithmetic is fp32 (fp64 for fp64), rstd is of that dtype,
    and y is rounded once.
    """
    if not takes_triton(x_TE):
        return reference.forward_reference(x_TE, weight_E, eps, delta_TE, offset)
    from l2v_kernels.rms_norm.kernel import launch_forward

    y_TE = torch.empty_like(x_TE, memory_format=torch.contiguous_format)
    sum_TE = None if delta_TE is None else torch.empty_like(y_TE)
    rstd_T = x_TE.new_empty(x_TE.shape[:-1], dtype=torch.float32)
    launch_forward(x_TE, delta_TE, weight_E, eps, sum_TE, y_TE, rstd_T, offset)
    return x_TE if sum_TE is None else sum_TE, y_TE, rstd_T


@spanned("norm")
def normalize(sum_TE: torch.Tensor, rstd_T: torch.Tensor, weight_E: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """The y [T, E] of `forward` recomputed from its sum and rstd, bit for bit."""
    if not takes_triton(sum_TE):
        return reference.normalize_reference(sum_TE, rstd_T, weight_E, offset)
    from l2v_kernels.rms_norm.kernel import launch_forward

    y_TE = torch.empty_like(sum_TE, memory_format=torch.contiguous_format)
    launch_forward(sum_TE, None, weight_E, 0.0, None, y_TE, rstd_T, offset, known=True)
    return y_TE


@spanned("norm")
def backward(
    dy_TE: torch.Tensor,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_E: torch.Tensor,
    dsum_TE: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    offset: float = 0.0,
) -> torch.Tensor:
    """dx [T, E], which is ddelta too: the gradient through the norm, plus that of the sum (dsum) if given, rounded once.

    Args:
        out: where to write, of stride 1 along E: a slice of a wider buffer, or dy or dsum themselves.
    """
    if not takes_triton(sum_TE):
        return reference.backward_reference(dy_TE, sum_TE, rstd_T, weight_E, dsum_TE, offset, out)
    from l2v_kernels.rms_norm.kernel import launch_backward

    if out is None:
        out = torch.empty_like(sum_TE, memory_format=torch.contiguous_format)
    return launch_backward(dy_TE, sum_TE, rstd_T, weight_E, dsum_TE, out, offset)


@spanned("norm")
def weight_gradient(dy_TE: torch.Tensor, sum_TE: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """dweight [E], fp32 (fp64 for fp64), summed in a fixed order."""
    if not takes_triton(sum_TE):
        return reference.weight_gradient_reference(dy_TE, sum_TE, rstd_T)
    from l2v_kernels.rms_norm.kernel import launch_weight_gradient

    return launch_weight_gradient(dy_TE, sum_TE, rstd_T)


class RmsNorm(torch.autograd.Function):
    """(sum, y) with a residual, y without. Kept: the sum, which the residual stream holds anyway, and rstd.

    The backward adds the gradients of both outputs in one pass.
    """

    @staticmethod
    def forward(ctx, x_TE, weight_E, eps, residual_TE, offset):
        sum_TE, y_TE, rstd_T = forward(x_TE, weight_E, eps, residual_TE, offset)
        ctx.offset = offset
        ctx.save_for_backward(sum_TE, rstd_T, weight_E)
        ctx.set_materialize_grads(False)
        return y_TE if residual_TE is None else (sum_TE, y_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        sum_TE, rstd_T, weight_E = ctx.saved_tensors
        to_x, to_weight, _, to_residual, _ = ctx.needs_input_grad
        dsum_TE, dy_TE = grads if len(grads) == 2 else (None, *grads)
        dx_TE = dweight_E = None
        if dy_TE is None:
            dx_TE = dsum_TE
        elif to_x or to_residual:
            dx_TE = backward(dy_TE, sum_TE, rstd_T, weight_E, dsum_TE, offset=ctx.offset)
        if to_weight and dy_TE is not None:
            dweight_E = weight_gradient(dy_TE, sum_TE, rstd_T).to(weight_E.dtype)
        return dx_TE if to_x else None, dweight_E, None, dx_TE if to_residual else None, None
