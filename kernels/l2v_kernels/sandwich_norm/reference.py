"""The two norms and the addition in plain PyTorch: the definition of the op, and the path without Triton."""

from __future__ import annotations

import torch

from l2v_kernels.rms_norm.reference import backward_reference as norm_backward
from l2v_kernels.rms_norm.reference import normalize_reference, rstd_reference, scaled


def forward_reference(
    delta_TE: torch.Tensor,
    residual_TE: torch.Tensor,
    after_E: torch.Tensor,
    before_E: torch.Tensor | None,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(sum [T, E], y [T, E], rstd of delta [T], rstd of the sum [T]), see `op.forward`."""
    delta_rstd_T = rstd_reference(delta_TE, eps)
    sum_TE = scaled(delta_TE, delta_rstd_T, after_E, offset).add_(residual_TE).to(delta_TE.dtype)
    if before_E is None:
        return sum_TE, None, delta_rstd_T, None
    rstd_T = rstd_reference(sum_TE, eps)
    return sum_TE, normalize_reference(sum_TE, rstd_T, before_E, offset), delta_rstd_T, rstd_T


def backward_reference(
    dy_TE: torch.Tensor,
    dsum_TE: torch.Tensor | None,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    before_E: torch.Tensor,
    delta_TE: torch.Tensor,
    delta_rstd_T: torch.Tensor,
    after_E: torch.Tensor,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dresidual [T, E], ddelta [T, E]): the backward of the second norm, plus dsum; then that of the first."""
    dresidual_TE = norm_backward(dy_TE, sum_TE, rstd_T, before_E, dsum_TE, offset)
    return dresidual_TE, norm_backward(dresidual_TE, delta_TE, delta_rstd_T, after_E, None, offset)
