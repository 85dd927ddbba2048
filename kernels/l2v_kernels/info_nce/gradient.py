"""Gradients of InfoNCE, a tile of scores at a time.

With unit vectors u = q / |q|, v = c / |c|, score s = scale * u.v and e = dL/ds (softmax minus 1 at the pair, times the
incoming gradient), dL/dq = sum_j e_j * scale / |q| * (v_j - (u.v_j) u). The first part is a matmul of coefficients
h = e * scale / (|q| |c|) with the candidates as they are: nothing is normalised in memory. The second is q times
-(sum_j h_j q.c_j) / |q|^2, which needs one sum a row. The same holds for the candidates, with sums over columns.

Matryoshka: each prefix has its own norms, scores and e. Dot products of the slices of E between prefixes add up to those of
each prefix; backward, slice s is multiplied by the sum of the coefficients of all prefixes that contain it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from l2v_kernels.info_nce.engine import Pass, Statistics
from l2v_kernels.info_nce.paths import Path
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Block, Side, spans, sum_dtype
from l2v_kernels.matmul import add_matmul


class Wanted(NamedTuple):
    """Whose gradients are wanted."""

    queries: bool
    candidates: bool
    everyone: bool
    scale: bool


class Gradient:
    """The unfinished gradient of one side's embeddings: a sum of matmuls, and the moments of what lies along each row."""

    def __init__(self, side: Side, settings: Settings, *, zero: bool, rows: int | None = None) -> None:
        self.side, self.settings, self.fresh = side, settings, not zero
        x_nE = side.x_nE
        make = torch.zeros if zero else torch.empty
        n = len(x_nE) if rows is None else rows
        self.sum_nE = make(n, settings.prefixes[-1], dtype=sum_dtype(x_nE), device=x_nE.device)
        self.moments_Pn = torch.zeros_like(side.inverse_Pn)

    def finish(self, path: Path, unscale: torch.Tensor | None) -> torch.Tensor:
        """The gradient [n, E] in the embeddings' dtype."""
        x_nE = self.side.x_nE
        same = self.sum_nE.dtype == x_nE.dtype and self.sum_nE.shape == x_nE.shape
        out_nE = self.sum_nE if same else torch.empty_like(x_nE)
        # Of quantised rows the codes are computed again, so not of all rows at once.
        rows = len(x_nE) if self.side.codes is None else self.settings.code_rows(x_nE)
        for at in spans(len(x_nE), rows):
            self.finish_rows(path, at, self.sum_nE[at], out_nE, unscale)
        return out_nE

    def finish_rows(self, path: Path, at: slice, sum_rE, out_nE, unscale) -> None:
        """Writes the rows `at` of out: sum * unscale - x * (what lies along x); by 1 / step where x are codes."""
        factor_r = None if self.side.inverse_step_n is None else self.side.inverse_step_n[at]
        inverse_Pr, moments_Pr = self.side.inverse_Pn[:, at], self.moments_Pn[:, at]
        # Slice s lies in prefixes s and above.
        along_Pr = (inverse_Pr.square() * moments_Pr).flip(0).cumsum(0).flip(0)
        along_Pr = along_Pr if unscale is None else along_Pr * unscale
        path.ops.finish(sum_rE, self.side.compared(at), along_Pr, unscale, out_nE[at], self.settings, factor_r)


@dataclass
class _RowSums:
    """The gradient of the rows at hand in one role: as queries, or as the positives that are the rows of doc_to_..."""

    sum_rE: torch.Tensor
    moments_Pr: torch.Tensor
    fresh: bool
    """Whether the sum is still uninitialised, so that the first matmul overwrites it."""


