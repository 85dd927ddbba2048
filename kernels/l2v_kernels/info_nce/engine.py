"""InfoNCE a tile of scores at a time: losses forward, gradients backward, in memory linear in N + M.

The gradient. With unit vectors u = q / |q|, v = c / |c|, score s = scale * u.v and e = dL/ds (softmax minus 1 at the pair,
times the incoming gradient), dL/dq = sum_j e_j * scale / |q| * (v_j - (u.v_j) u). Its first part is a product of a matrix
of coefficients h = e * scale / (|q| |c|) with the candidates as they are: nothing is normalised in memory. The second is
q times -(sum_j h_j q.c_j) / |q|^2, which needs one sum a row. The same holds for the candidates, with sums over columns.

Matryoshka. Prefix p has norms, scores and e of its own. Products of the segments between prefixes are summed up to the
scores of each prefix; backward, segment s is multiplied by the coefficients of all prefixes that contain it, added up.
"""

from dataclasses import dataclass

import torch

from l2v_kernels.info_nce.paths import Path, choose
from l2v_kernels.info_nce.products import add_product
from l2v_kernels.info_nce.settings import Labels, Settings
from l2v_kernels.info_nce.tiles import Block, Side, Tile, blocks, spans, sum_dtype, tile, tile_shape


@dataclass
class Pass:
    """What the forward leaves for the backward, apart from the embeddings themselves."""

    queries: Side
    candidates: Side
    everyone: Side
    """The queries of all ranks; the same object as `queries` where those are all."""
    labels: Labels
    settings: Settings
    scale: float | torch.Tensor
    path: Path
    blocks: list[Block]
    doc_rows_N: torch.Tensor
    """Targets, clamped into range: whose embeddings are the rows of doc_to_..."""
    limit_PN: torch.Tensor | None = None
    lse_SPN: torch.Tensor | None = None
    kept: list[torch.Tensor] | None = None
    """Dot products of every block where all of them fit the workspace, [P, N, columns] each."""

    @classmethod
    def start(cls, queries_NE, candidates_ME, all_queries_QE, labels: Labels, scale, settings: Settings) -> "Pass":
        with_queries = any(d.endswith("to_query") for d in settings.directions)
        shared = all_queries_QE is None or not with_queries
        n_columns = {"doc": len(candidates_ME), "query": len(queries_NE if shared else all_queries_QE)}
        n_scores = len(queries_NE) * sum(n_columns[d.rpartition("_")[2]] for d in settings.directions)
        path = choose(queries_NE, n_scores, settings)

        def measured(x_nE: torch.Tensor) -> Side:
            # Kernels read rows from left to right: another layout is copied.
            x_nE = x_nE if x_nE.stride(1) == 1 else x_nE.contiguous()
            return Side.of(x_nE, path.inverse_norms(x_nE, settings))

        queries, candidates = measured(queries_NE), measured(candidates_ME)
        everyone = queries if shared else measured(all_queries_QE)
        found = blocks(candidates, everyone, labels, settings)
        rows_N = labels.targets_N.clamp(0, max(0, len(candidates_ME) - 1))
        return cls(queries, candidates, everyone, labels, settings, scale, path, found, rows_N)

    @property
    def n_rows(self) -> int:
        return len(self.queries.x_nE)

    @property
    def columns_have_rows(self) -> bool:
        """Whether the queries are columns too, so that their gradient comes from both."""
        return self.everyone is self.queries and any(not b.to_docs for b in self.blocks)

    def rows(self, block: Block, at: slice) -> torch.Tensor:
        """[R, E]: the embeddings of a block's rows."""
        return self.candidates.x_nE[self.doc_rows_N[at]] if block.of_docs else self.queries.x_nE[at]

    def row_scale(self, block: Block) -> torch.Tensor:
        """[P, N]: scale / norm of a block's rows."""
        exact_PN = self.candidates.exact_Pn[:, self.doc_rows_N] if block.of_docs else self.queries.exact_Pn
        return (exact_PN * self.scale).to(self.queries.inverse_Pn.dtype)

    def fits(self) -> bool:
        """Whether the dot products of all blocks, and the coefficients of one, fit the workspace."""
        sizes = [self.n_rows * len(b.columns.x_nE) for b in self.blocks]
        P, plane, out = len(self.settings.prefixes), self.path.plane_bytes, self.queries.x_nE.element_size()
        most = P * (plane * sum(sizes) + out * max(sizes)) + self.path.scratch_bytes * max(sizes)
        return bool(plane) and most <= min(self.settings.workspace, self.path.most_bytes)

    def tile_sides(self, block: Block, whole: bool) -> tuple[int, int]:
        """(rows, columns) of this block's tiles."""
        columns = len(block.columns.x_nE)
        if whole:
            return self.n_rows, columns
        P, x = len(self.settings.prefixes), self.queries.x_nE
        # A quarter of the workspace is for the gradient of a tile's rows, in the dtype of sums.
        most_rows = max(1, self.settings.workspace // 4 // (x.shape[1] * sum_dtype(x).itemsize))
        bytes_a_score = P * (self.path.plane_bytes + x.element_size()) + self.path.scratch_bytes
        budget = min(self.settings.workspace * 3 // 4, self.path.most_bytes)
        return tile_shape(min(self.n_rows, most_rows), columns, max(1, budget // bytes_a_score))

    def tiles(self, block: Block, row_scale_PN: torch.Tensor, at: slice, width: int) -> list[Tile]:
        """The tiles of a block for these rows, from left to right."""
        arguments = (row_scale_PN, self.limit_PN, self.labels, self.settings)
        return [tile(block, at, columns, *arguments) for columns in spans(len(block.columns.x_nE), width)]

    def buffer(self, dtype: torch.dtype, whole: bool) -> torch.Tensor:
        """Room for P planes of the largest tile."""
        sides = [self.tile_sides(b, whole) for b in self.blocks]
        size = len(self.settings.prefixes) * max(r * c for r, c in sides)
        return torch.empty(size, dtype=dtype, device=self.queries.x_nE.device)

    def cut(self, buffer: torch.Tensor, of: Tile) -> torch.Tensor:
        """[P, R, C] at the start of a buffer."""
        P, (R, C) = len(self.settings.prefixes), of.shape
        return buffer[: P * R * C].view(P, R, C)

    def dots(self, of: Tile, x_RE: torch.Tensor, out_PRC: torch.Tensor) -> torch.Tensor:
        """The planes of a tile."""
        y_CE = of.block.columns.x_nE[of.columns]
        self.path.dots(x_RE, y_CE, out_PRC, self.settings)
        return out_PRC


def losses(run: Pass, keep: bool) -> torch.Tensor:
    """[P, N]; fills in what `gradients` needs. keep: hold on to the dot products where they fit."""
    queries, settings = run.queries, run.settings
    P, N, dtype = len(settings.prefixes), run.n_rows, queries.inverse_Pn.dtype
    n_statistics = 1 + max(b.statistic for b in run.blocks)
    if settings.margin is not None:
        run.limit_PN = _pairs(run) + settings.margin * run.scale
    new = {"dtype": dtype, "device": queries.x_nE.device}
    m_SPN = torch.full((n_statistics, P, N), -torch.inf, **new)
    l_SPN = torch.zeros(n_statistics, P, N, **new)
    # A row whose target is no candidate keeps its NaN.
    pair_PN = torch.full((P, N), torch.nan, **new)
    whole = run.fits()
    run.kept = [] if keep and whole else None
    buffer = run.buffer(dtype, whole) if run.path.plane_bytes and run.kept is None else None
    for block in run.blocks:
        rows, width = run.tile_sides(block, whole)
        row_scale_PN = run.row_scale(block)
        for at in spans(N, rows):
            x_RE = run.rows(block, at)
            for part in run.tiles(block, row_scale_PN, at, width):
                planes_PRC = None
                if run.path.plane_bytes:
                    planes_PRC = torch.empty(P, *part.shape, **new) if buffer is None else run.cut(buffer, part)
                    run.dots(part, x_RE, planes_PRC)
                    if run.kept is not None:
                        run.kept.append(planes_PRC)
                pair = pair_PN[:, at] if block.direction == "query_to_doc" else None
                s = block.statistic
                run.path.statistics(part, x_RE, planes_PRC, m_SPN[s, :, at], l_SPN[s, :, at], pair, settings)
    run.lse_SPN = m_SPN + l_SPN.log()
    return (run.lse_SPN.mean(0) if n_statistics > 1 else run.lse_SPN[0]) - pair_PN


def _pairs(run: Pass) -> torch.Tensor:
    """[P, N]: the score of each pair, before the tiles come to it: the margin is measured from there."""
    queries, settings = run.queries, run.settings
    dots_PN = torch.empty_like(queries.inverse_Pn)
    for at in spans(run.n_rows, 2048):
        x_RE, y_RE = queries.x_nE[at], run.candidates.x_nE[run.doc_rows_N[at]]
        for p, (begin, end) in enumerate(settings.segments):
            dots_PN[p, at] = (x_RE[:, begin:end].to(dots_PN.dtype) * y_RE[:, begin:end]).sum(1)
    return dots_PN.cumsum(0) * queries.inverse_Pn * run.candidates.inverse_Pn[:, run.doc_rows_N] * run.scale


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
        path.finish(sum_RE, self.side.x_nE[at], along_PR, unscale, out_nE[at], self.settings)


def gradients(
    run: Pass, grad_PN: torch.Tensor, wanted: tuple[bool, bool, bool, bool]
) -> tuple[torch.Tensor | None, ...]:
    """Of queries, candidates, all queries and scale, None where not wanted (or all queries are the queries), given that of
    the losses [P, N]."""
    settings, path, N = run.settings, run.path, run.n_rows
    want_queries, want_candidates, want_everyone = wanted[:3]
    apart = run.everyone is not run.queries
    both = run.columns_have_rows
    several = len(run.blocks) > 1
    dtype = run.queries.inverse_Pn.dtype
    whole = run.kept is not None
    sides = [run.tile_sides(b, whole) for b in run.blocks]
    height = min(rows for rows, _ in sides)
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
    coefficients = run.buffer(run.queries.x_nE.dtype, whole)
    planes = run.buffer(dtype, whole) if path.plane_bytes and not whole else None
    for at in spans(N, height):
        left = {False: of_queries.sum_nE[at] if both else of_queries.sum_nE[: at.stop - at.start]}
        fresh = {False: not both, True: True}
        doc_moments_PR = None
        if docs:
            left[True] = of_docs[: at.stop - at.start]
            doc_moments_PR = torch.zeros_like(grad_PN[:, at])
        for i, (block, (_, width)) in enumerate(zip(run.blocks, sides, strict=True)):
            x_RE, row_scale_PN, row_out_PN = run.rows(block, at), row_scales[i], row_outs[i]
            target = of_candidates if block.to_docs else of_everyone
            want_rows = want_candidates if block.of_docs else want_queries or (both and want_everyone)
            want_columns = want_candidates if block.to_docs else (want_everyone if apart else want_queries)
            for part in run.tiles(block, row_scale_PN, at, width):
                planes_PRC = run.kept[i] if whole else None
                if planes is not None:
                    planes_PRC = run.dots(part, x_RE, run.cut(planes, part))
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
                        add_product(
                            left[block.of_docs][:, begin:end], out_PRC[s], y_CE[:, begin:end], fresh[block.of_docs]
                        )
                    if want_columns:
                        sums_CE = target.sum_nE[part.columns, begin:end]
                        add_product(sums_CE, out_PRC[s].T, x_RE[:, begin:end], first_row)
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
