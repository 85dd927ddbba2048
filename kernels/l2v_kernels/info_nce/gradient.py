"""Gradients of InfoNCE, a tile of scores at a time.

The gradient. With unit vectors u = q / |q|, v = c / |c|, score s = scale * u.v and e = dL/ds (softmax minus 1 at the pair,
times the incoming gradient), dL/dq = sum_j e_j * scale / |q| * (v_j - (u.v_j) u). Its first part is a product of a matrix
of coefficients h = e * scale / (|q| |c|) with the candidates as they are: nothing is normalised in memory. The second is
q times -(sum_j h_j q.c_j) / |q|^2, which needs one sum a row. The same holds for the candidates, with sums over columns.

Matryoshka. Prefix p has norms, scores and e of its own. Products of the segments between prefixes are summed up to the
scores of each prefix; backward, segment s is multiplied by the coefficients of all prefixes that contain it, added up.
"""

import torch

from l2v_kernels.info_nce.engine import Pass, Statistics
from l2v_kernels.info_nce.paths import Path
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Side, spans, sum_dtype
from l2v_kernels.matmul import add_matmul


class Gradient:
    """The gradient of one side's embeddings in the making: a sum of products, and what a row loses along itself."""

    def __init__(self, side: Side, settings: Settings, *, zero: bool, rows: int | None = None) -> None:
        self.side, self.settings, self.fresh = side, settings, not zero
        x_nE = side.x_nE
        make = torch.zeros if zero else torch.empty
        n = len(x_nE) if rows is None else rows
        self.sum_nE = make(n, settings.prefixes[-1], dtype=sum_dtype(x_nE), device=x_nE.device)
        self.moments_Pn = torch.zeros_like(side.inverse_Pn)

    def finish(self, path: Path, unscale: torch.Tensor | None) -> torch.Tensor:
        """[n, E] in the embeddings' dtype."""
        x_nE = self.side.x_nE
        same = self.sum_nE.dtype == x_nE.dtype and self.sum_nE.shape == x_nE.shape
        out_nE = self.sum_nE if same else torch.empty_like(x_nE)
        self.finish_rows(path, slice(0, len(x_nE)), self.sum_nE, out_nE, unscale)
        return out_nE

    def finish_rows(self, path: Path, at: slice, sum_RE, out_nE, unscale) -> None:
        """Write the rows `at` of out: sum * unscale - x * (what lies along x)."""
        inverse_PR, moments_PR = self.side.inverse_Pn[:, at], self.moments_Pn[:, at]
        # Segment s lies in prefixes s and above.
        along_PR = (inverse_PR.square() * moments_PR).flip(0).cumsum(0).flip(0)
        along_PR = along_PR if unscale is None else along_PR * unscale
        path.ops.finish(sum_RE, self.side.x_nE[at], along_PR, unscale, out_nE[at], self.settings)


