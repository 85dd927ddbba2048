"""Checks of `info_nce`'s arguments: shapes and settings always, values where that needs no sync."""

import math
from collections.abc import Sequence

import torch

from l2v_kernels.info_nce.settings import DIRECTIONS, Labels, Settings

MAX_PREFIXES = 16
"""The kernels hold a few numbers of each prefix in registers."""


def check_tensors(
    queries_NE: torch.Tensor,
    candidates_ME: torch.Tensor,
    targets_N: torch.Tensor,
    all_queries_QE: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(queries, candidates, all queries). Raises ValueError for shapes, dtypes or devices."""
    all_queries_QE = queries_NE if all_queries_QE is None else all_queries_QE
    tensors = (queries_NE, candidates_ME, all_queries_QE)
    shapes = f"queries {tuple(queries_NE.shape)}, candidates {tuple(candidates_ME.shape)}"
    if all_queries_QE is not queries_NE:
        shapes += f", all_queries {tuple(all_queries_QE.shape)}"
    if any(x.ndim != 2 for x in tensors) or len({x.shape[1] for x in tensors}) != 1 or queries_NE.shape[1] == 0:
        raise ValueError(f"queries [N, E] and candidates [M, E] must agree in E, at least 1, got {shapes}")
    if not queries_NE.is_floating_point() or len({x.dtype for x in tensors}) != 1:
        types = ", ".join(str(x.dtype) for x in tensors)
        raise ValueError(f"queries and candidates must have one floating dtype, got {types} for {shapes}")
    if targets_N.dtype != torch.int64 or targets_N.shape != queries_NE.shape[:1]:
        raise ValueError(
            f"targets_N must be int64 [{len(queries_NE)}], one candidate a query, got {targets_N.dtype} "
            f"{tuple(targets_N.shape)} for {shapes}"
        )
    if any(x.device != queries_NE.device for x in (*tensors, targets_N)):
        devices = ", ".join(str(x.device) for x in (*tensors, targets_N))
        raise ValueError(f"queries, candidates and targets must be on one device, got {devices} for {shapes}")
    return tensors


def check_directions(directions: Sequence[str], partition: str) -> bool:
    """Whether the partition is joint. Raises ValueError for directions and partitions that do not exist or combine."""
    if isinstance(directions, str) or not set(directions) <= set(DIRECTIONS) or "query_to_doc" not in directions:
        raise ValueError(f'directions are "query_to_doc" and any of {", ".join(DIRECTIONS[1:])}, got {directions!r}')
    if partition not in ("joint", "per_direction"):
        raise ValueError(f'partition is "joint" or "per_direction", got {partition!r}')
    if partition == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            'partition="per_direction" takes "query_to_doc" and "doc_to_query"; the others have no positive, '
            'use "joint" for them'
        )
    return partition == "joint"


def check_prefixes(prefixes: Sequence[int] | None, E: int) -> tuple[int, ...]:
    """The prefix lengths, (E,) by default. Raises ValueError unless they ascend up to E."""
    if prefixes is None:
        return (E,)
    prefixes = tuple(int(p) for p in prefixes)
    ascending = all(a < b for a, b in zip((0, *prefixes), prefixes, strict=False))
    if not prefixes or not ascending or prefixes[-1] > E or len(prefixes) > MAX_PREFIXES:
        raise ValueError(
            f"prefixes must ascend from 1 to at most E = {E}, at most {MAX_PREFIXES} of them, got {prefixes}"
        )
    return prefixes


def check_numbers(scale: float | torch.Tensor, workspace: int, margin: float | None) -> None:
    """Raises ValueError unless scale is a positive number or a tensor of one element, and the others are in range."""
    if workspace < 1:
        raise ValueError(f"workspace is bytes for scores and must be at least 1, got {workspace}")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"false_negative_margin must be finite (None for no margin), got {margin}")
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale is a number or a tensor of one element, got {tuple(scale.shape)}")
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}")


def check_weights(prefix_weights: Sequence[float] | None, weights_N: torch.Tensor | None, P: int, N: int) -> None:
    """Raises ValueError unless weights, where given, are one a prefix and one a query."""
    if prefix_weights is not None and len(prefix_weights) != P:
        raise ValueError(f"{len(prefix_weights)} prefix_weights for {P} prefixes")
    if weights_N is not None and weights_N.shape != (N,):
        raise ValueError(f"weights_N must be [{N}], one weight a query, got {tuple(weights_N.shape)}")


def check_labels(
    tensors: tuple[torch.Tensor, ...],
    targets_N: torch.Tensor,
    candidate_ids: torch.Tensor | None,
    query_ids: torch.Tensor | None,
    all_query_ids: torch.Tensor | None,
    owners_M: torch.Tensor | None,
    restricted_M: torch.Tensor | None,
    settings: Settings,
) -> Labels:
    """The labels with defaults filled in. Raises ValueError naming what has the wrong shape or is missing."""
    N, M, Q = (len(x) for x in tensors)
    shared = tensors[2] is tensors[0]
    if settings.offset < 0 or (not shared and settings.offset + N > Q):
        raise ValueError(f"query_offset {settings.offset} and {N} queries do not lie within all {Q} queries")
    if query_ids is not None and candidate_ids is None:
        raise ValueError("query_ids need candidate_ids to compare with")
    candidate_ids = _ids(candidate_ids, M, "candidate_ids", targets_N.device)
    query_ids = _ids(query_ids, N, "query_ids", targets_N.device)
    if candidate_ids is not None and query_ids is None:
        # Clamped: a target out of range is reported elsewhere, and must not fault here.
        query_ids = (
            candidate_ids[targets_N.clamp(0, M - 1)] if M else candidate_ids.new_zeros(N, candidate_ids.shape[1])
        )
    all_query_ids = query_ids if shared else _ids(all_query_ids, Q, "all_query_ids", targets_N.device)
    with_queries = {"query_to_query", "doc_to_query"} & set(settings.directions)
    if with_queries and query_ids is not None and all_query_ids is None:
        raise ValueError(f"{' and '.join(sorted(with_queries))} with ids need the ids of all queries: all_query_ids")
    kinds = {x.shape[1] for x in (candidate_ids, query_ids, all_query_ids) if x is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"candidate_ids, query_ids and all_query_ids must have as many kinds each, got {sorted(kinds)}"
        )
    if restricted_M is not None and owners_M is None:
        raise ValueError("restricted_M needs owners_M, the query that each candidate was given with")
    for name, x, dtype in (("owners_M", owners_M, torch.int64), ("restricted_M", restricted_M, torch.bool)):
        if x is not None and (x.dtype != dtype or x.shape != (M,) or x.device != targets_N.device):
            raise ValueError(
                f"{name} must be {dtype} [{M}] on {targets_N.device}, one entry a candidate, got {x.dtype} {tuple(x.shape)} "
                f"on {x.device}"
            )
    optional = (query_ids, candidate_ids, all_query_ids, owners_M, restricted_M)
    return Labels(targets_N.contiguous(), *(None if x is None else x.contiguous() for x in optional))


def _ids(ids, rows, name, device):
    if ids is None:
        return None
    if ids.dtype != torch.int64 or ids.ndim not in (1, 2) or len(ids) != rows or ids.device != device:
        raise ValueError(
            f"{name} must be int64 [{rows}] or [{rows}, I] on {device}, got {ids.dtype} {tuple(ids.shape)} on {ids.device}"
        )
    return ids.unsqueeze(1) if ids.ndim == 1 else ids


def check_values(tensors: tuple[torch.Tensor, ...], labels: Labels, settings: Settings) -> None:
    """Raises ValueError naming a row with NaN or Inf, or a target that is not a candidate. Syncs with the device."""
    M = len(tensors[1])
    for name, x in zip(("queries", "candidates", "all_queries"), tensors, strict=True):
        if name == "all_queries" and x is tensors[0]:
            continue
        used = x[:, : settings.prefixes[-1]]
        # A finite sum means finite parts. An infinite one may be an overflow, which the slow check then rules out.
        if len(used) and not torch.isfinite(used.sum(dtype=torch.float64)):
            bad = (~torch.isfinite(used)).any(1).nonzero().flatten()
            if len(bad):
                row = int(bad[0])
                at = int((~torch.isfinite(used[row])).nonzero()[0])
                raise ValueError(
                    f"{name}: row {row} holds NaN or Inf ({float(used[row, at])} at {at}); rows affected: {len(bad)} of {len(x)}"
                )
    bad = ((labels.targets_N < 0) | (labels.targets_N >= M)).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"targets_N[{row}] is {int(labels.targets_N[row])} and there are {M} candidates")
