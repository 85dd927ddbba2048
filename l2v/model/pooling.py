"""From token states to one vector a segment, over the segment's own pooled tokens."""

from __future__ import annotations

import torch

from l2v.batch import PackedBatch
from l2v_kernels.spans import spanned


@spanned("pooling")
def pool(hidden_TE: torch.Tensor, batch: PackedBatch, how: str) -> torch.Tensor:
    """Pool packed hidden states to float32 [S, E].

    mean, weighted_mean (weights 1..n over the pooled tokens, Muennighoff 2022, arXiv 2202.08904), last, first. Only tokens
    of the pool mask count; a segment that pools no token gives zeros. No host sync: sums run over the cu_seqlens.
    """
    hidden_TE = hidden_TE.float()
    mask_T = batch.pool_mask_T
    lengths_S = batch.cu_seqlens.diff()
    if how == "mean":
        weights_T = mask_T.float()
    elif how == "weighted_mean":
        weights_T = _rank_T(batch, lengths_S) * mask_T
    elif how in ("last", "first"):
        rank_T = _rank_T(batch, lengths_S)
        wanted_T = rank_T.new_ones(())
        if how == "last":
            counts_S = torch.segment_reduce(mask_T.float(), "sum", lengths=lengths_S.long(), unsafe=True)
            wanted_T = counts_S.repeat_interleave(lengths_S.long(), output_size=len(mask_T))
        weights_T = ((rank_T == wanted_T) & mask_T).float()
    else:
        raise ValueError(f"pooling '{how}' is unknown; use mean, weighted_mean, last or first")
    lengths_S = lengths_S.long()
    sums_SE = torch.segment_reduce(hidden_TE * weights_T.unsqueeze(1), "sum", lengths=lengths_S, unsafe=True)
    total_S = torch.segment_reduce(weights_T, "sum", lengths=lengths_S, unsafe=True)
    return sums_SE / total_S.clamp(min=1e-9).unsqueeze(1)


def _rank_T(batch: PackedBatch, lengths_S: torch.Tensor) -> torch.Tensor:
    """1 for the first pooled token of a segment, 2 for the second and so on (float32 [T])."""
    running_T = batch.pool_mask_T.long().cumsum(0)
    before_S = torch.cat([running_T.new_zeros(1), running_T])[batch.cu_seqlens[:-1].long()]
    return (running_T - before_S.repeat_interleave(lengths_S.long(), output_size=len(running_T))).float()
