"""Two ways to a tile's statistics and coefficients: library products and an elementwise pass, or one fused kernel."""

import functools
import importlib.util
from typing import Protocol

import torch

from l2v_kernels.info_nce import elementwise
from l2v_kernels.info_nce.config import FLOPS_PER_BYTE, prefers_fused
from l2v_kernels.info_nce.products import dots
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile

CPU_TILE = 32 << 20
"""Bytes of a tile and of what is computed from it on a CPU: larger ones leave the caches."""


class Path(Protocol):
    """What the engine asks of a way to compute. Shapes as in `elementwise`; x_RE are the embeddings of the tile's rows."""

    plane_bytes: int
    """Bytes a score that dot products take in the workspace; 0 where they never exist."""
    scratch_bytes: int
    """Bytes a score that passing over a tile takes beside."""
    most_bytes: int
    """A larger tile gains nothing."""
    least_rows: int
    """With fewer at a time, one look at the scores costs more than two."""

    def inverse_norms(self, x_nE: torch.Tensor, settings: Settings) -> torch.Tensor: ...

    def dots(self, x_RE: torch.Tensor, y_CE: torch.Tensor, out_PRC: torch.Tensor, settings: Settings) -> None: ...

    def statistics(self, tile: Tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings: Settings) -> None: ...

    def coefficients(self, tile: Tile, x_RE, planes_PRC, *rest: torch.Tensor, settings: Settings) -> None: ...

    def finish(self, sum_RE, x_RE, along_PR, unscale, out_RE, settings: Settings) -> None: ...


class _Planes:
    """Dot products by the library, into planes of the workspace."""

    def dots(self, x_RE, y_CE, out_PRC, settings):
        for s, (begin, end) in enumerate(settings.segments):
            dots(x_RE[:, begin:end], y_CE[:, begin:end], out_PRC[s])


class OnCpu(_Planes):
    """PyTorch all the way; also where there is no kernel for the dtype."""

    least_rows = 64

    def __init__(self, dtype: torch.dtype) -> None:
        self.plane_bytes = 8 if dtype == torch.float64 else 4
        # Scores, their exponentials and moments, and masks.
        self.scratch_bytes = 4 * self.plane_bytes
        self.most_bytes = CPU_TILE

    def inverse_norms(self, x_nE, settings):
        return elementwise.inverse_norms(x_nE, settings)

    def statistics(self, tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings):
        elementwise.statistics(tile, planes_PRC, m_PR, l_PR, pair_PR)

    def coefficients(self, tile, x_RE, planes_PRC, *rest, settings):
        elementwise.coefficients(tile, planes_PRC, *rest)

    def finish(self, sum_RE, x_RE, along_PR, unscale, out_RE, settings):
        elementwise.finish(sum_RE, x_RE, along_PR, unscale, out_RE, settings)


class Chunked(_Planes):
    """Library products, and a Triton kernel that goes over them."""

    plane_bytes, scratch_bytes, most_bytes = 4, 0, 1 << 62
    # A row of tiles reads and writes M E sums of 4 bytes; the product that is saved has 2 M E operations a row.
    least_rows = 4 * FLOPS_PER_BYTE

    def inverse_norms(self, x_nE, settings):
        from l2v_kernels.info_nce import launch

        return launch.inverse_norms(x_nE, settings)

    def statistics(self, tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings):
        from l2v_kernels.info_nce import launch

        launch.statistics(tile, planes_PRC, m_PR, l_PR, pair_PR)

    def coefficients(self, tile, x_RE, planes_PRC, *rest, settings):
        from l2v_kernels.info_nce import launch

        launch.coefficients(tile, planes_PRC, *rest)

    def finish(self, sum_RE, x_RE, along_PR, unscale, out_RE, settings):
        from l2v_kernels.info_nce import launch

        launch.finish(sum_RE, x_RE, along_PR, unscale, out_RE, settings)


class Fused(Chunked):
    """Triton kernels that make the scores and use them up."""

    plane_bytes = 0

    def statistics(self, tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings):
        from l2v_kernels.info_nce import launch

        launch.fused_statistics(tile, x_RE, m_PR, l_PR, pair_PR, settings)

    def coefficients(self, tile, x_RE, planes_PRC, *rest, settings):
        from l2v_kernels.info_nce import launch

        launch.fused_coefficients(tile, x_RE, *rest, settings)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose(x_NE: torch.Tensor, n_scores: int, settings: Settings) -> Path:
    """Errors: NotImplementedError where the variant asked for does not run."""
    where = f"embeddings {tuple(x_NE.shape)} {x_NE.dtype} on {x_NE.device}"
    kernels = x_NE.is_cuda and _has_triton() and x_NE.dtype != torch.float64
    if not kernels:
        if settings.variant == "fused":
            raise NotImplementedError(f'variant="fused" needs CUDA with Triton, and fp32, fp16 or bf16; got {where}')
        return OnCpu(x_NE.dtype)
    P, E = len(settings.prefixes), settings.prefixes[-1]
    kept = n_scores * P * (Chunked.plane_bytes + x_NE.element_size()) <= settings.workspace
    # The library's fp32 products are faster than exact ones in Triton at any size.
    by_roofline = x_NE.dtype != torch.float32 and prefers_fused(E, P, kept)
    fused = by_roofline if settings.variant is None else settings.variant == "fused"
    return Fused() if fused else Chunked()
