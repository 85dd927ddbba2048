"""Which queries have a negative left, after duplicates, groups and restricted hard negatives are excluded. On the host.

A query without any negative has a gradient of exactly 0, so it teaches nothing. Whoever computes the loss counts such queries
here, from the labels alone: nothing waits for the device.
"""

from __future__ import annotations

import torch

from l2v.objectives.groups import Groups, ids_of

WITH_QUERIES = {"query_to_query", "doc_to_query"}
"""Directions in which queries are candidates too."""


def without_negatives(
    groups: Groups, *, mask_duplicates: bool, mask_groups: bool, own_negatives: bool, with_queries: bool
) -> torch.Tensor:
    """bool [N]: whether a query of these groups has no negative among the candidates (and queries) of the same groups.

    groups: on the host, of one rank, or of all ranks together as one. with_queries: other queries are candidates too. What a
    false-negative margin excludes depends on the embeddings and is not counted. Time: O(M log M), and O(M) more for every
    query of which most candidates are excluded.
    """
    count, first = len(groups.keys_M), sum(groups.query_counts[: groups.rank])
    candidate_MI, query_NI = ids_of(groups, mask_duplicates, mask_groups)
    own_N = torch.arange(len(groups.targets_N))
    # At least so many negatives are left: a candidate that shares several ids is subtracted several times.
    left_N = torch.full_like(own_N, count - 1)
    if own_negatives:  # hard negatives of the others are not compared
        own_hard_N = torch.bincount(groups.owners_M[groups.hard_M] - first, minlength=len(own_N))
        left_N -= groups.hard_M.sum() - own_hard_N
    if candidate_MI is not None and query_NI is not None:
        for wanted_N, ids_M in zip(query_NI.unbind(1), candidate_MI.unbind(1), strict=True):
            left_N -= _occurrences(wanted_N, ids_M)
    alone_N = torch.zeros(len(own_N), dtype=torch.bool)
    for row in (left_N <= 0).nonzero().flatten().tolist():
        met_M, others_N = torch.ones(count, dtype=torch.bool), own_N != row
        met_M[groups.targets_N[row] - sum(groups.counts[: groups.rank])] = False
        if own_negatives:
            met_M &= ~groups.hard_M | (groups.owners_M - first == row)
        if candidate_MI is not None and query_NI is not None:
            met_M &= ~_share(query_NI[row], candidate_MI)
            others_N &= ~_share(query_NI[row], query_NI)
        alone_N[row] = not (met_M.any() or (with_queries and others_N.any()))
    return alone_N


def _occurrences(wanted_N: torch.Tensor, ids_M: torch.Tensor) -> torch.Tensor:
    """How often each wanted id occurs; 0 for a negative one, which equals nothing."""
    sorted_M, wanted_N = ids_M.sort().values, wanted_N.contiguous()
    found_N = torch.searchsorted(sorted_M, wanted_N, right=True) - torch.searchsorted(sorted_M, wanted_N)
    return found_N.masked_fill(wanted_N < 0, 0)


def _share(wanted_I: torch.Tensor, ids_RI: torch.Tensor) -> torch.Tensor:
    """bool [R]: rows that share an id of any kind with the wanted ones."""
    return ((wanted_I == ids_RI) & (ids_RI >= 0)).any(-1)
