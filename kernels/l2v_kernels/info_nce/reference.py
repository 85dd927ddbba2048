"""InfoNCE in plain PyTorch, with the whole score matrix: the definition of the op, in the dtype of its inputs."""

import torch

from l2v_kernels.info_nce.quantize import straight_through
from l2v_kernels.info_nce.settings import Labels, Settings


def info_nce_reference(
    queries_NE: torch.Tensor,
    candidates_ME: torch.Tensor,
    all_queries_QE: torch.Tensor,
    labels: Labels,
    scale: float | torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """Losses [P, N] of every prefix and query. Arguments as in `l2v_kernels.info_nce`, which checks them.

    With s(x, y) = scale * cos(x, y), query i, its positive d_i, and Z_i the sum of exp(s) over the pairs of the chosen
    directions, the loss is log Z_i - s(q_i, d_i):

    | direction | terms of Z_i | excluded |
    |-|-|-|
    | query_to_doc | s(q_i, c) for every candidate c | |
    | query_to_query | s(q_i, q_j) | j = i |
    | doc_to_query | s(d_i, q_j) for every query q_j | |
    | doc_to_doc | s(d_i, c) for every candidate c | d_i and other candidates of query i |

    The pair (q_i, d_i) always counts, in query_to_doc and in doc_to_query (as in GTE). Other terms are excluded if they
    share an id with query i, are restricted to another query, or exceed the positive by more than the margin.

    `settings.quantize` replaces all embeddings by their quantised form first, with the straight-through gradient; norms,
    prefixes and the margin are of these.
    """
    queries_NE, candidates_ME, all_queries_QE = (
        straight_through(x, settings.quantize, settings.prefixes[-1])
        for x in (queries_NE, candidates_ME, all_queries_QE)
    )
    losses = []
    N, rows = len(queries_NE), torch.arange(len(queries_NE), device=queries_NE.device)
    numbers_N = rows + settings.offset
    for length in settings.prefixes:
        queries, candidates, everyone = (
            unit(x[:, :length]) for x in (queries_NE, candidates_ME, all_queries_QE)
        )  # [N, length], [M, length], [Q, length]
        positives = candidates[labels.targets_N]
        pair_N = (queries * positives).sum(-1)
        scores = []
        for direction in settings.directions:
            to_docs = direction.endswith("to_doc")
            left = queries if direction.startswith("query") else positives
            cosines = left @ (candidates if to_docs else everyone).T
            ids = labels.candidate_ids_MI if to_docs else labels.all_query_ids_QI
            hidden = torch.zeros_like(cosines, dtype=torch.bool)
            if ids is not None and labels.query_ids_NI is not None:
                same = labels.query_ids_NI[:, None] == ids[None]
                hidden |= (same & (ids >= 0)[None]).any(-1)
            if to_docs and labels.restricted_M is not None:
                hidden |= labels.restricted_M & (labels.owners_M != numbers_N[:, None])
            if settings.margin is not None:
                hidden |= cosines > pair_N[:, None] + settings.margin
            own = labels.targets_N if to_docs else numbers_N
            hidden[rows, own] = direction in ("query_to_query", "doc_to_doc")
            if direction == "doc_to_doc" and labels.owners_M is not None:
                hidden |= labels.owners_M == numbers_N[:, None]
            scores.append((scale * cosines).masked_fill(hidden, -torch.inf))
        if settings.joint:
            log_z = torch.cat(scores, 1).logsumexp(1)
        else:
            log_z = torch.as_tensor(sum(s.logsumexp(1) for s in scores)) / len(scores)
        losses.append(log_z - scale * pair_N)
    return torch.stack(losses) if N else queries_NE.new_zeros(len(losses), 0)


def unit(x_NE: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1; a zero vector stays zero and gets no gradient, so its cosine with anything is 0."""
    squared_N1 = x_NE.square().sum(-1, keepdim=True)
    nonzero_N1 = squared_N1 > 0
    return x_NE * torch.where(nonzero_N1, squared_N1.masked_fill(~nonzero_N1, 1).rsqrt(), 0)
