"""Who is compared with whom in a contrastive loss: queries, candidates, and the ids that exclude a pair from the negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from l2v.batch import moved


@dataclass
class Groups:
    """Which embeddings are queries, which are candidates, and which candidate belongs to which query.

    Queries and candidates of all ranks are numbered rank by rank. All tensors are int64 except hard_M:
    queries_N, candidates_M: rows of this rank's embeddings.
    targets_N: number of each query's positive.
    query_keys_N2: text keys of the query's positive and of the query itself.
    keys_M: text keys of the candidates, equal for equal texts.
    query_groups_N, groups_M: group of the example of a query or a positive; -1 for none and for hard negatives.
    questions_M: key of the query that a positive answers; -1 for hard negatives.
    owners_M: number of the query that a candidate belongs to.
    hard_M: bool, whether a candidate is a hard negative.
    query_counts, counts: queries and candidates of every rank. rank: the rank of this share. total: the loss is divided by it.
    on_host: the same before it was moved to a device; None if it was not.
    """

    queries_N: torch.Tensor
    candidates_M: torch.Tensor
    targets_N: torch.Tensor
    query_keys_N2: torch.Tensor
    keys_M: torch.Tensor
    query_groups_N: torch.Tensor
    groups_M: torch.Tensor
    questions_M: torch.Tensor
    owners_M: torch.Tensor
    hard_M: torch.Tensor
    query_counts: list[int]
    counts: list[int]
    rank: int
    total: int
    on_host: Groups | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_columns(
        cls,
        columns_S: torch.Tensor,
        keys_S: torch.Tensor,
        groups_S: torch.Tensor | None = None,
        *,
        query_counts: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        rank: int = 0,
        total: int | None = None,
    ) -> Groups:
        """Derive the structure from the columns (0 query, 1 positive, 2.. negatives), on the host.

        Segments are ordered by example, the query first. A segment with a column below 0 is not part of the loss.
        query_counts, counts: queries and candidates of all ranks whose embeddings will be gathered, default: this rank only.
        total: number of queries that the loss is averaged over, default: the sum of query_counts. groups_S: int64, default:
        no groups.

        Raises:
            ValueError: a query does not have exactly one positive, or this rank's share differs from the counts.
        """
        is_query_S = columns_S == 0
        queries = is_query_S.nonzero().flatten()
        candidates = (columns_S >= 1).nonzero().flatten()
        positives = (columns_S[candidates] == 1).nonzero().flatten()
        # A candidate belongs to the last query before it.
        owners = (is_query_S.cumsum(0) - 1)[candidates]
        if not torch.equal(owners[positives], torch.arange(len(queries))):
            raise ValueError(f"{len(queries)} queries and {len(positives)} positives: each query needs exactly one")
        query_counts = list(query_counts or [len(queries)])
        counts = list(counts or [len(candidates)])
        announced = list(zip(query_counts, counts, strict=False))[rank : rank + 1]
        if len(query_counts) != len(counts) or announced != [(len(queries), len(candidates))]:
            raise ValueError(
                f"rank {rank} holds {len(queries)} queries and {len(candidates)} candidates; announced were the queries "
                f"{query_counts} and the candidates {counts} of all ranks"
            )
        keys_M, hard_M = keys_S[candidates], columns_S[candidates] >= 2
        groups_S = torch.full_like(keys_S, -1) if groups_S is None else groups_S
        return cls(
            queries_N=queries,
            candidates_M=candidates,
            targets_N=positives + sum(counts[:rank]),
            query_keys_N2=torch.stack([keys_M[positives], keys_S[queries]], 1),
            keys_M=keys_M,
            query_groups_N=groups_S[queries],
            # A hard negative is known to be irrelevant, so it belongs to no group, even if its example does.
            groups_M=groups_S[candidates].masked_fill(hard_M, -1),
            # Neither is it an answer to the question of its example.
            questions_M=keys_S[queries][owners].masked_fill(hard_M, -1),
            owners_M=owners + sum(query_counts[:rank]),
            hard_M=hard_M,
            query_counts=query_counts,
            counts=counts,
            rank=rank,
            total=sum(query_counts) if total is None else total,
        )

    def to(self, device: torch.device) -> Groups:
        """The same with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        there: dict[str, Any] = {k: moved(v, device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return replace(self, **there, on_host=self.on_host or self)


def ids_of(groups: Groups, keys: bool, by_group: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Ids of this rank's candidates [M, K] and queries [N, K]; a pair with an equal id in any column is not a negative.

    keys: a candidate is compared by its text with the query's positive and with the query, and by the question that it answers
    with the query: another answer to the same question is not wrong. by_group: by its group.
    """
    if not (keys or by_group):
        return None, None
    of_candidates: list[torch.Tensor] = []
    of_queries: list[torch.Tensor] = []
    if keys:
        positive_N, query_N = groups.query_keys_N2.unbind(1)
        of_candidates += [groups.keys_M, groups.keys_M, groups.questions_M]
        of_queries += [positive_N, query_N, query_N]
    if by_group:
        of_candidates.append(groups.groups_M)
        of_queries.append(groups.query_groups_N)
    return torch.stack(of_candidates, 1), torch.stack(of_queries, 1)