class _Backward:
    """The gradients of one call: `add_rows` for all rows, then `finish`."""

    def __init__(self, run: Pass, grad_PN: torch.Tensor, wanted: Wanted, *, one_pass: bool) -> None:
        self.run, self.wanted, self.one_pass = run, wanted, one_pass
        settings, dtype, whole = run.settings, run.queries.inverse_Pn.dtype, run.kept is not None
        self.apart = run.everyone is not run.queries
        self.both = run.columns_have_rows
        self.sides = [run.tile_sides(b, whole) for b in run.blocks]
        self.height = min(rows for rows, _ in self.sides)
        if one_pass:
            self.height = run.one_pass_rows()
            self.sides = [(self.height, len(b.columns.x_nE)) for b in run.blocks]

        self.queries = Gradient(run.queries, settings, zero=self.both, rows=None if self.both else self.height)
        # Without rows nothing would be written; with several blocks another one may have been first.
        zero = len(run.blocks) > 1 or run.n_rows == 0
        self.candidates = Gradient(run.candidates, settings, zero=zero, rows=None if wanted.candidates else 0)
        self.everyone = self.queries
        if self.apart:
            self.everyone = Gradient(run.everyone, settings, zero=True, rows=None if wanted.everyone else 0)
        docs = any(b.of_docs for b in run.blocks)
        self.docs_rE = torch.empty_like(self.queries.sum_nE[: self.height]) if docs else None
        self.out_queries = torch.empty_like(run.queries.x_nE) if wanted.queries and not self.both else None

        assert run.lse_ZPN is not None
        self.lse_ZPN, n_statistics = run.lse_ZPN, len(run.lse_ZPN)
        self.grad_PN = grad_PN.to(dtype) / n_statistics if n_statistics > 1 else grad_PN.to(dtype)
        gain, self.unscale = _gain(run, self.grad_PN)
        self.row_scales = [run.row_scale(b) for b in run.blocks]
        self.row_outs = [self.grad_PN * x if gain is None else self.grad_PN * x * gain for x in self.row_scales]
        self.coefficients = run.buffer(self.sides, run.queries.x_nE.dtype)
        self.planes: list[torch.Tensor] = []
        if run.path.plane_bytes and not whole:
            if one_pass:  # it holds the dot products of all blocks at once
                self.planes = [run.buffer([side], dtype) for side in self.sides]
            else:
                self.planes = [run.buffer(self.sides, dtype)] * len(self.sides)

    def add_rows(self, at: slice, statistics: Statistics | None) -> None:
        """Adds the part of the rows `at` of every block; with `statistics` after those of these rows."""
        n, docs_rE = at.stop - at.start, self.docs_rE
        queries_rE = self.queries.sum_nE[at] if self.both else self.queries.sum_nE[:n]
        as_queries = _RowSums(queries_rE, self.queries.moments_Pn[:, at], fresh=not self.both)
        as_docs = as_queries
        if docs_rE is not None:
            as_docs = _RowSums(docs_rE[:n], torch.zeros_like(self.grad_PN[:, at]), fresh=True)
        if statistics is not None:
            self._fold(at, statistics)
        for i, block in enumerate(self.run.blocks):
            self._add_block(i, block, at, as_docs if block.of_docs else as_queries)
        if self.out_queries is not None:
            self.queries.finish_rows(self.run.path, at, queries_rE, self.out_queries, self.unscale)
        if docs_rE is not None:
            doc_rows_r = (self.run.doc_rows_N[at],)
            if self.wanted.candidates:
                # Sorted by torch, not by atomics: the same bits every time, also where queries share a positive.
                self.candidates.sum_nE.index_put_(doc_rows_r, as_docs.sum_rE, accumulate=True)
            self.candidates.moments_Pn.t().index_put_(doc_rows_r, as_docs.moments_Pr.t(), accumulate=True)

    def _fold(self, at: slice, statistics: Statistics) -> None:
        """Dot products and statistics of the rows `at` with all columns, which one pass has to know first."""
        run = self.run
        for block, row_scale_PN, buffer in zip(run.blocks, self.row_scales, self.planes, strict=True):
            (part,) = run.tiles(block, row_scale_PN, at, len(block.columns.x_nE))
            x_rE = run.rows(block, at)
            statistics.fold(run, part, x_rE, run.dots(part, x_rE, run.cut(buffer, part)))
        self.lse_ZPN[..., at] = statistics.lse(at)

    def _add_block(self, i: int, block: Block, at: slice, rows: _RowSums) -> None:
        """Adds the part of the rows `at` of block i, tile by tile, to the gradients of its rows and columns."""
        run, wanted = self.run, self.wanted
        x_rE = run.rows(block, at)
        target = self.candidates if block.to_docs else self.everyone
        want_rows = wanted.candidates if block.of_docs else wanted.queries or (self.both and wanted.everyone)
        want_everyone = wanted.everyone if self.apart else wanted.queries
        want_columns = wanted.candidates if block.to_docs else want_everyone
        for part in run.tiles(block, self.row_scales[i], at, self.sides[i][1]):
            planes_Prc = None
            if run.kept is not None:
                planes_Prc = run.kept[i]
            elif self.planes:
                planes_Prc = run.cut(self.planes[i], part)
                if not self.one_pass:
                    run.dots(part, x_rE, planes_Prc)
            out_Prc = run.cut(self.coefficients, part)
            run.path.coefficients(
                part,
                x_rE,
                planes_Prc,
                self.lse_ZPN[block.statistic, :, at],
                self.row_outs[i][:, at],
                out_Prc,
                rows.moments_Pr,
                target.moments_Pn[:, part.columns],
                settings=run.settings,
            )
            y_cE = block.columns.compared(part.columns)
            first_row = at.start == 0 and target.fresh
            for s, (begin, end) in enumerate(run.settings.prefix_slices):
                if want_rows:
                    add_matmul(rows.sum_rE[:, begin:end], out_Prc[s], y_cE[:, begin:end], overwrite=rows.fresh)
                if want_columns:
                    sums_cE = target.sum_nE[part.columns, begin:end]
                    add_matmul(sums_cE, out_Prc[s].T, x_rE[:, begin:end], overwrite=first_row)
            rows.fresh = False

    def finish(self) -> tuple[torch.Tensor | None, ...]:
        """Of queries, candidates, all queries and scale."""
        path, wanted, unscale = self.run.path, self.wanted, self.unscale
        of_scale = None
        if wanted.scale:
            distinct = {id(g): g for g in (self.queries, self.candidates, self.everyone)}.values()
            # Every coefficient * dot = e * score was added to one row and to one column.
            of_scale = torch.as_tensor(sum(g.moments_Pn.sum() for g in distinct)) / (2 * self.run.scale)
            of_scale = of_scale if unscale is None else of_scale * unscale
        out_queries = self.queries.finish(path, unscale) if self.both and wanted.queries else self.out_queries
        out_candidates = self.candidates.finish(path, unscale) if wanted.candidates else None
        out_everyone = self.everyone.finish(path, unscale) if self.apart and wanted.everyone else None
        return out_queries, out_candidates, out_everyone, of_scale


