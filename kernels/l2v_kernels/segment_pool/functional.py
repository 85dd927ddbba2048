"""Pooling of segments without autograd: see `l2v_kernels.segment_pool` for the op. Arguments are not checked."""

import torch

from l2v_kernels.segment_pool import reference


def forward(
    x_TE: torch.Tensor,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(vectors [S, E], rstd [T], totals [S]), all fp32 (fp64 for fp64).

    rstd is that of each token of a weight other than 0, anything for the others, and None without a norm; totals are the
    sums of each segment's weights.
    """
    return reference.forward_reference(x_TE, weights_T, cu_seqlens, norm_weight_E, eps)


def backward(
    dvectors_SE: torch.Tensor,
    x_TE: torch.Tensor | None,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    rstd_T: torch.Tensor | None,
    totals_S: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dx [T, E] in `dtype`, that of x; x and rstd are needed with a norm only. A token of weight 0 gets 0."""
    return reference.backward_reference(
        dvectors_SE, x_TE, weights_T, cu_seqlens, norm_weight_E, rstd_T, totals_S, dtype
    )
