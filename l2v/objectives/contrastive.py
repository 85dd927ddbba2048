"""In-batch contrastive loss: InfoNCE on cosine similarity over packed embeddings, negatives from all ranks.

InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748); as multiple negatives ranking with hard negatives in one softmax:
Henderson et al. 2017 (arXiv 1705.00652). SimCSE's two views are a query and a positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F


@dataclass
class Groups:
    """Which embeddings are queries, which are candidates, and which candidate answers which query.

    queries_N, candidates_M: rows of the embeddings (int64); targets_N: index of each query's positive among all candidates
    of all ranks; keys_M: equal for equal texts; counts: candidates of every rank; total: queries of all ranks.
    """

    queries_N: torch.Tensor
    candidates_M: torch.Tensor
    targets_N: torch.Tensor
    keys_M: torch.Tensor
    counts: list[int]
    total: int

    @classmethod
    def from_columns(
        cls,
        columns_S: torch.Tensor,
        keys_S: torch.Tensor,
        *,
        counts: list[int] | None = None,
        rank: int = 0,
        total: int | None = None,
    ) -> Groups:
        """Read the structure off the columns (0 query, 1 positive, 2.. negatives), on the host.

        Segments stand example by example, the query first. With more than one rank, `counts` are the candidates and
        `total` the queries of all ranks. A negative column is no part of the loss.
        """
        queries = (columns_S == 0).nonzero().flatten()
        candidates = (columns_S >= 1).nonzero().flatten()
        positives = (columns_S[candidates] == 1).nonzero().flatten()
        if len(positives) != len(queries):
            raise ValueError(f"{len(queries)} queries and {len(positives)} positives: each query needs exactly one")
        counts = counts or [len(candidates)]
        if counts[rank] != len(candidates):
            raise ValueError(f"rank {rank} holds {len(candidates)} candidates and was announced with {counts[rank]}")
        offset = sum(counts[:rank])
        total = len(queries) if total is None else total
        return cls(queries, candidates, positives + offset, keys_S[candidates], counts, total)

    def to(self, device: torch.device) -> Groups:
        """The same on a device."""
        moved = (
            t.to(device, non_blocking=True) for t in (self.queries_N, self.candidates_M, self.targets_N, self.keys_M)
        )
        return Groups(*moved, self.counts, self.total)


def contrastive_loss(
    embeddings_SE: torch.Tensor, groups: Groups, *, scale: float, mask_duplicates: bool = True, gather: bool = False
) -> torch.Tensor:
    """InfoNCE of this rank's queries against the candidates of this rank, or of all (`gather`).

    Sum over this rank's queries divided by the queries of all ranks: the sum over ranks is the mean. A candidate with the
    same text as the positive is no negative (`mask_duplicates`). Computed in float32. Returns a scalar.
    """
    embeddings_SE = F.normalize(embeddings_SE.float(), dim=-1)
    queries_NE = embeddings_SE[groups.queries_N]
    candidates_ME = embeddings_SE[groups.candidates_M]
    keys_M = groups.keys_M
    if gather:
        candidates_ME = gather_rows(candidates_ME, groups.counts)
        keys_M = _gather(keys_M, groups.counts)
    scores_NM = scale * queries_NE @ candidates_ME.T
    if mask_duplicates and len(keys_M):
        same_NM = keys_M[groups.targets_N].unsqueeze(1) == keys_M.unsqueeze(0)
        same_NM.scatter_(1, groups.targets_N.unsqueeze(1), False)
        scores_NM = scores_NM.masked_fill(same_NM, -torch.inf)
    return F.cross_entropy(scores_NM, groups.targets_N, reduction="sum") / max(groups.total, 1)


def gather_rows(rows_ME: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows of all ranks, rank by rank; gradients of remote rows come back to their owner (summed over ranks)."""
    return _GatherRows.apply(rows_ME, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ME: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        return _gather(rows_ME, counts)

    @staticmethod
    def backward(ctx, gradient_ME: torch.Tensor):
        gradient_ME = gradient_ME.contiguous()
        dist.all_reduce(gradient_ME)
        rank = dist.get_rank()
        begin = sum(ctx.counts[:rank])
        return gradient_ME[begin : begin + ctx.counts[rank]], None


def _gather(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    # Collectives want equal shapes: pad to the largest share, cut off after.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