def losses_and_gradients(
    run: Pass, weights_PN: torch.Tensor, wanted: Wanted
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Losses [P, N] and the gradients of sum(weights * losses), in one pass over the scores, `one_pass_rows` at a time."""
    statistics = Statistics.of(run)
    run.lse_ZPN = torch.empty_like(statistics.m_ZPN)
    found = gradients(run, weights_PN, wanted, statistics)
    return statistics.losses(run.lse_ZPN), found


def gradients(
    run: Pass, grad_PN: torch.Tensor, wanted: Wanted, statistics: Statistics | None = None
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of queries, candidates, all queries and scale, given that of the losses [P, N].

    None where not wanted; all queries have none of their own where they are the queries.

    Args:
        statistics: computed on the way, into run.lse_ZPN; None where run.lse_ZPN is complete.
    """
    backward = _Backward(run, grad_PN, wanted, one_pass=statistics is not None)
    for at in spans(run.n_rows, backward.height):
        backward.add_rows(at, statistics)
    return backward.finish()


def _gain(run: Pass, grad_PN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A factor that brings coefficients into fp16's range, and its inverse; (None, None) for bf16 and fp32, which need none.

    |softmax - 1| is at most 1 and 1 / norm at most the largest of the call, so coefficients are at most 2048, of which up to
    16 prefixes are added up. Computed on the device, without a sync.
    """
    if run.queries.x_nE.dtype != torch.float16 or grad_PN.numel() == 0:
        return None, None
    tiny = torch.finfo(torch.float32).tiny
    inverse = torch.stack([s.inverse_Pn.max() for s in (run.queries, run.candidates, run.everyone)]).max()
    unscale = (grad_PN.abs().max() * run.scale * inverse.square() / 2048).clamp_min(tiny)
    return 1 / unscale, unscale
