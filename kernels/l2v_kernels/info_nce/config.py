"""Tile shapes of the InfoNCE kernels, and the roofline that chooses between the two variants."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """block_rows x block_columns scores a program (block_e of E at a time), with Triton's warps and pipeline stages."""

    block_rows: int
    block_columns: int
    block_e: int
    num_warps: int
    num_stages: int

    def meta(self, *, fused: bool) -> dict[str, int]:
        """As keyword arguments of a launch, of the fused kernels or of the elementwise ones."""
        meta = {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return meta | {"BLOCK_E": self.block_e} if fused else meta


# Passes over scores: (statistics, coefficients). 8 or 16 scores a thread; the vectors of a row are shared by all that a
# program reads of it. With several prefixes there are running sums as well, which take registers.
_PASSES = (Config(4, 1024, 0, 8, 1), Config(8, 256, 0, 8, 1))
_PASSES_OF_PREFIXES = (Config(2, 512, 0, 4, 1), Config(8, 64, 0, 4, 1))
NORMS = {"BLOCK_ROWS": 4, "BLOCK_E": 1024, "num_warps": 8}
FINISH = {"BLOCK_ROWS": 4, "BLOCK_E": 1024, "num_warps": 8}

# [architecture][load] = (statistics, coefficients). Chosen to compile without spills under Triton 3.6.0 and 3.7.1 with all
# options of their load: "one" prefix, several "prefixes", or "heavy": a margin, restricted hard negatives, or several
# kinds of ids, each of which is a mask that takes registers.
_HALF = {
    80: {
        "one": (Config(128, 128, 32, 8, 4), Config(128, 128, 64, 8, 4)),
        "prefixes": (Config(128, 64, 64, 8, 4), Config(128, 64, 64, 8, 4)),
        "heavy": (Config(128, 64, 64, 8, 4), Config(64, 64, 64, 8, 3)),
    },
    90: {
        "one": (Config(128, 128, 64, 8, 4), Config(128, 128, 64, 8, 4)),
        "prefixes": (Config(128, 64, 64, 8, 4), Config(128, 64, 64, 8, 4)),
        "heavy": (Config(128, 64, 64, 8, 4), Config(64, 64, 64, 8, 3)),
    },
    100: {
        "one": (Config(128, 64, 64, 8, 4), Config(128, 64, 64, 8, 4)),
        "prefixes": (Config(128, 32, 64, 8, 3), Config(64, 64, 64, 8, 3)),
        "heavy": (Config(64, 32, 32, 8, 2), Config(64, 32, 64, 8, 2)),
    },
    120: {
        "one": (Config(128, 128, 32, 8, 4), Config(128, 128, 64, 8, 4)),
        "prefixes": (Config(128, 64, 64, 8, 4), Config(128, 64, 64, 8, 4)),
        "heavy": (Config(128, 64, 64, 8, 4), Config(64, 64, 64, 8, 3)),
    },
}
# Exact fp32 matmuls run on the CUDA cores.
_SINGLE = (Config(32, 32, 32, 4, 1), Config(32, 32, 32, 4, 1))

ARCHITECTURES = tuple(_HALF)

GROUP = 8
"""Rows of tiles whose programs run next to each other in the fused coefficients kernel."""

FLOPS_PER_BYTE = 180
"""bf16 FLOP per second over bytes copied per second: 788e12 / 4.3e12 on an H200; 150 to 300 on other GPUs."""
FUSED_EFFICIENCY = 0.75
"""Share of the library's rate that a matmul in Triton reaches: 75 to 77% is what others published for Hopper."""


def elementwise(prefixes: int) -> tuple[Config, Config]:
    """Tiles of the passes over dot products: (statistics, coefficients)."""
    return _PASSES if prefixes == 1 else _PASSES_OF_PREFIXES


def fused(arch: int, itemsize: int, prefixes: int, heavy: bool) -> tuple[Config, Config]:
    """Tiles of the fused kernels: (statistics, coefficients).

    arch: one of ARCHITECTURES; itemsize: bytes an element; heavy: the call has a margin, restricted hard negatives, or
    several kinds of ids.
    """
    if itemsize == 4:
        return _SINGLE
    return _HALF[arch]["heavy" if heavy else "one" if prefixes == 1 else "prefixes"]


def prefers_fused(E: int, P: int, kept: bool) -> bool:
    """By the roofline of docs/info-nce.md: time a score in bytes moved, matmuls at FLOPS_PER_BYTE.

    Chunked: 4 matmuls of 2 E FLOP (3 if the scores are kept), and 22 bytes a plane of scores written and read (18 if kept).
    Fused: 2 matmuls at the library's rate, 2 at the kernel's, and 6 bytes a plane of coefficients, 10 where prefixes are
    added up.
    """
    matmul = 2 * E / FLOPS_PER_BYTE
    chunked = (3 if kept else 4) * matmul + (18 if kept else 22) * P
    return (2 + 2 / FUSED_EFFICIENCY) * matmul + (6 if P == 1 else 10) * P < chunked
