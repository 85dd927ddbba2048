"""Which tokens of a batch are read after the last layer: the labelled ones, or those that are pooled.

Nothing else needs the last layer's output projection, MLP and final norm; its keys and values are needed of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.autograd.function import once_differentiable

from l2v.batch import PackedBatch
from l2v.model.pooling import pool_weights

MOST = 0.9
"""Largest share of the tokens for which rows are picked: picking them costs two passes over them, forward and backward."""


@dataclass(frozen=True)
class Read:
    """R of T tokens, in their order, each once.

    index_R: int64. pooled: for vectors, their weights float32 [R] and the segments' borders among them, int32 [S+1].
    """

    index_R: torch.Tensor
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, batch: PackedBatch, want: Literal["hidden", "vectors", "logits", "loss"], how: str) -> Read | None:
        """What `want` reads; None if that is nearly every token, or none. how: the pooling. Nothing waits for the device."""
        if want == "hidden":
            return None
        if want != "vectors":
            return cls(batch.label_index_L) if _pays(len(batch.label_index_L), batch.tokens) else None
        index_P, borders, S = batch.pool_index_P, batch.pool_borders, len(batch.lengths)
        if how in ("first", "last") and min(batch.pooled_lengths) > 0:
            if not _pays(S, batch.tokens):
                return None
            at_S = borders[:-1] if how == "first" else borders[1:] - 1
            ones_S = torch.ones(S, device=index_P.device)
            return cls(index_P[at_S], (ones_S, torch.arange(S + 1, dtype=torch.int32, device=index_P.device)))
        if not _pays(len(index_P), batch.tokens):
            return None
        return cls(index_P, (pool_weights(batch, how)[index_P], borders))


def _pays(rows: int, tokens: int) -> bool:
    return 0 < rows <= MOST * tokens


class PickRows(torch.autograd.Function):
    """x [T, N] -> x[index] [R, N], for an index without repetition.

    The backward of an index that may repeat adds with atomics, or sorts.
    """

    @staticmethod
    def forward(ctx, x_TN: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(x_TN)
        ctx.save_for_backward(index_R)
        return x_TN.index_select(0, index_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RN: torch.Tensor):
        (index_R,) = ctx.saved_tensors
        return dy_RN.new_zeros(ctx.rows, dy_RN.shape[1]).index_copy_(0, index_R, dy_RN), None
