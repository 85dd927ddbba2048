"""A predicted rate of packed attention, from counts alone. Nothing here is measured: see `published.py` for its known error.

A block's step takes as long as its matrix instructions and, after them, its slowest other pipe: within a block they wait for each
other. Several blocks on an SM overlap, down to the time of the slowest pipe of them all. Blocks run in waves. Around its loop a
block issues what was counted there, and waits for its first tile of memory once.
"""

import math
from dataclasses import dataclass

from benchmarks.resources.count import Count
from benchmarks.resources.machine import MACHINES

LATENCY_CLOCKS = 1200
"""From the launch of a block to its first tile in shared memory, and from its last matmul to its last store: two round trips
to memory of about 600 clocks (Luo et al. 2024, arXiv 2402.13499)."""
LENGTHS = (30, 128, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Workload:
    """A pack of segments of one length."""

    length: int
    tokens: int = 16384
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128

    @property
    def lengths(self) -> int:
        """How many segments."""
        return max(1, self.tokens // self.length)

    def flops(self, products: int) -> float:
        """Of the segments alone, without a tile's waste."""
        return products * 2.0 * self.lengths * self.length**2 * self.heads * self.head_dim


@dataclass(frozen=True)
class Prediction:
    """Of one kernel on one pack."""

    tflops: float
    microseconds: float
    waste: float
    """Scores computed over scores needed."""
    waves: float


def steps(kind: str, block_m: int, block_n: int, work: Workload) -> list[int]:
    """Steps of the loop of each block of one head group, as the kernels' ranges give them for this pack.

    kind: "forward", "query" or "key"; block_m rows of (token, head) and block_n keys.
    """
    group = work.heads // work.key_heads
    total, length = work.lengths * work.length, work.length
    of_keys = kind == "key"
    tokens = block_n if of_keys else block_m // group
    found = []
    for first in range(0, total, tokens):
        last = min(first + tokens, total) - 1
        low, high = first // length * length, (last // length + 1) * length
        found.append(math.ceil((high - low) / (block_m // group if of_keys else block_n)))
    return found


def predict(kind: str, block_m: int, block_n: int, products: int, count: Count, work: Workload) -> Prediction:
    """The rate of one kernel of packed attention on a pack, in useful TFLOP/s of `products` matmuls a score."""
    loop_steps = steps(kind, block_m, block_n, work)
    scores = sum(loop_steps) * block_m * block_n * work.key_heads
    return _predict(loop_steps, work.key_heads, scores, count, work, products)


def dense(block_m: int, block_n: int, products: int, count: Count, work: Workload, owns_keys: bool) -> Prediction:
    """As `predict`, for a kernel whose blocks own one head's rows (or keys) of one segment, such as FlashAttention-2."""
    own, passed = (block_n, block_m) if owns_keys else (block_m, block_n)
    blocks = work.lengths * math.ceil(work.length / own)
    loop_steps = [math.ceil(work.length / passed)] * blocks
    scores = sum(loop_steps) * block_m * block_n * work.heads
    return _predict(loop_steps, work.heads, scores, count, work, products)


def _predict(loop_steps, repeats, scores, count, work, products):
    machine = MACHINES[count.arch]
    blocks = max(1, count.blocks)
    # What one block waits in turns, others fill, down to the pipe that all share.
    step = max(count.bound, count.serial / blocks)
    # The clock at which a large GEMM runs (power limit) instead of the boost clock.
    clock = machine.clock_ghz * machine.gemm_tflops / (machine.sms * machine.clock_ghz * machine.tensor_flops * 1e-3)
    around = count.around * count.warps / 4 / blocks + LATENCY_CLOCKS / blocks
    clocks = [n * step + around for n in loop_steps]
    total = sum(clocks) * repeats
    slots = machine.sms * blocks
    waves = len(clocks) * repeats / slots
    # The last wave ends with its longest block: at least half a block of it is idle on average, and a whole wave at most.
    clocks_of_all = (
        total / machine.sms * math.ceil(waves) / waves if waves < 4 else total / machine.sms + max(clocks) / 2
    )
    microseconds = clocks_of_all / clock / 1e3
    flops = work.flops(products)
    needed = work.lengths * work.length**2 * work.heads
    return Prediction(flops / microseconds / 1e6, microseconds, scores / needed, waves)
