"""InfoNCE a tile of scores at a time, in memory linear in N + M: what a call works with, and its losses."""

from dataclasses import dataclass

import torch

from l2v_kernels.info_nce.paths import Path, choose
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
            return Side.of(x_nE, path.ops.inverse_norms(x_nE, settings))

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

    def one_pass_rows(self) -> int:
        """How many rows have room for their scores with all columns, so that losses and gradients need one look at them;
        0 where two looks are better.

        Few rows at a time save a product but read and write the candidates' gradient more often: below `least_rows` the
        saving is gone. In fp16 gradients need the loss scale, which comes with the backward.
        """
        columns = [len(b.columns.x_nE) for b in self.blocks]
        P, x = len(self.settings.prefixes), self.queries.x_nE
        if not self.path.plane_bytes or x.dtype == torch.float16 or self.n_rows == 0 or self.fits():
            return 0
        a_row = P * (self.path.plane_bytes * sum(columns) + x.element_size() * max(columns))
        a_row += self.path.scratch_bytes * max(columns)
        rows = min(self.n_rows, self.settings.workspace // 4 // (x.shape[1] * sum_dtype(x).itemsize))
        rows = min(rows, min(self.settings.workspace * 3 // 4, self.path.most_bytes) // a_row)
        return rows if rows >= min(self.n_rows, self.path.least_rows) else 0

    def tiles(self, block: Block, row_scale_PN: torch.Tensor, at: slice, width: int) -> list[Tile]:
        """The tiles of a block for these rows, from left to right."""
        arguments = (row_scale_PN, self.limit_PN, self.labels, self.settings)
        return [tile(block, at, columns, *arguments) for columns in spans(len(block.columns.x_nE), width)]

    def buffer(self, sides: list[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
        """Room for P planes of the largest of these tiles."""
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


@dataclass
class Statistics:
    """Running maximum m and sum l of exp(score - m) of each softmax [S, P, N], and each pair's score [P, N]."""

    m_SPN: torch.Tensor
    l_SPN: torch.Tensor
    pair_PN: torch.Tensor

    @classmethod
    def of(cls, run: Pass) -> "Statistics":
        """Before the first tile. With a margin the limits are set, which need the pairs' scores ahead of the tiles."""
        if run.settings.margin is not None:
            run.limit_PN = _pairs(run) + run.settings.margin * run.scale
        like_PN = run.queries.inverse_Pn
        shape = (1 + max(b.statistic for b in run.blocks), *like_PN.shape)
        # A row whose target is no candidate keeps its NaN.
        return cls(like_PN.new_full(shape, -torch.inf), like_PN.new_zeros(shape), torch.full_like(like_PN, torch.nan))

    def fold(self, run: Pass, part: Tile, x_RE: torch.Tensor, planes_PRC: torch.Tensor | None) -> None:
        """Carry them over a tile."""
        s, at = part.block.statistic, part.rows
        pair = self.pair_PN[:, at] if part.block.direction == "query_to_doc" else None
        m_PR, l_PR = self.m_SPN[s, :, at], self.l_SPN[s, :, at]
        run.path.statistics(part, x_RE, planes_PRC, m_PR, l_PR, pair, run.settings)

    def lse(self, at: slice) -> torch.Tensor:
        """[S, P, R]: log Z of some rows, all of whose tiles have been seen."""
        return self.m_SPN[..., at] + self.l_SPN[..., at].log()

    def losses(self, lse_SPN: torch.Tensor) -> torch.Tensor:
        """[P, N]."""
        return (lse_SPN[0] if len(lse_SPN) == 1 else lse_SPN.mean(0)) - self.pair_PN


def losses(run: Pass, keep: bool) -> torch.Tensor:
    """[P, N]; fills in what `gradients` needs. keep: hold on to the dot products where they fit."""
    dtype, device = run.queries.inverse_Pn.dtype, run.queries.x_nE.device
    statistics, whole = Statistics.of(run), run.fits()
    run.kept = [] if keep and whole else None
    sides = [run.tile_sides(b, whole) for b in run.blocks]
    buffer = run.buffer(sides, dtype) if run.path.plane_bytes and run.kept is None else None
    for block, (rows, width) in zip(run.blocks, sides, strict=True):
        row_scale_PN = run.row_scale(block)
        for at in spans(run.n_rows, rows):
            x_RE = run.rows(block, at)
            for part in run.tiles(block, row_scale_PN, at, width):
                planes_PRC = None
                if run.path.plane_bytes:
                    shape = (len(run.settings.prefixes), *part.shape)
                    planes_PRC = (
                        torch.empty(shape, dtype=dtype, device=device) if buffer is None else run.cut(buffer, part)
                    )
                    run.dots(part, x_RE, planes_PRC)
                    if run.kept is not None:
                        run.kept.append(planes_PRC)
                statistics.fold(run, part, x_RE, planes_PRC)
    run.lse_SPN = statistics.lse(slice(None))
    return statistics.losses(run.lse_SPN)


def _pairs(run: Pass) -> torch.Tensor:
    """[P, N]: the score of each pair, before the tiles come to it: the margin is measured from there."""
    queries, settings = run.queries, run.settings
    dots_PN = torch.empty_like(queries.inverse_Pn)
    for at in spans(run.n_rows, 2048):
        x_RE, y_RE = queries.x_nE[at], run.candidates.x_nE[run.doc_rows_N[at]]
        for p, (begin, end) in enumerate(settings.segments):
            dots_PN[p, at] = (x_RE[:, begin:end].to(dots_PN.dtype) * y_RE[:, begin:end]).sum(1)
    return dots_PN.cumsum(0) * queries.inverse_Pn * run.candidates.inverse_Pn[:, run.doc_rows_N] * run.scale
