"""Pooling: from token states to one vector per segment, over the segment's pooled tokens."""

from __future__ import annotations

import torch

from l2v.batch import PackedBatch
from l2v_kernels import segment_pool
from l2v_kernels.spans import spanned


def pool_weights(batch: PackedBatch, how: str) -> torch.Tensor:
    """The weight of each token in its segment's vector, float32 [T], before division by their sum.

    how: mean, weighted_mean (weights 1..n over the pooled tokens, Muennighoff 2022, arXiv 2202.08904), last or first. Only
    tokens in the pool mask count. Nothing waits for the device.

    Raises:
        ValueError: another name in `how`.
    """
    mask_T = batch.pool_mask_T
    if how == "mean":
        return mask_T.float()
    if how == "weighted_mean":
        return _rank_T(batch) * mask_T
    if how not in ("last", "first"):
        raise ValueError(f"pooling '{how}' is unknown; use mean, weighted_mean, last or first")
    rank_T = _rank_T(batch)
    wanted_T = rank_T.new_ones(())
    if how == "last":
        lengths_S = batch.cu_seqlens.diff().long()
        counts_S = torch.segment_reduce(mask_T.float(), "sum", lengths=lengths_S, unsafe=True)
        wanted_T = counts_S.repeat_interleave(lengths_S, output_size=len(mask_T))
    return ((rank_T == wanted_T) & mask_T).float()


@spanned("pooling")
def pool(hidden_TE: torch.Tensor, batch: PackedBatch, how: str) -> torch.Tensor:
    """Pool packed hidden states to float32 [S, E], by `pool_weights`; a segment without pooled tokens gives zeros."""
    return segment_pool(hidden_TE, pool_weights(batch, how), batch.cu_seqlens)


def _rank_T(batch: PackedBatch) -> torch.Tensor:
    """1 for the first pooled token of a segment, 2 for the second and so on (float32 [T])."""
    running_T = batch.pool_mask_T.long().cumsum(0)
    before_S = torch.cat([running_T.new_zeros(1), running_T])[batch.cu_seqlens[:-1].long()]
    lengths_S = batch.cu_seqlens.diff().long()
    return (running_T - before_S.repeat_interleave(lengths_S, output_size=len(running_T))).float()
