"""InfoNCE a tile of scores at a time, in memory linear in N + M: the state of a call, and its losses."""

import functools
from dataclasses import dataclass

import torch

from l2v_kernels.info_nce.paths import Path, choose
from l2v_kernels.info_nce.quantize import inverse_steps
from l2v_kernels.info_nce.settings import Labels, Settings
from l2v_kernels.info_nce.tiles import Block, Side, Tile, blocks, spans, sum_dtype, tile, tile_shape
from l2v_kernels.launching import unit_stride


@dataclass
class Pass:
    """The state that the forward leaves for the backward, apart from the embeddings themselves."""

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
    """Targets, clamped into range: their embeddings are the rows of doc_to_..."""
    limit_PN: torch.Tensor | None = None
    lse_ZPN: torch.Tensor | None = None
    kept: list[torch.Tensor] | None = None
    """Dot products of every block where all of them fit the workspace, [P, N, columns] each."""

    @classmethod
    def start(
        cls,
        queries_NE: torch.Tensor,
        candidates_ME: torch.Tensor,
        all_queries_QE: torch.Tensor | None,
        labels: Labels,
        scale: float | torch.Tensor,
        settings: Settings,
    ) -> "Pass":
        """Chooses the path and computes norms. Arguments as in `l2v_kernels.info_nce`, without gradients."""
        with_queries = any(d.endswith("to_query") for d in settings.directions)
        others_QE = all_queries_QE if with_queries else None
        n_columns = {"doc": len(candidates_ME), "query": len(queries_NE if others_QE is None else others_QE)}
        n_scores = len(queries_NE) * sum(n_columns[d.rpartition("_")[2]] for d in settings.directions)
        path = choose(queries_NE, n_scores, settings)

        def measured(x_nE: torch.Tensor) -> Side:
            x_nE = unit_stride(x_nE)
            if settings.quantize is not None:
                return _quantised(x_nE, path, settings)
            return Side.of(x_nE, path.ops.inverse_norms(x_nE, settings), path.multiple)

        queries, candidates = measured(queries_NE), measured(candidates_ME)
        everyone = queries if others_QE is None else measured(others_QE)
        found = blocks(candidates, everyone, labels, settings)
        rows_N = labels.targets_N.clamp(0, max(0, len(candidates_ME) - 1))
        return cls(queries, candidates, everyone, labels, settings, scale, path, found, rows_N)

    @property
    def n_rows(self) -> int:
        """N"""
        return len(self.queries.x_nE)

    @property
    def columns_have_rows(self) -> bool:
        """Whether the queries are columns too, so that their gradient has a part from each role."""
        return self.everyone is self.queries and any(not b.to_docs for b in self.blocks)

    def rows(self, block: Block, at: slice) -> torch.Tensor:
        """[r, E]: the embeddings of a block's rows."""
        return self.candidates.compared(self.doc_rows_N[at]) if block.of_docs else self.queries.compared(at)

    def row_scale(self, block: Block) -> torch.Tensor:
        """[P, N]: scale / norm of a block's rows."""
        exact_PN = self.candidates.exact_Pn[:, self.doc_rows_N] if block.of_docs else self.queries.exact_Pn
        return (exact_PN * self.scale).to(self.queries.inverse_Pn.dtype)

    def fits(self) -> bool:
        """Whether the dot products of all blocks, and the coefficients of one, fit the workspace."""
        sizes = [self.n_rows * self.padded(len(b.columns.x_nE)) for b in self.blocks]
        P, plane, out = len(self.settings.prefixes), self.path.plane_bytes, self.queries.x_nE.element_size()
        needed = P * (plane * sum(sizes) + out * max(sizes)) + self.path.scratch_bytes * max(sizes)
        return bool(plane) and needed <= min(self.settings.workspace, self.path.max_tile_bytes)

    def padded(self, n_columns: int) -> int:
        """The length in memory of a row of this many scores."""
        return -(-n_columns // self.path.multiple) * self.path.multiple

    def tile_sides(self, block: Block, whole: bool) -> tuple[int, int]:
        """(rows, columns) of this block's tiles."""
        columns = len(block.columns.x_nE)
        if whole:
            return self.n_rows, columns
        P, x = len(self.settings.prefixes), self.queries.x_nE
        # A quarter of the workspace is for the gradient of a tile's rows, in the dtype of sums.
        most_rows = max(1, self.settings.workspace // 4 // (x.shape[1] * sum_dtype(x).itemsize))
        score_bytes = P * (self.path.plane_bytes + x.element_size()) + self.path.scratch_bytes
        budget = min(self.settings.workspace * 3 // 4, self.path.max_tile_bytes)
        rows, width = tile_shape(min(self.n_rows, most_rows), self.padded(columns), max(1, budget // score_bytes))
        if width < columns:  # so that every tile begins at a multiple, too
            width = max(self.path.multiple, width // self.path.multiple * self.path.multiple)
        return rows, min(width, columns)

    def one_pass_rows(self) -> int:
        """How many rows fit with their scores of all columns, so that losses and gradients take one pass; 0 for two passes.

        One pass saves a matmul, but with few rows at a time it reads and writes the candidates' gradient more often: below
        `min_rows` it saves nothing. In fp16 gradients need the loss scale, which is known only in the backward.
        """
        columns = [self.padded(len(b.columns.x_nE)) for b in self.blocks]
        P, x = len(self.settings.prefixes), self.queries.x_nE
        if not self.path.plane_bytes or x.dtype == torch.float16 or self.n_rows == 0 or self.fits():
            return 0
        row_bytes = P * (self.path.plane_bytes * sum(columns) + x.element_size() * max(columns))
        row_bytes += self.path.scratch_bytes * max(columns)
        rows = min(self.n_rows, self.settings.workspace // 4 // (x.shape[1] * sum_dtype(x).itemsize))
        rows = min(rows, min(self.settings.workspace * 3 // 4, self.path.max_tile_bytes) // row_bytes)
        return rows if rows >= min(self.n_rows, self.path.min_rows) else 0

    def tiles(self, block: Block, row_scale_PN: torch.Tensor, at: slice, width: int) -> list[Tile]:
        """The tiles of a block for these rows, from left to right."""
        arguments = (row_scale_PN, self.limit_PN, self.labels, self.settings)
        return [tile(block, at, columns, *arguments) for columns in spans(len(block.columns.x_nE), width)]

    def buffer(self, sides: list[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer for P planes of the largest of these tiles."""
        size = len(self.settings.prefixes) * max(r * self.padded(c) for r, c in sides)
        return torch.empty(size, dtype=dtype, device=self.queries.x_nE.device)

    def cut(self, buffer: torch.Tensor, of: Tile) -> torch.Tensor:
        """[P, r, c] at the start of a buffer, its rows as long as `padded` says."""
        P, (R, C) = len(self.settings.prefixes), of.shape
        width = self.padded(C)
        return buffer[: P * R * width].view(P, R, width)[:, :, :C]

    def dots(self, of: Tile, x_rE: torch.Tensor, out_Prc: torch.Tensor) -> torch.Tensor:
        """Writes the planes [P, r, c] of a tile into out, which `cut` gave, and returns them."""
        y_cE = of.block.columns.compared(of.columns)
        self.path.dots(x_rE, y_cE, out_Prc, self.settings)
        P, R, C = out_Prc.shape
        if rest := out_Prc.stride(1) - C:
            # Kernels read whole rows: what is not a number there would spoil their sums.
            out_Prc.as_strided((P, R, rest), out_Prc.stride(), out_Prc.storage_offset() + C).zero_()
        return out_Prc


@dataclass
class Statistics:
    """Running maximum m and sum l of exp(score - m) of each softmax [Z, P, N], and each pair's score [P, N]."""

    m_ZPN: torch.Tensor
    l_ZPN: torch.Tensor
    pair_PN: torch.Tensor

    @classmethod
    def of(cls, run: Pass) -> "Statistics":
        """Before the first tile. With a margin it also sets the limits, which need the pairs' scores ahead of the tiles."""
        if run.settings.margin is not None:
            run.limit_PN = _pairs(run) + run.settings.margin * run.scale
        like_PN = run.queries.inverse_Pn
        shape = (1 + max(b.statistic for b in run.blocks), *like_PN.shape)
        # A row whose target is no candidate keeps its NaN.
        return cls(like_PN.new_full(shape, -torch.inf), like_PN.new_zeros(shape), torch.full_like(like_PN, torch.nan))

    def fold(self, run: Pass, part: Tile, x_rE: torch.Tensor, planes_Prc: torch.Tensor | None) -> None:
        """Update them by a tile."""
        s, at = part.block.statistic, part.rows
        pair = self.pair_PN[:, at] if part.block.direction == "query_to_doc" else None
        m_Pr, l_Pr = self.m_ZPN[s, :, at], self.l_ZPN[s, :, at]
        run.path.statistics(part, x_rE, planes_Prc, m_Pr, l_Pr, pair, run.settings)

    def lse(self, at: slice) -> torch.Tensor:
        """[Z, P, r]: log Z of these rows, once all their tiles were folded in."""
        return self.m_ZPN[..., at] + self.l_ZPN[..., at].log()

    def losses(self, lse_ZPN: torch.Tensor) -> torch.Tensor:
        """[P, N], from the log Z [Z, P, N] of all rows."""
        return (lse_ZPN[0] if len(lse_ZPN) == 1 else lse_ZPN.mean(0)) - self.pair_PN


def _quantised(x_nE: torch.Tensor, path: Path, settings: Settings) -> Side:
    """The side of rows that are compared as codes: the norms are of these, computed some rows at a time."""
    assert settings.quantize is not None
    kind, length = settings.quantize, settings.prefixes[-1]
    inverse_n = inverse_steps(x_nE, kind, length)
    exact_Pn = torch.empty(len(settings.prefixes), len(x_nE), dtype=torch.float64, device=x_nE.device)
    for at in spans(len(x_nE), settings.code_rows(x_nE)):
        exact_Pn[:, at] = path.ops.inverse_norms(path.ops.codes(x_nE[at], inverse_n[at], kind), settings)
    side = Side.of(x_nE, exact_Pn, path.multiple)
    side.inverse_step_n, side.codes = inverse_n, functools.partial(path.ops.codes, kind=kind)
    return side


def losses(run: Pass, keep: bool) -> torch.Tensor:
    """[P, N]; fills in what `gradients` needs. keep: keep the dot products where they fit."""
    dtype = run.queries.inverse_Pn.dtype
    statistics, whole = Statistics.of(run), run.fits()
    run.kept = [] if keep and whole else None
    sides = [run.tile_sides(b, whole) for b in run.blocks]
    buffer = run.buffer(sides, dtype) if run.path.plane_bytes and run.kept is None else None
    for block, (rows, width) in zip(run.blocks, sides, strict=True):
        row_scale_PN = run.row_scale(block)
        for at in spans(run.n_rows, rows):
            x_rE = run.rows(block, at)
            for part in run.tiles(block, row_scale_PN, at, width):
                planes_Prc = None
                if run.path.plane_bytes:
                    planes = run.buffer([part.shape], dtype) if buffer is None else buffer
                    planes_Prc = run.dots(part, x_rE, run.cut(planes, part))
                    if run.kept is not None:
                        run.kept.append(planes_Prc)
                statistics.fold(run, part, x_rE, planes_Prc)
    run.lse_ZPN = statistics.lse(slice(None))
    return statistics.losses(run.lse_ZPN)


def _pairs(run: Pass) -> torch.Tensor:
    """[P, N]: the score of each pair, which the margin is relative to, ahead of the tiles."""
    queries, settings = run.queries, run.settings
    dots_PN = torch.empty_like(queries.inverse_Pn)
    for at in spans(run.n_rows, 2048):
        x_rE, y_rE = queries.compared(at), run.candidates.compared(run.doc_rows_N[at])
        for p, (begin, end) in enumerate(settings.prefix_slices):
            dots_PN[p, at] = (x_rE[:, begin:end].to(dots_PN.dtype) * y_rE[:, begin:end]).sum(1)
    return dots_PN.cumsum(0) * queries.inverse_Pn * run.candidates.inverse_Pn[:, run.doc_rows_N] * run.scale
