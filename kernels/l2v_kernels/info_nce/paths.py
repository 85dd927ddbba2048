"""Two ways to a tile's statistics and coefficients: library products and an elementwise pass, or one fused kernel."""

from typing import Protocol

import torch

from l2v_kernels.info_nce import elementwise
from l2v_kernels.info_nce.products import dots
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile


class Path(Protocol):
    """What the engine asks of a way to compute. Shapes as in `elementwise`, x_RE the embeddings of the tile's rows."""

    plane_bytes: int
    """Bytes a score that dot products take in the workspace; 0 where they never exist."""
    scratch_bytes: int
    """Bytes a score that passing over a tile takes beside."""
    most_bytes: int
    """A tile larger than this gains nothing."""

    def dots(self, x_RE: torch.Tensor, y_CE: torch.Tensor, out_PRC: torch.Tensor, settings: Settings) -> None: ...

    def statistics(self, tile: Tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings: Settings) -> None: ...

    def coefficients(
        self, tile: Tile, x_RE, planes_PRC, lse_PR, grad_PR, row_out_PR, column_out_PC, out_PRC, row_sums_PR,
        column_sums_PC, settings: Settings,
    ) -> None: ...  # fmt: skip

    def finish(self, sum_RE, x_RE, along_PR, unscale, out_RE, settings: Settings) -> None: ...


class Chunked:
    """Library products into fp32 planes, then PyTorch operations on them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.plane_bytes = 8 if dtype == torch.float64 else 4
        # Scores, their exponentials and masks, before they are summed.
        self.scratch_bytes = 4 * self.plane_bytes
        self.most_bytes = CPU_TILE

    def dots(self, x_RE, y_CE, out_PRC, settings):
        for s, (begin, end) in enumerate(settings.segments):
            dots(x_RE[:, begin:end], y_CE[:, begin:end], out_PRC[s])

    def statistics(self, tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings):
        elementwise.statistics(tile, planes_PRC, m_PR, l_PR, pair_PR)

    def coefficients(
        self, tile, x_RE, planes_PRC, lse_PR, grad_PR, row_out_PR, column_out_PC, out_PRC, row_sums_PR, column_sums_PC,
        settings,
    ):  # fmt: skip
        elementwise.coefficients(
            tile, planes_PRC, lse_PR, grad_PR, row_out_PR, column_out_PC, out_PRC, row_sums_PR, column_sums_PC
        )

    def finish(self, sum_RE, x_RE, along_PR, unscale, out_RE, settings):
        for s, (begin, end) in enumerate(settings.segments):
            for at in range(0, len(x_RE), 1024):
                rows = slice(at, at + 1024)
                total = sum_RE[rows, begin:end] if unscale is None else sum_RE[rows, begin:end] * unscale
                along = x_RE[rows, begin:end] * along_PR[s, rows].unsqueeze(1)
                out_RE[rows, begin:end] = total - along
        out_RE[:, settings.prefixes[-1] :] = 0


CPU_TILE = 32 << 20
"""Bytes of a tile and what is computed from it: larger ones leave the caches."""


def choose(x: torch.Tensor, settings: Settings) -> Path:
    """Errors: NotImplementedError where the variant asked for does not run."""
    return Chunked(x.dtype)
