"""In-batch contrastive loss: InfoNCE on cosine similarity over packed embeddings, with negatives from all ranks.

InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748); as multiple negatives ranking with hard negatives in one softmax:
Henderson et al. 2017 (arXiv 1705.00652). SimCSE's two views are a query and a positive. `l2v_kernels.info_nce` computes the
scores and the loss; this module decides which query is compared with which candidates.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from l2v.objectives.gather import gather_labels, gather_rows
from l2v.objectives.groups import Groups, ids_of
from l2v.objectives.negatives import WITH_QUERIES, without_negatives
from l2v_kernels import info_nce

__all__ = ["WITH_QUERIES", "Groups", "contrastive_loss"]


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
    quantize: Literal["int8", "binary"] | None = None,
    warn: bool = True,
) -> torch.Tensor:
    """InfoNCE of this rank's queries against the candidates of all ranks that `groups` counts.

    embeddings_SE: [S, E], fp32 (or another dtype that `info_nce` takes), not normalised. Returns a scalar: the sum over this
    rank's queries divided by `groups.total`. So the sum over ranks is the mean over all queries, and the gradients of all
    ranks add up to those of a single process with all the data. With a single candidate in total its probability is always
    1, and the loss is exactly 0.

    mask_duplicates: a candidate with the same text as the query or its positive is not a negative. Neither is the positive of
    another query with the same text (a second answer to one question), nor another query that shares its own or its
    positive's text with this one. Hard negatives stay negatives of their question. mask_groups: the queries and positives of
    examples of the same group are not negatives either; it must be the same on all ranks. own_negatives: a hard negative is
    only compared with its own query. The other options are those of `l2v_kernels.info_nce`, which cites their sources.

    warn: warn, once in a process, if a query has no negative left, since its gradient is then 0; on a single rank only.

    Values are not checked, so nothing waits for the device: a row with NaN or Inf makes the loss of its query NaN or Inf.
    """
    with_queries = bool(WITH_QUERIES & set(directions))
    if warn and len(groups.counts) == 1:
        _warn_of_lonely(
            groups, mask_duplicates=mask_duplicates, mask_groups=mask_groups, own_negatives=own_negatives,
            with_queries=with_queries,
        )  # fmt: skip
    if sum(groups.counts) < 2:
        # All ranks know the counts and return here together, so no rank waits in a collective.
        return embeddings_SE[:0].sum()
    queries_NE = embeddings_SE[groups.queries_N]
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
        prefixes=prefixes, prefix_weights=prefix_weights, quantize=quantize,
        all_queries_QE=rows[1] if several and with_queries else None,
        all_query_ids=labels.get("query_ids") if several and with_queries else None,
        query_offset=sum(groups.query_counts[: groups.rank]), reduction="sum", check_values=False,
    )  # fmt: skip
    return loss / max(groups.total, 1)


_warned: list[int] = []
"""Holds an entry once this process has warned of queries without a negative."""


def _warn_of_lonely(groups: Groups, **options: bool) -> None:
    """Warn, once in a process, of queries without a negative. Labels that exist on a device only are not read."""
    groups = groups.on_host or groups
    if _warned or groups.keys_M.device.type != "cpu":
        return
    if alone := int(without_negatives(groups, **options).sum()):
        _warned.append(alone)
        warnings.warn(
            f"{alone} of {len(groups.targets_N)} queries have no negative left, so they teach nothing: every other text has "
            "the same text key, question or group; give the texts keys of their own, or use a larger batch",
            stacklevel=3,
        )


def _gather_embeddings(
    candidates_ME: torch.Tensor, queries_NE: torch.Tensor, groups: Groups, *, with_queries: bool
) -> Sequence[torch.Tensor]:
    """The candidates of all ranks and, if queries are candidates too, the queries of all ranks; one rank keeps its own."""
    if len(groups.counts) == 1:
        return [candidates_ME]
    if with_queries:
        return gather_rows([candidates_ME, queries_NE], [groups.counts, groups.query_counts])
    return gather_rows([candidates_ME], [groups.counts])


def _loss_labels(
    groups: Groups, mask_duplicates: bool, mask_groups: bool, with_queries: bool, *, with_owners: bool
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Ids of this rank's queries, and the labels that the loss needs of all ranks: ids, and owners of hard negatives."""
    candidate_ids, query_ids = ids_of(groups, mask_duplicates, mask_groups)
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
