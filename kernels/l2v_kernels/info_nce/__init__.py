"""InfoNCE on cosine similarity without the full score matrix: fused normalisation, masks, directions, Matryoshka."""

import os
from collections.abc import Sequence
from typing import Literal

import torch

from l2v_kernels.info_nce import checks
from l2v_kernels.info_nce.op import InfoNce
from l2v_kernels.info_nce.quantize import QUANTIZE, Quantize
from l2v_kernels.info_nce.settings import DIRECTIONS, Direction, Settings
from l2v_kernels.info_nce.tiles import sum_dtype
from l2v_kernels.spans import spanned

__all__ = ["info_nce"]

WORKSPACE = 512 << 20
"""Default of `info_nce`'s workspace, bytes."""


@spanned("loss")
def info_nce(
    queries_NE: torch.Tensor,
    candidates_ME: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    scale: float | torch.Tensor,
    directions: Sequence[Direction] = ("query_to_doc",),
    partition: str = "joint",
    candidate_ids: torch.Tensor | None = None,
    query_ids: torch.Tensor | None = None,
    owners_M: torch.Tensor | None = None,
    restricted_M: torch.Tensor | None = None,
    false_negative_margin: float | None = None,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    weights_N: torch.Tensor | None = None,
    all_queries_QE: torch.Tensor | None = None,
    all_query_ids: torch.Tensor | None = None,
    query_offset: int = 0,
    reduction: str = "mean",
    workspace: int = WORKSPACE,
    quantize: Quantize | None = None,
    variant: Literal["chunked", "fused"] | None = None,
    check_values: bool | None = None,
) -> torch.Tensor:
    """InfoNCE of queries against candidates on scaled cosine similarity, in memory linear in N + M.

    Query n's loss is log Z_n - scale * cos(query n, candidate targets_N[n]), Z_n the sum of exp(scale * cos) over all that
    it is compared with (see `directions`). Only a tile of the N x M scores, of at most `workspace` bytes, exists at a time;
    where all of them fit, they are kept for the backward. Matmuls read the inputs' dtype and sum in fp32. No atomics: the
    same inputs give the same bits.

    Args:
        queries_NE: [N, E], fp32, bf16 or fp16 (fp64 on the CPU). Rows of any length: they are normalised here. A zero
            vector has cosine 0 with everything and gets no gradient.
        candidates_ME: [M, E], likewise, in the same dtype.
        targets_N: int64 [N], the candidate that answers each query.
        scale: one over the temperature, above 0; a tensor of one element gets a gradient.
        directions: what a query i with positive d_i is compared with. "query_to_doc": q_i with all candidates (always
            required). "doc_to_query": d_i with all queries. "query_to_query": q_i with the other queries. "doc_to_doc": d_i
            with the candidates that are not query i's.
        partition: "joint", one softmax over the scores of all directions (GTE: Li et al. 2023, arXiv 2308.03281), or
            "per_direction", one each for "query_to_doc" and "doc_to_query", averaged (CLIP: Radford et al. 2021, arXiv
            2103.00020).
        candidate_ids: int64 [M] or [M, I], I kinds of ids (same text, same group). A candidate that shares an id of any
            kind with the query is not a negative of it. A negative id equals nothing.
        query_ids: int64 [N] or [N, I]; default: the ids of each query's target.
        owners_M: int64 [M], the number of the query that a candidate was given with (as its positive or a hard negative),
            -1 for none. Required by `restricted_M`, used by "doc_to_doc".
        restricted_M: bool [M], candidates that are compared with their owner only: hard negatives that others should skip.
        false_negative_margin: a candidate with cos > cos(positive) + margin is not a negative (Zhang et al. 2025, arXiv
            2506.05176, section 3: margin 0.1). Decided for each prefix separately; no gradient flows through it.
        prefixes: Matryoshka (Kusupati et al. 2022, arXiv 2205.13147): ascending prefix lengths up to E, each with its own
            loss, from one pass over E. Default: E alone.
        prefix_weights: the weight of each prefix's loss in the result, default 1.
        weights_N: float [N], weight of each query's loss; gets a gradient. "mean" divides by their sum.
        all_queries_QE: [Q, E], the queries of all ranks where `queries_NE` are only this rank's share: rows `query_offset`
            .. query_offset + N of them. Used by "query_to_query" and "doc_to_query"; default: the queries.
        all_query_ids: int64 [Q] or [Q, I], their ids.
        query_offset: number of the first query among all of them.
        reduction: "mean", "sum" (N = 0 gives 0, with zero gradients), or "none": the losses [N], or [P, N] with P prefixes,
            without any weights.
        workspace: bytes for scores and their coefficients.
        quantize: compare the embeddings as small vectors: "int8" (whole numbers from -127 to 127, scaled by each row's
            largest entry) or "binary" (signs). Prefixes and norms are taken of the quantised rows; the gradient goes
            through to the embeddings as if they were not quantised (`quantize.straight_through` is the definition).
        variant: "chunked" (GEMMs of the library and an elementwise kernel) or "fused" (scores never leave the kernel that
            computes them; CUDA); default: by the roofline in docs/info-nce.md.
        check_values: check the values of embeddings and targets; default: always on the CPU, on CUDA with L2V_CHECK=1.
            Unchecked, a row with NaN or Inf or without a valid target gives NaN, and there is no host sync.

    Returns:
        The loss, fp32 (fp64 for fp64), without dimensions or as `reduction` says. Differentiable once in queries,
        candidates, all queries, scale and weights.

    Raises:
        ValueError: shapes, dtypes or settings are outside the above; where values are checked also rows with NaN or Inf and
            targets out of range. The message names what is wrong and where.
        NotImplementedError: variant="fused" does not run on this device or dtype.

    Source: van den Oord et al. 2018 (InfoNCE, arXiv 1807.03748).
    """
    if quantize not in (None, *QUANTIZE):
        raise ValueError(f'quantize is "int8", "binary" or None, got {quantize!r}')
    if variant not in (None, "chunked", "fused"):
        raise ValueError(f'variant is "chunked", "fused" or None, got {variant!r}')
    tensors = checks.check_tensors(queries_NE, candidates_ME, targets_N, all_queries_QE)
    E = queries_NE.shape[1]
    joint = checks.check_directions(directions, partition)
    settings = Settings(
        directions=tuple(d for d in DIRECTIONS if d in directions),
        joint=joint,
        margin=None if false_negative_margin is None else float(false_negative_margin),
        prefixes=checks.check_prefixes(prefixes, E),
        offset=query_offset,
        workspace=workspace,
        variant=variant,
        quantize=quantize,
    )
    labels = checks.check_labels(
        tensors, targets_N, candidate_ids, query_ids, all_query_ids, owners_M, restricted_M, settings
    )
    checks.check_numbers(scale, workspace, false_negative_margin)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "mean", "sum" or "none", got {reduction!r}')
    if len(queries_NE) == 0 and reduction == "mean":
        raise ValueError(
            'the mean over no queries is undefined (N = 0); a rank that may hold none takes reduction="sum"'
        )
    if len(candidates_ME) < 2 and len(queries_NE):
        raise ValueError(
            f"{len(candidates_ME)} candidate leaves no negatives: its probability is 1 whatever the vectors are; give two or more"
        )
    if check_values is None:
        check_values = not queries_NE.is_cuda or os.environ.get("L2V_CHECK") == "1"
    if check_values:
        checks.check_values(tensors, labels, settings)
    inputs = (queries_NE, candidates_ME, all_queries_QE, scale)
    if reduction == "none":
        losses_PN = InfoNce.apply(*inputs, None, labels, settings)
        return losses_PN if prefixes is not None else losses_PN[0]
    checks.check_weights(prefix_weights, weights_N, len(settings.prefixes), len(queries_NE))
    if weights_N is not None and weights_N.requires_grad:
        return _reduce(InfoNce.apply(*inputs, None, labels, settings), prefix_weights, weights_N, reduction)
    return InfoNce.apply(
        *inputs, _weights(queries_NE, prefix_weights, weights_N, reduction, settings), labels, settings
    )


def _weights(queries_NE, prefix_weights, weights_N, reduction, settings):
    """[P, N]: the weight of each loss in the sum. Multiplied on the device: copying them there would cost a sync."""
    P, N = len(settings.prefixes), len(queries_NE)
    weights_PN = queries_NE.new_ones((P, N), dtype=sum_dtype(queries_NE))
    if weights_N is not None:
        weights_PN *= weights_N / weights_N.sum() if reduction == "mean" else weights_N
    for row_N, weight in zip(weights_PN, prefix_weights or [1.0] * P, strict=True):
        factor = float(weight) / (N if reduction == "mean" and weights_N is None else 1)
        if factor != 1:
            row_N *= factor
    return weights_PN


def _reduce(losses_PN, prefix_weights, weights_N, reduction):
    """The weighted sum or mean of the losses, with a graph to weights_N."""
    weights = prefix_weights or [1.0] * len(losses_PN)
    losses_N = sum(float(w) * row_N for w, row_N in zip(weights, losses_PN.unbind(), strict=True))
    total = (weights_N * losses_N).sum()
    return total / weights_N.sum() if reduction == "mean" else total