def losses_and_gradients(
    run: Pass, weights_PN: torch.Tensor, wanted: tuple[bool, bool, bool, bool]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Losses [P, N] and the gradients of sum(weights * losses), with one look at the scores, `one_pass_rows` at a time."""
    statistics = Statistics.of(run)
    run.lse_SPN = torch.empty_like(statistics.m_SPN)
    found = gradients(run, weights_PN, wanted, statistics)
    return statistics.losses(run.lse_SPN), found


def gradients(
    run: Pass,
    grad_PN: torch.Tensor,
    wanted: tuple[bool, bool, bool, bool],
    statistics: Statistics | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Of queries, candidates, all queries and scale, None where not wanted (or all queries are the queries), given that of
    the losses [P, N]. statistics: made on the way, into run.lse_SPN; else that stands already."""
    settings, path, N = run.settings, run.path, run.n_rows
    want_queries, want_candidates, want_everyone = wanted[:3]
    apart = run.everyone is not run.queries
    both = run.columns_have_rows
    several = len(run.blocks) > 1
    dtype = run.queries.inverse_Pn.dtype
    whole, one_pass = run.kept is not None, statistics is not None
    sides = [run.tile_sides(b, whole) for b in run.blocks]
    height = min(rows for rows, _ in sides)
    if one_pass:
        height = run.one_pass_rows()
        sides = [(height, len(b.columns.x_nE)) for b in run.blocks]
    docs = any(b.of_docs for b in run.blocks)

    of_queries = Gradient(run.queries, settings, zero=both, rows=None if both else height)
    # Without rows nothing would be written; with several blocks another one may have been first.
    zero = several or N == 0
    of_candidates = Gradient(run.candidates, settings, zero=zero, rows=None if want_candidates else 0)
    of_everyone = (
        Gradient(run.everyone, settings, zero=True, rows=None if want_everyone else 0) if apart else of_queries
    )
    of_docs = torch.empty_like(of_queries.sum_nE[:height]) if docs else None
    out_queries = torch.empty_like(run.queries.x_nE) if want_queries and not both else None

    n_statistics = len(run.lse_SPN)
    grad_PN = grad_PN.to(dtype) / n_statistics if n_statistics > 1 else grad_PN.to(dtype)
    gain, unscale = _gain(run, grad_PN)
    row_scales = [run.row_scale(b) for b in run.blocks]
    row_outs = [grad_PN * x if gain is None else grad_PN * x * gain for x in row_scales]
    coefficients = run.buffer(sides, run.queries.x_nE.dtype)
    planes = []
    if path.plane_bytes and not whole:
        # One pass holds the dot products of all blocks at once.
        planes = [run.buffer([side], dtype) for side in sides] if one_pass else [run.buffer(sides, dtype)] * len(sides)
    for at in spans(N, height):
        left = {False: of_queries.sum_nE[at] if both else of_queries.sum_nE[: at.stop - at.start]}
        fresh = {False: not both, True: True}
        doc_moments_PR = None
        if docs:
            left[True] = of_docs[: at.stop - at.start]
            doc_moments_PR = torch.zeros_like(grad_PN[:, at])
        if one_pass:
            for block, row_scale_PN, buffer in zip(run.blocks, row_scales, planes, strict=True):
                (part,) = run.tiles(block, row_scale_PN, at, len(block.columns.x_nE))
                x_RE = run.rows(block, at)
                statistics.fold(run, part, x_RE, run.dots(part, x_RE, run.cut(buffer, part)))
            run.lse_SPN[..., at] = statistics.lse(at)
        for i, (block, (_, width)) in enumerate(zip(run.blocks, sides, strict=True)):
            x_RE, row_scale_PN, row_out_PN = run.rows(block, at), row_scales[i], row_outs[i]
            target = of_candidates if block.to_docs else of_everyone
            want_rows = want_candidates if block.of_docs else want_queries or (both and want_everyone)
            want_columns = want_candidates if block.to_docs else (want_everyone if apart else want_queries)
            for part in run.tiles(block, row_scale_PN, at, width):
                planes_PRC = run.kept[i] if whole else run.cut(planes[i], part) if planes else None
                if planes and not one_pass:
                    run.dots(part, x_RE, planes_PRC)
                out_PRC = run.cut(coefficients, part)
                path.coefficients(
                    part,
                    x_RE,
                    planes_PRC,
                    run.lse_SPN[block.statistic, :, at],
                    row_out_PN[:, at],
                    out_PRC,
                    doc_moments_PR if block.of_docs else of_queries.moments_Pn[:, at],
                    target.moments_Pn[:, part.columns],
                    settings=settings,
                )
                y_CE = block.columns.x_nE[part.columns]
                first_row = at.start == 0 and target.fresh
                for s, (begin, end) in enumerate(settings.segments):
                    if want_rows:
                        add_matmul(
                            left[block.of_docs][:, begin:end],
                            out_PRC[s],
                            y_CE[:, begin:end],
                            overwrite=fresh[block.of_docs],
                        )
                    if want_columns:
                        sums_CE = target.sum_nE[part.columns, begin:end]
                        add_matmul(sums_CE, out_PRC[s].T, x_RE[:, begin:end], overwrite=first_row)
                fresh[block.of_docs] = False
        if out_queries is not None:
            of_queries.finish_rows(path, at, left[False], out_queries, unscale)
        if docs and want_candidates:
            # Sorted by torch, not by atomics: the same bits every time, also where queries share a positive.
            rows_R = (run.doc_rows_N[at],)
            of_candidates.sum_nE.index_put_(rows_R, left[True], accumulate=True)
        if docs:
            of_candidates.moments_Pn.t().index_put_((run.doc_rows_N[at],), doc_moments_PR.t(), accumulate=True)
    of_scale = None
    if wanted[3]:
        everything = {id(g): g for g in (of_queries, of_candidates, of_everyone)}.values()
        # Every coefficient * dot = e * score was added to one row and to one column.
        of_scale = sum(g.moments_Pn.sum() for g in everything) / (2 * run.scale)
        of_scale = of_scale if unscale is None else of_scale * unscale
    if both and want_queries:
        out_queries = of_queries.finish(path, unscale)
    out_candidates = of_candidates.finish(path, unscale) if want_candidates else None
    out_everyone = of_everyone.finish(path, unscale) if apart and want_everyone else None
    return out_queries, out_candidates, out_everyone, of_scale


def _gain(run: Pass, grad_PN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A factor that brings coefficients into fp16's range, and its inverse.

    |softmax - 1| is at most 1 and 1 / norm at most the largest of the call: coefficients come out at 2048 or below, and up
    to 16 prefixes are added up. Computed on the device; bf16 and fp32 have the range and skip it.
    """
    if run.queries.x_nE.dtype != torch.float16 or grad_PN.numel() == 0:
        return None, None
    tiny = torch.finfo(torch.float32).tiny
    inverse = torch.stack([s.inverse_Pn.max() for s in (run.queries, run.candidates, run.everyone)]).max()
    unscale = (grad_PN.abs().max() * run.scale * inverse.square() / 2048).clamp_min(tiny)
    return 1 / unscale, unscale
