"""RMSNorm without autograd, for code that writes its own backward: see `l2v_kernels.rms_norm` for the op.

Rows may lie apart (any strides but that of the last dimension, which is best 1). Arguments are not checked. Wherever
[T, E] is said, [T, H, D] does as well, with rstd [T, H]: each head of each token is a row.
"""

import torch

from l2v_kernels.rms_norm import reference


def forward(
    x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, delta_TE: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum [T, E], y [T, E], rstd [T]): sum = x + delta in x's dtype, x itself without a delta; y = norm(sum) * weight.

    rstd = 1 / sqrt(mean(sum ** 2) + eps) of the rounded sum, fp32 (fp64 for fp64), as is all arithmetic; y is rounded once.
    """
    return reference.forward_reference(x_TE, weight_E, eps, delta_TE)


def normalize(sum_TE: torch.Tensor, rstd_T: torch.Tensor, weight_E: torch.Tensor) -> torch.Tensor:
    """The y that `forward` gave, bit for bit."""
    return reference.normalize_reference(sum_TE, rstd_T, weight_E)


def backward(
    dy_TE: torch.Tensor,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_E: torch.Tensor,
    dsum_TE: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx [T, E], which is ddelta too: the gradient through the norm, plus that of the sum (dsum) if given, rounded once."""
    return reference.backward_reference(dy_TE, sum_TE, rstd_T, weight_E, dsum_TE)


def weight_gradient(dy_TE: torch.Tensor, sum_TE: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """[E] fp32 (fp64 for fp64): dweight, in a fixed order of sums."""
    return reference.weight_gradient_reference(dy_TE, sum_TE, rstd_T)
