"""RMSNorm, with the addition to the residual stream that precedes it."""

import torch

from l2v_kernels.rms_norm.op import RmsNorm

__all__ = ["rms_norm"]


def rms_norm(
    x_TE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float = 1e-6,
    residual_TE: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = s / sqrt(mean(s ** 2) + eps) * (offset + weight) over the last dimension, s = x, or x + residual.

    Args:
        x_TE: [T, E] of a floating dtype, or [T, H, D] for a norm of each head; rows may lie apart in memory, as slices of
            a wider buffer do.
        weight_E: [E] of a floating dtype ([D] for [T, H, D]).
        eps: at least 0.
        residual_TE: like x. The sum is rounded to x's dtype, and the norm is that of the rounded sum.
        offset: added to the weight in fp32; 1 for the norms of Gemma, which store their weights less 1.

    Returns:
        y in x's shape and dtype, computed in fp32 and rounded once; with a residual (sum, y). Differentiable once in x,
        weight and residual, through both results. Kept for the backward: the sum (x without a residual) and 4 bytes a row.

    Raises:
        ValueError: shapes, dtypes, devices or eps are outside the above.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), as Llama, Mistral and Qwen have it, and
        with an offset of 1 Gemma.
    """
    tensors = (x_TE, weight_E) if residual_TE is None else (x_TE, weight_E, residual_TE)
    shapes = f"x {tuple(x_TE.shape)}, weight {tuple(weight_E.shape)}"
    if residual_TE is not None:
        shapes += f", residual {tuple(residual_TE.shape)}"
    if x_TE.ndim not in (2, 3) or x_TE.shape[-1] == 0 or weight_E.shape != x_TE.shape[-1:]:
        raise ValueError(f"rms_norm needs x [T, E] or [T, H, D] and a weight as wide, got {shapes}")
    if residual_TE is not None and (residual_TE.shape != x_TE.shape or residual_TE.dtype != x_TE.dtype):
        raise ValueError(f"rms_norm needs a residual like x, {x_TE.dtype}, got {residual_TE.dtype} for {shapes}")
    if not all(x.is_floating_point() for x in tensors):
        raise ValueError(
            f"rms_norm needs floating tensors, got {', '.join(str(x.dtype) for x in tensors)} for {shapes}"
        )
    if any(x.device != x_TE.device for x in tensors):
        raise ValueError(f"x, weight and residual must be on one device for {shapes}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps} for {shapes}")
    return RmsNorm.apply(x_TE, weight_E, eps, residual_TE, offset)
