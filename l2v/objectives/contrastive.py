"""In-batch contrastive loss: InfoNCE on cosine similarity over packed embeddings, with negatives from all ranks.

InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748); as multiple negatives ranking with hard negatives in one softmax:
Henderson et al. 2017 (arXiv 1705.00652). SimCSE's two views are a query and a positive. `l2v_kernels.info_nce` computes the
scores and the loss; this module decides which query is compared with which candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from l2v.objectives.gather import gather_labels, gather_rows
from l2v_kernels import info_nce

WITH_QUERIES = {"query_to_query", "doc_to_query"}


@dataclass
class Groups:
    """Which embeddings are queries, which are candidates, and which candidate belongs to which query.

    Queries and candidates of all ranks are numbered rank by rank. All tensors are int64 except hard_M:
    queries_N, candidates_M: rows of this rank's embeddings.
    targets_N: number of each query's positive.
    query_keys_N2: text keys of the query's positive and of the query itself.
    keys_M: text keys of the candidates, equal for equal texts.
    query_groups_N, groups_M: group of the example of a query or a positive; -1 for none and for hard negatives.
    owners_M: number of the query that a candidate belongs to.
    hard_M: bool, whether a candidate is a hard negative.
    query_counts, counts: queries and candidates of every rank. rank: the rank of this share. total: the loss is divided by it.
    """

    queries_N: torch.Tensor
    candidates_M: torch.Tensor
    targets_N: torch.Tensor
    query_keys_N2: torch.Tensor
    keys_M: torch.Tensor
    query_groups_N: torch.Tensor
    groups_M: torch.Tensor
    owners_M: torch.Tensor
    hard_M: torch.Tensor
    query_counts: list[int]
    counts: list[int]
    rank: int
    total: int

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
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **moved)


def contrastive_loss(
    embeddings_SE: torch.Tensor,
    groups: Groups,
    *,
    scale: float,
    mask_duplicates: bool = True,
    mask_groups: bool = False,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    own_negatives: bool = False,
    false_negative_margin: float | None = None,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """InfoNCE of this rank's queries against the candidates of all ranks that `groups` counts.

    embeddings_SE: [S, E], fp32 (or another dtype that `info_nce` takes), not normalised. Returns a scalar: the sum over this
    rank's queries divided by `groups.total`. So the sum over ranks is the mean over all queries, and the gradients of all
    ranks add up to those of a single process with all the data. With a single candidate in total its probability is always
    1, and the loss is exactly 0.

    mask_duplicates: a candidate with the same text as the query or its positive is not a negative; neither is another query
    that shares its own or its positive's text with this one. mask_groups: the queries and positives of examples of the same
    group are not negatives either; it must be the same on all ranks. own_negatives: a hard negative is only compared with
    its own query. The other options are those of `l2v_kernels.info_nce`, which cites their sources.

    Values are not checked, so nothing waits for the device: a row with NaN or Inf makes the loss of its query NaN or Inf.
    """
    if sum(groups.counts) < 2:
        # All ranks know the counts and return here together, so no rank waits in a collective.
        return embeddings_SE[:0].sum()
    queries_NE = embeddings_SE[groups.queries_N]
    with_queries = bool(WITH_QUERIES & set(directions))
    rows = _gather_embeddings(embeddings_SE[groups.candidates_M], queries_NE, groups, with_queries=with_queries)
    query_ids, labels = _loss_labels(
        groups, mask_duplicates, mask_groups, with_queries, with_owners=own_negatives or "doc_to_doc" in directions
    )
    if len(queries_NE) == 0:
        # This rank has no loss, but the gradients of the others pass through the same collectives.
        return functools.reduce(torch.add, [part[:0].sum() for part in rows])
    several = len(groups.counts) > 1
    loss = info_nce(
        queries_NE, rows[0], groups.targets_N, scale=scale, directions=directions, partition=partition,
        candidate_ids=labels.get("candidate_ids"), query_ids=query_ids, owners_M=labels.get("owners_M"),
        restricted_M=labels["hard_M"].bool() if own_negatives else None, false_negative_margin=false_negative_margin,
        prefixes=prefixes, prefix_weights=prefix_weights,
        all_queries_QE=rows[1] if several and with_queries else None,
        all_query_ids=labels.get("query_ids") if several and with_queries else None,
        query_offset=sum(groups.query_counts[: groups.rank]), reduction="sum", check_values=False,
    )  # fmt: skip
    return loss / max(groups.total, 1)


def _gather_embeddings(
    candidates_ME: torch.Tensor, queries_NE: torch.Tensor, groups: Groups, *, with_queries: bool
) -> Sequence[torch.Tensor]:
    """The candidates of all ranks and, if queries are candidates too, the queries of all ranks; one rank keeps its own."""
    if len(groups.counts) == 1:
        return [candidates_ME]
    if with_queries:
        return gather_rows([candidates_ME, queries_NE], [groups.counts, groups.query_counts])
    return gather_rows([candidates_ME], [groups.counts])


def _ids(groups: Groups, keys: bool, by_group: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Ids of this rank's candidates [M, K] and queries [N, K]; a pair with an equal id in any column is not a negative."""
    if not (keys or by_group):
        return None, None
    of_candidates: list[torch.Tensor] = []
    of_queries: list[torch.Tensor] = []
    if keys:  # a candidate's text is compared with two texts: the query's positive and the query
        of_candidates += [groups.keys_M, groups.keys_M]
        of_queries += groups.query_keys_N2.unbind(1)
    if by_group:
        of_candidates.append(groups.groups_M)
        of_queries.append(groups.query_groups_N)
    return torch.stack(of_candidates, 1), torch.stack(of_queries, 1)


def _loss_labels(
    groups: Groups, mask_duplicates: bool, mask_groups: bool, with_queries: bool, *, with_owners: bool
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Ids of this rank's queries, and the labels that the loss needs of all ranks: ids, and owners of hard negatives."""
    candidate_ids, query_ids = _ids(groups, mask_duplicates, mask_groups)
    labels: dict[str, torch.Tensor | None] = {"candidate_ids": candidate_ids}
    if with_queries:
        labels["query_ids"] = query_ids
    if with_owners:
        labels |= {"owners_M": groups.owners_M, "hard_M": groups.hard_M.long()}
    return query_ids, _labels_of_all_ranks(labels, groups)


def _labels_of_all_ranks(labels: dict[str, torch.Tensor | None], groups: Groups) -> dict[str, torch.Tensor]:
    """The given labels of all ranks, in one collective; in none if there are no labels or only one rank."""
    given = {name: label for name, label in labels.items() if label is not None}
    if len(groups.counts) == 1 or not given:
        return given
    counts = [groups.query_counts if name == "query_ids" else groups.counts for name in given]
    return dict(zip(given, gather_labels(list(given.values()), counts), strict=True))
