"""Ahead-of-time builds of Triton kernels, for a GPU that this machine need not have, and what the machine code uses."""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory one block may use (CUDA programming guide, compute capabilities)."""

MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The tensor-core instruction of each architecture, as nvdisasm writes it. Below 64 rows sm_90 and sm_100 use HMMA."""


@dataclass(frozen=True)
class Usage:
    """What one build uses: registers a thread, bytes of shared memory a block, bytes of stack (spills) a thread."""

    registers: int
    shared: int
    stack: int
    matrix: frozenset[str]
    """Which of HMMA, HGMMA and UTCHMMA the machine code has."""
    ptx: str
    cubin: bytes = b""

    def problems(self, capability: int, matrix: str | None = None) -> list[str]:
        """Why this build must not ship, empty where it may: spills, too much shared memory, no tensor core."""
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes a thread")
        if self.shared > SHARED_LIMIT[capability]:
            found.append(f"{self.shared} bytes of shared memory, over {SHARED_LIMIT[capability]}")
        if matrix and matrix not in self.matrix:
            found.append(f"no {matrix}, only {sorted(self.matrix)}")
        return found


class Case(Protocol):
    """One build of one kernel: for an architecture, with the tensor-core instruction that it must have, if any."""

    arch: int
    matrix: str | None

    def build(self) -> Usage: ...


def print_usage(head: Sequence[str], rows: Iterable[tuple[Sequence[object], Case]], no_unit: str) -> int:
    """Build every case and print a Markdown table, row by row; returns how many builds must not ship.

    head, rows: columns before those of the usage. no_unit: how to call a build without a tensor-core instruction.
    """
    columns = (*head, "registers", "shared-KB", "spills-B", "unit")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    bad = 0
    for cells, case in rows:
        used = case.build()
        bad += bool(used.problems(case.arch, case.matrix))
        unit = ", ".join(sorted(used.matrix)) or no_unit
        row = (*cells, used.registers, f"{used.shared / 1024:.0f}", used.stack, unit)
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    return bad


def available() -> bool:
    """Whether this Triton bundles NVIDIA's tools."""
    return (TOOLS / "cuobjdump").exists() and (TOOLS / "nvdisasm").exists()


def build(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
    num_warps: int,
    num_stages: int = 3,
    disassemble: bool = True,
) -> Usage:
    """Compiles as a launch would: what the kernel specialises is divisible by 16.

    Args: signature maps arguments to Triton types ("*bf16", "i32"), constants the constexpr ones to values.
    Raises: whatever Triton or ptxas raise.
    """
    types = {name: signature.get(name, "constexpr") for name in (p.name for p in kernel.params)}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    aligned = [
        (i,)
        for i, (name, kind) in enumerate(types.items())
        if kind not in ("fp32", "constexpr") and not kind.startswith("tensordesc") and name not in free
    ]
    source = ASTSource(
        kernel, signature=types, constexprs=constants, attrs={i: [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        code = _run("nvdisasm", "-c", cubin) if disassemble else ""
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Usage(
        registers=numbers["REG"],
        shared=compiled.metadata.shared,
        stack=numbers["STACK"] + numbers["LOCAL"],
        matrix=frozenset(re.findall(r"\b(UTCHMMA|HGMMA|HMMA)\b", code)),
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
    )


def _run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
