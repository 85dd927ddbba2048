"""Two ways to a tile's statistics and coefficients: library products and an elementwise pass, or one fused kernel."""

from types import ModuleType

import torch

from l2v_kernels.dispatch import has_triton
from l2v_kernels.info_nce import elementwise
from l2v_kernels.info_nce.config import FLOPS_PER_BYTE, prefers_fused
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile
from l2v_kernels.matmul import matmul_nt

CPU_TILE = 32 << 20
"""Bytes of a tile and of what is computed from it on a CPU: larger ones leave the caches."""


class Path:
    """What the engine asks of a way to compute: the operations of `elementwise`, on dot products that the library makes."""

    plane_bytes = 4
    """Bytes a score that dot products take in the workspace; 0 where they never exist."""
    scratch_bytes = 0
    """Bytes a score that passing over a tile takes beside."""
    most_bytes = 1 << 62
    """A larger tile gains nothing."""
    least_rows = 1
    """With fewer at a time, one look at the scores costs more than two."""

    ops: ModuleType
    """The module of operations on planes."""

    def dots(self, x_RE: torch.Tensor, y_CE: torch.Tensor, out_PRC: torch.Tensor, settings: Settings) -> None:
        """Products of each segment of x and y."""
        for s, (begin, end) in enumerate(settings.segments):
            matmul_nt(x_RE[:, begin:end], y_CE[:, begin:end], out_PRC[s])

    def statistics(self, tile: Tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings: Settings) -> None:
        """As `elementwise.statistics`; x_RE are the embeddings of the tile's rows."""
        self.ops.statistics(tile, planes_PRC, m_PR, l_PR, pair_PR)

    def coefficients(self, tile: Tile, x_RE, planes_PRC, *rest: torch.Tensor, settings: Settings) -> None:
        """As `elementwise.coefficients`."""
        self.ops.coefficients(tile, planes_PRC, *rest)


class OnCpu(Path):
    """PyTorch all the way; also where there is no kernel for the dtype."""

    least_rows = 64
    most_bytes = CPU_TILE
    ops = elementwise

    def __init__(self, dtype: torch.dtype) -> None:
        self.plane_bytes = 8 if dtype == torch.float64 else 4
        # Scores, their exponentials and moments, and masks.
        self.scratch_bytes = 4 * self.plane_bytes


class Chunked(Path):
    """A Triton kernel goes over the dot products."""

    # A row of tiles reads and writes M E sums of 4 bytes; the product that is saved has 2 M E operations a row.
    least_rows = 4 * FLOPS_PER_BYTE

    @property
    def ops(self) -> ModuleType:
        # Imported here: the package works where Triton is not installed.
        from l2v_kernels.info_nce import launch

        return launch


class Fused(Chunked):
    """Triton kernels that make the scores and use them up."""

    plane_bytes = 0

    def statistics(self, tile, x_RE, planes_PRC, m_PR, l_PR, pair_PR, settings):
        self.ops.fused_statistics(tile, x_RE, m_PR, l_PR, pair_PR, settings)

    def coefficients(self, tile, x_RE, planes_PRC, *rest, settings):
        self.ops.fused_coefficients(tile, x_RE, *rest, settings)


def choose(x_NE: torch.Tensor, n_scores: int, settings: Settings) -> Path:
    """Errors: NotImplementedError where the variant asked for does not run."""
    where = f"embeddings {tuple(x_NE.shape)} {x_NE.dtype} on {x_NE.device}"
    kernels = x_NE.is_cuda and has_triton() and x_NE.dtype != torch.float64
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
