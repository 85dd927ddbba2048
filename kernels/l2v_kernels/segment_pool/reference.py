"""Pooling of segments in plain PyTorch: the definition of the op, and the path without Triton."""

import torch

from l2v_kernels.rms_norm.reference import factor

MIN_TOTAL = 1e-9
"""The least divisor of a segment's weighted sum: weights that are all 0 give zeros, not NaN."""


def forward_reference(
    x_TE: torch.Tensor,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(vectors [S, E], rstd [T] or None without a norm, totals [S] of the weights), see `op.forward`."""
    wide_TE = _wide(x_TE)
    scale_T, lengths_S, rstd_T = weights_T.to(wide_TE.dtype), cu_seqlens.diff().long(), None
    totals_S = torch.segment_reduce(scale_T, "sum", lengths=lengths_S, unsafe=True)
    if norm_weight_E is not None:
        rstd_T = torch.rsqrt(wide_TE.square().mean(1) + eps)
        scale_T = scale_T * rstd_T
    parts_TE = (wide_TE * scale_T.unsqueeze(1)).masked_fill_((weights_T == 0).unsqueeze(1), 0)
    vectors_SE = torch.segment_reduce(parts_TE, "sum", lengths=lengths_S, unsafe=True)
    vectors_SE /= totals_S.clamp(min=MIN_TOTAL).unsqueeze(1)
    if norm_weight_E is not None:
        vectors_SE *= factor(norm_weight_E, offset)
    return vectors_SE, rstd_T, totals_S


def backward_reference(
    dvectors_SE: torch.Tensor,
    x_TE: torch.Tensor | None,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    rstd_T: torch.Tensor | None,
    totals_S: torch.Tensor,
    dtype: torch.dtype,
    offset: float = 0.0,
) -> torch.Tensor:
    """dx [T, E] in `dtype`: each token's share of its segment's gradient, carried back through the norm."""
    g_SE = dvectors_SE / totals_S.clamp(min=MIN_TOTAL).unsqueeze(1)
    if norm_weight_E is not None:
        g_SE = g_SE * factor(norm_weight_E, offset)
    dx_TE = g_SE.repeat_interleave(cu_seqlens.diff().long(), dim=0, output_size=len(weights_T))
    scale_T = weights_T.to(dx_TE.dtype)
    if x_TE is not None and rstd_T is not None:
        unit_TE = _wide(x_TE) * rstd_T.unsqueeze(1)
        dx_TE = dx_TE - unit_TE * (dx_TE * unit_TE).mean(1, keepdim=True)
        scale_T = scale_T * rstd_T
    return (dx_TE * scale_T.unsqueeze(1)).masked_fill_((weights_T == 0).unsqueeze(1), 0).to(dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
