"""RMSNorm without autograd, for code that writes its own backward: see `l2v_kernels.rms_norm` for the op.

Arguments are not checked. Wherever [T, E] is said, [T, H, D] does as well, with rstd [T, H]: each head of a token is a
row. Rows may lie apart; where the last dimension is not of stride 1, there is a copy.
"""

import torch

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.rms_norm import reference
from l2v_kernels.spans import spanned


@spanned("norm")
def forward(
    x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, delta_TE: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum [T, E], y [T, E], rstd [T]): sum = x + delta in x's dtype, x itself without a delta; y = norm(sum) * weight.

    rstd = 1 / sqrt(mean(sum ** 2) + eps) of the rounded sum, fp32 (fp64 for fp64), as is all arithmetic; y is rounded once.
    """
    if not takes_triton(x_TE):
        return reference.forward_reference(x_TE, weight_E, eps, delta_TE)
    from l2v_kernels.rms_norm.kernel import launch_forward

    y_TE = torch.empty_like(x_TE, memory_format=torch.contiguous_format)
    sum_TE = None if delta_TE is None else torch.empty_like(y_TE)
    rstd_T = x_TE.new_empty(x_TE.shape[:-1], dtype=torch.float32)
    launch_forward(x_TE, delta_TE, weight_E, eps, sum_TE, y_TE, rstd_T)
    return x_TE if sum_TE is None else sum_TE, y_TE, rstd_T


@spanned("norm")
def normalize(sum_TE: torch.Tensor, rstd_T: torch.Tensor, weight_E: torch.Tensor) -> torch.Tensor:
    """The y that `forward` gave, bit for bit."""
    if not takes_triton(sum_TE):
        return reference.normalize_reference(sum_TE, rstd_T, weight_E)
    from l2v_kernels.rms_norm.kernel import launch_forward

    y_TE = torch.empty_like(sum_TE, memory_format=torch.contiguous_format)
    launch_forward(sum_TE, None, weight_E, 0.0, None, y_TE, rstd_T, known=True)
    return y_TE


@spanned("norm")
def backward(
    dy_TE: torch.Tensor,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_E: torch.Tensor,
    dsum_TE: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx [T, E], which is ddelta too: the gradient through the norm, plus that of the sum (dsum) if given, rounded once.

    Into `out` if given, of stride 1 along E: a slice of a wider buffer, or dy or dsum themselves.
    """
    if not takes_triton(sum_TE):
        dx_TE = reference.backward_reference(dy_TE, sum_TE, rstd_T, weight_E, dsum_TE)
        return dx_TE if out is None else out.copy_(dx_TE)
    from l2v_kernels.rms_norm.kernel import launch_backward

    if out is None:
        out = torch.empty_like(sum_TE, memory_format=torch.contiguous_format)
    return launch_backward(dy_TE, sum_TE, rstd_T, weight_E, dsum_TE, out)


@spanned("norm")
def weight_gradient(dy_TE: torch.Tensor, sum_TE: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """[E] fp32 (fp64 for fp64): dweight, in a fixed order of sums."""
    if not takes_triton(sum_TE):
        return reference.weight_gradient_reference(dy_TE, sum_TE, rstd_T)
    from l2v_kernels.rms_norm.kernel import launch_weight_gradient

    return launch_weight_gradient(dy_TE, sum_TE, rstd_T)
