"""The known error of `predict.py`: the same prediction for kernels whose rates others published, from their machine code."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.aot import TOOLS
from benchmarks.resources import sass
from benchmarks.resources.count import Count, count_loop
from benchmarks.resources.predict import Workload, dense

LENGTHS = (512, 1024, 2048, 4096, 8192)
# TFLOP/s on an H100 SXM, head dimension 128, bf16, not causal, 16k tokens: Shah et al. 2024 (FlashAttention-3, arXiv 2407.08608),
# figures 5 and 6, FlashAttention-2's bars.
FLASH_ATTENTION_2 = {"forward": (309, 350, 362, 368, 370), "backward": (214, 260, 291, 310, 318)}
MAX_ERROR = 0.25
"""Above this error the tool ranks variants and predicts no rate."""


@dataclass(frozen=True)
class Check:
    """One published rate and its prediction."""

    kernel: str
    length: int
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the published rate; negative where it is too slow."""
        return self.predicted / self.published - 1


@dataclass(frozen=True)
class _Kernel:
    """FlashAttention-2's kernel for head dimension 128 on a GPU with 227 KB of shared memory a block."""

    name: str
    pattern: str
    block_m: int
    block_n: int
    warps: int
    shared: int
    products: int
    owns_keys: bool


# Template arguments: head dimension, tile, warps; then dropout, causal, local, alibi off, even sizes on, softcap off.
_KERNELS = (
    _Kernel("forward", r"flash_fwd_kernelI\w*traitsILi128ELi128ELi64ELi4E\w*bfloat16\w*ELb0ELb0ELb0ELb0ELb1ELb1ELb0ELb0EEE",
            128, 64, 4, 64 << 10, 2, False),
    _Kernel("backward", r"flash_bwd_dq_dk_dv_loop_seqk_parallel_kernelI\w*traitsILi128ELi64ELi128ELi8E\w*bfloat16\w*"
            r"ELb0ELb0ELb0ELb0ELb1ELb1ELb0EEE", 64, 128, 8, 144 << 10, 5, True),
)  # fmt: skip


def checks(library: Path) -> Iterator[Check]:
    """Predicts FlashAttention-2 at every published length, from the machine code inside torch's CUDA build.

    library: libtorch_cuda.so of a CUDA wheel.

    Raises:
        LookupError: the library holds none of the kernels for sm_90.
    """
    for kernel in _KERNELS:
        used = flash_attention_2(library, kernel)
        for length, published in zip(LENGTHS, FLASH_ATTENTION_2[kernel.name], strict=True):
            work = Workload(length, heads=16, key_heads=16)
            predicted = dense(kernel.block_m, kernel.block_n, kernel.products, used, work, kernel.owns_keys)
            yield Check(f"FlashAttention-2 {kernel.name}", length, published, predicted.tflops)


def flash_attention_2(library: Path, kernel: _Kernel) -> Count:
    """The counts of one of its kernels."""
    cubin, registers, stack, name = _extract(library, kernel.pattern)
    code = _function(sass.disassemble(cubin), name)
    _, loops = sass.instructions_and_loops(code)
    loop = sass.main_loop(loops)
    if loop is None:
        raise LookupError(f"{name} has no loop")
    loads = 2 * (kernel.block_m if kernel.owns_keys else kernel.block_n) * 128 * 2
    return count_loop(loop, 90, kernel.warps, (registers, kernel.shared, stack), step_bytes=loads)


def _extract(library, pattern):
    """(the file of machine code that holds a function, its registers, its stack, its name)."""
    usage = _run("--dump-resource-usage", "-arch", "sm_90", library)
    names = [line.split(":")[1].strip() for line in _run("--list-elf", library).splitlines() if ".sm_90.cubin" in line]
    for part, name in zip(usage.split("Fatbin elf code:")[1:], names, strict=True):
        found = re.search(rf"Function (\w*{pattern}\w*):\s+REG:(\d+) STACK:(\d+)", part)
        if found:
            return _cubin(library, name), int(found[2]), int(found[3]), found[1]
    raise LookupError(f"{library} holds no kernel {pattern} for sm_90")


def _cubin(library, name):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", name, library], check=True, capture_output=True, cwd=folder)
        return (Path(folder) / name).read_bytes()


def _function(code, name):
    """The lines of one function of a disassembly."""
    start = code.index(f"\n.text.{name}:")
    end = code.find("\n//----", start)
    return code[start : end if end > 0 else None]


def _run(*arguments):
    return subprocess.run([TOOLS / "cuobjdump", *arguments], check=True, capture_output=True, text=True).stdout
