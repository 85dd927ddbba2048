"""What one SM of each architecture can do in a clock, and how many blocks it holds. Sources beside the numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """An SM and its GPU. Rates are for all of an SM's four partitions together, in lanes or bytes a clock."""

    name: str
    sms: int
    clock_ghz: float
    """Boost clock at which the data sheet's tensor rate holds."""
    tensor_flops: int
    """Dense 16-bit matrix FLOPs of an SM in a clock, accumulated in fp32; FP8 has twice as many."""
    fp32: int
    alu: int
    exp: int
    shared_bytes: int
    registers: int
    shared: int
    """Bytes of shared memory an SM, of which every block reserves 1,024."""
    threads: int
    blocks: int
    bandwidth_gbs: float
    l2_bytes: int | None
    """Bytes an SM reads from the L2 cache in a clock; None where nothing is published, and then not counted."""
    gemm_tflops: float
    """What a large 16-bit GEMM reaches, power limit included: the ceiling of every prediction."""
    warp_matrix_share: float = 1.0
    """What a warp's matrix instructions (HMMA) reach of a warpgroup's (HGMMA)."""

    def blocks_per_sm(self, registers: int, shared: int, warps: int) -> int:
        """Blocks of `warps` warps that are resident at once, by registers a thread and bytes of shared memory a block."""
        of_a_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // (of_a_warp * warps)
        return min(by_registers, self.shared // (shared + 1024), self.threads // (32 * warps), self.blocks)


# H100: 788 TFLOP/s is this project's own measurement of a bf16 GEMM (on an H200, the same chip), and HMMA reaches 62% of HGMMA
# (Luo et al. 2024, arXiv 2402.13499). The other GEMM rates are set to the same share of the peak, 80%, and not measured.
# L2: 5,120 bytes a clock (white paper of the A100), taken for the H100 as well.
# Sources: CUDA programming guide, "Arithmetic Instructions" (lanes a clock) and "Compute capabilities" (registers, shared
# memory, threads, blocks); white papers of A100, H100, Blackwell and RTX Blackwell (SMs, clocks, rates, bandwidth). The
# tensor rate is the dense one: 312, 989, 2,250 and 419 TFLOP/s (RTX 5090: 209.5 with fp32 accumulation).
MACHINES = {
    80: Machine("A100 SXM", 108, 1.41, 2048, 64, 64, 16, 128, 65536, 164 << 10, 2048, 32, 2039, 47, 250),
    90: Machine("H100 SXM", 132, 1.83, 4096, 128, 64, 16, 128, 65536, 228 << 10, 2048, 32, 3352, 39, 788, 0.62),
    100: Machine("B200", 148, 1.85, 8192, 128, 64, 16, 128, 65536, 228 << 10, 2048, 32, 8000, None, 1800),
    120: Machine("RTX 5090", 170, 2.41, 512, 128, 64, 16, 128, 65536, 100 << 10, 1536, 24, 1792, None, 168),
}
