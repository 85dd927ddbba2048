"""How a tile's statistics and coefficients are computed: GEMMs of the library and an elementwise pass, or a fused kernel."""

from types import ModuleType

import torch

from l2v_kernels.dispatch import has_triton
from l2v_kernels.info_nce import elementwise
from l2v_kernels.info_nce.config import FLOPS_PER_BYTE, prefers_fused
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile
from l2v_kernels.matmul import matmul_nt

CPU_TILE_BYTES = 32 << 20
"""Bytes of a tile and of what is computed from it on a CPU: larger ones do not fit the caches."""


class Path:
    """What the engine needs of a path: the operations of `elementwise`, on dot products computed by the GEMM library."""

    plane_bytes = 4
    """Bytes a score that dot products take in the workspace; 0 where they are never written."""
    scratch_bytes = 0
    """Bytes a score that a pass over a tile takes as well."""
    max_tile_bytes = 1 << 62
    """A larger tile would gain nothing."""
    min_rows = 1
    """With fewer rows at a time, one pass over the scores costs more than two."""
    multiple = 1
    """Rows of planes in memory are as long as the next multiple of this; the rest of dot products is zero."""

    @property
    def ops(self) -> ModuleType:
        """The module of operations on planes."""
        raise NotImplementedError

    def dots(self, x_rE: torch.Tensor, y_cE: torch.Tensor, out_Prc: torch.Tensor, settings: Settings) -> None:
        """Dot products of each slice of x and y, into out [P, r, c]."""
        for s, (begin, end) in enumerate(settings.prefix_slices):
            matmul_nt(x_rE[:, begin:end], y_cE[:, begin:end], out_Prc[s])

    def statistics(self, tile: Tile, x_rE, planes_Prc, m_Pr, l_Pr, pair_Pr, settings: Settings) -> None:
        """As `elementwise.statistics`; x_rE are the embeddings of the tile's rows."""
        self.ops.statistics(tile, planes_Prc, m_Pr, l_Pr, pair_Pr)

    def coefficients(self, tile: Tile, x_rE, planes_Prc, *rest: torch.Tensor, settings: Settings) -> None:
        """As `elementwise.coefficients`."""
        self.ops.coefficients(tile, planes_Prc, *rest)


class OnCpu(Path):
    """All in PyTorch; also where there is no kernel for the dtype."""

    min_rows = 64
    max_tile_bytes = CPU_TILE_BYTES

    @property
    def ops(self) -> ModuleType:
        return elementwise

    def __init__(self, dtype: torch.dtype) -> None:
        self.plane_bytes = 8 if dtype == torch.float64 else 4
        # Scores, their exponentials and moments, and masks.
        self.scratch_bytes = 4 * self.plane_bytes


class Chunked(Path):
    """Triton kernels pass over the dot products."""

    # So that a kernel's accesses are 16 bytes wide, and it is compiled once, whatever the number of columns.
    multiple = 16
    # A row of tiles reads and writes M E sums of 4 bytes; the matmul that is saved has 2 M E FLOP a row.
    min_rows = 4 * FLOPS_PER_BYTE

    @property
    def ops(self) -> ModuleType:
        # Imported here: the package works without Triton.
        from l2v_kernels.info_nce import launch

        return launch


class Fused(Chunked):
    """Triton kernels that compute the scores and consume them."""

    plane_bytes = 0

    def statistics(self, tile, x_rE, planes_Prc, m_Pr, l_Pr, pair_Pr, settings):
        self.ops.fused_statistics(tile, x_rE, m_Pr, l_Pr, pair_Pr, settings)

    def coefficients(self, tile, x_rE, planes_Prc, *rest, settings):
        self.ops.fused_coefficients(tile, x_rE, *rest, settings)


def choose(x_NE: torch.Tensor, n_scores: int, settings: Settings) -> Path:
    """The path for these embeddings. Raises NotImplementedError where the requested variant does not run."""
    where = f"embeddings {tuple(x_NE.shape)} {x_NE.dtype} on {x_NE.device}"
    kernels = x_NE.is_cuda and has_triton() and x_NE.dtype != torch.float64
    if not kernels:
        if settings.variant == "fused":
            raise NotImplementedError(f'variant="fused" needs CUDA with Triton, and fp32, fp16 or bf16; got {where}')
        return OnCpu(x_NE.dtype)
    P, E = len(settings.prefixes), settings.prefixes[-1]
    kept = n_scores * P * (Chunked.plane_bytes + x_NE.element_size()) <= settings.workspace
    # The library's fp32 matmuls are faster than exact ones in Triton at any size.
    by_roofline = x_NE.dtype != torch.float32 and prefers_fused(E, P, kept)
    fused = by_roofline if settings.variant is None else settings.variant == "fused"
    return Fused() if fused else Chunked()
