"""Two RMSNorms with the addition to the residual stream between them, as Gemma 2 and 3 have them around a block."""

import torch

from l2v_kernels.sandwich_norm.op import SandwichNorm

__all__ = ["sandwich_norm"]


def sandwich_norm(
    delta_TE: torch.Tensor,
    residual_TE: torch.Tensor,
    after_E: torch.Tensor,
    before_E: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = residual + norm(delta) * (offset + after), y = norm(s) * (offset + before); norm(x) = x / sqrt(mean(x ** 2) + eps).

    Args:
        delta_TE: what a block returns, [T, E] of a floating dtype; rows may lie apart in memory.
        residual_TE: the residual stream that the block read, like delta.
        after_E: weight [E] of the norm after the block, of a floating dtype.
        before_E: weight [E] of the norm before the next block.
        eps: of both norms, at least 0.
        offset: added to both weights in fp32; 1 for Gemma, which stores its norms' weights less 1.

    Returns:
        (s, y) in delta's shape and dtype, computed in fp32 and rounded once each; y is the norm of the rounded sum.
        Differentiable once in all four tensors, through both results. Kept for the backward: delta, s and 8 bytes a row.

    Raises:
        ValueError: shapes, dtypes, devices or eps are outside the above.

    Source: Gemma Team 2024 (Gemma 2, arXiv 2408.00118); the norm of Zhang & Sennrich 2019 (arXiv 1910.07467).
    """
    shapes = f"delta {tuple(delta_TE.shape)}, residual {tuple(residual_TE.shape)}"
    shapes += f", weights {tuple(after_E.shape)} and {tuple(before_E.shape)}"
    tensors = (delta_TE, residual_TE, after_E, before_E)
    if delta_TE.ndim != 2 or delta_TE.shape[1] == 0 or residual_TE.shape != delta_TE.shape:
        raise ValueError(f"sandwich_norm needs delta and residual [T, E], got {shapes}")
    if after_E.shape != delta_TE.shape[1:] or before_E.shape != delta_TE.shape[1:]:
        raise ValueError(f"sandwich_norm needs two weights [E], got {shapes}")
    if not all(x.is_floating_point() for x in tensors) or residual_TE.dtype != delta_TE.dtype:
        dtypes = ", ".join(str(x.dtype) for x in tensors)
        raise ValueError(f"sandwich_norm needs floating tensors and a residual like delta, got {dtypes} for {shapes}")
    if any(x.device != delta_TE.device for x in tensors):
        raise ValueError(f"delta, residual and weights must be on one device for {shapes}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps} for {shapes}")
    return SandwichNorm.apply(delta_TE, residual_TE, after_E, before_E, eps, offset)
