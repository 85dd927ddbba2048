"""Counter-based (Philox) dropout: a token's mask depends on its segment's seed and its position there, not on the pack."""

import torch

from l2v_kernels.dropout.op import PhiloxDropout
from l2v_kernels.philox import threshold

__all__ = ["dropout"]


def dropout(x_TE: torch.Tensor, p: float, seeds_T: torch.Tensor, rows_T: torch.Tensor, stream: int) -> torch.Tensor:
    """x / (kept fraction) where kept, 0 elsewhere; x itself where p rounds to 0.

    Args:
        x_TE: [T, E] fp64, fp32, fp16 or bf16.
        p: drop probability, rounded to 1/256 (see `philox.threshold`).
        seeds_T: int64 [T], the seed of each token's segment.
        rows_T: int32 or int64 [T], each token's position in its segment.
        stream: which dropout of the model this is, by convention layer * 16 + module; 0 <= stream < 2**31.

    Returns:
        [T, E] in x's dtype, differentiable in x. Element (t, e) is kept if byte (seeds_T[t], rows_T[t], e, stream) of
        `philox.keep_bytes` in DOMAIN_DROPOUT is at least threshold(p).

    Raises:
        ValueError: shapes, dtypes, devices, p or stream are outside the above.

    Source: dropout of Srivastava et al. 2014, with masks from Philox (Salmon et al. 2011, see `philox`).
    """
    drop_below = threshold(p)
    shapes = f"x {tuple(x_TE.shape)}, seeds {tuple(seeds_T.shape)}, rows {tuple(rows_T.shape)}"
    if x_TE.ndim != 2 or seeds_T.shape != x_TE.shape[:1] or rows_T.shape != x_TE.shape[:1]:
        raise ValueError(f"dropout needs x [T, E], seeds [T] and rows [T], got {shapes}")
    if not x_TE.is_floating_point() or seeds_T.dtype != torch.int64 or rows_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"dropout needs floating x, int64 seeds and int32 or int64 rows, got {x_TE.dtype}, "
            f"{seeds_T.dtype} and {rows_T.dtype} for {shapes}"
        )
    if not x_TE.device == seeds_T.device == rows_T.device:
        raise ValueError(f"x, seeds and rows must be on one device for {shapes}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be at least 0 and below 2**31, got {stream} for {shapes}")
    if drop_below == 0:
        return x_TE
    return PhiloxDropout.apply(x_TE, p, seeds_T, rows_T, stream)
