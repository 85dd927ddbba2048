"""Reads NVIDIA machine code as nvdisasm prints it: the loops of a kernel, and what each of their instructions occupies.

An instruction is issued once a warp, and each of an SM's four schedulers issues at most one a clock. It then occupies a pipe,
by the throughput table of the CUDA programming guide ("Arithmetic Instructions"); what the guide does not list (shared
memory, shuffles, matrix instructions) takes the widths of `machine.py`.
"""

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.aot import TOOLS

PIPES: tuple[tuple[str, str], ...] = (
    ("tensor", r"HGMMA|HMMA|QGMMA|IGMMA|IMMA|QMMA|OMMA|UTC\w*MMA"),
    ("exp", r"MUFU"),
    ("shared", r"LDS|LDSM|STS|STSM|LDGSTS|SHFL|LDTM|STTM|ATOMS|UTMA\w+|UBLKCP|LDTM|SYNCS"),
    ("global", r"LDG|STG|RED|ATOM|ATOMG|LD|ST|LDL|STL|LDC|LDCU|ULDC"),
    ("fp32", r"FFMA|FFMA2|FADD|FADD2|FMUL|FMUL2|IMAD|HFMA2|HADD2|HMUL2|FFMA32I|FADD32I|FMUL32I"),
    (
        "alu",
        r"FMNMX\d?|FSETP|FSEL|FSET|FCHK|F2FP|F2F|I2F|I2FP|F2I|IADD|IADD3|IADD32I|VIADD|VIADDMNMX|LOP3|LEA|SHF|"
        r"SHL|SHR|PRMT|SEL|MOV|ISETP|PLOP3|VIMNMX\d?|IMNMX|IABS|POPC|FLO|BREV|SGXT|BMSK|P2R|R2P|CS2R|S2R|VOTE\w*|HSET2|HMNMX2|LOP",
    ),
    ("uniform", r"U[A-Z0-9]+|R2UR|S2UR|REDUX|CREDUX"),
    (
        "control",
        r"BAR|BRA|BSSY|BSYNC|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|NOP|EXIT|CALL|RET|FENCE|MEMBAR|ERRBAR|CCTL|YIELD|"
        r"NANOSLEEP|ELECT|ACQBULK|JMP|BMOV|ARRIVES|BREAK",
    ),
)
"""Pipes and the opcodes that occupy them, first match wins (a matrix instruction is named UTC... but is no uniform one)."""

_COMPILED = tuple((pipe, re.compile(rf"(?:{pattern})$")) for pipe, pattern in PIPES)
_ADDRESS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"\s*(\.L_[\w.]+):")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*?`\(([\w.$]+)\)")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_WARPGROUP_SHAPE = re.compile(r"[A-Z]GMMA(?:\.SP)?\.(\d+)x(\d+)x(\d+)")
_WARP_SHAPE = re.compile(r"^[A-Z]MMA(?:\.SP)?\.(16816|1688|16832|16864|8816)")
_WARP_SIZES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "16864": (16, 8, 64), "8816": (8, 8, 16)}
_SPIN = 12


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions in order, without their guards."""

    instructions: tuple[str, ...]
    around: int = 0
    """Instructions of the loop around it, or of the kernel where there is none, that it does not hold itself."""

    @property
    def pipes(self) -> dict[str, int]:
        """Instructions by pipe, "other" for opcodes that `PIPES` does not name."""
        return dict(collections.Counter(pipe_of(x) for x in self.instructions))

    @property
    def opcodes(self) -> dict[str, int]:
        """Instructions by opcode, modifiers dropped."""
        return dict(collections.Counter(opcode(x) for x in self.instructions))

    @property
    def warp_flops(self) -> int:
        """FLOPs of the matrix instructions of one warp, an instruction of a warpgroup shared among its four warps.

        0 where the code does not state the shape: UTCHMMA of sm_100 takes it from a descriptor.
        """
        return sum(matrix_flops(x) for x in self.instructions)


def opcode(instruction: str) -> str:
    """HGMMA of "HGMMA.64x64x16.F32.BF16 R88, ..."."""
    return instruction.split(maxsplit=1)[0].split(".")[0]


def pipe_of(instruction: str) -> str:
    """The pipe that an instruction without its guard occupies."""
    name = opcode(instruction)
    if name == "IMAD" and ".MOV" in instruction:
        return "fp32"
    return next((pipe for pipe, pattern in _COMPILED if pattern.match(name)), "other")


def matrix_flops(instruction: str) -> int:
    """Multiplications and additions of one warp's share of a matrix instruction; 0 for any other."""
    wide = _WARPGROUP_SHAPE.match(instruction)
    if wide:
        m, n, k = map(int, wide.groups())
        return 2 * m * n * k // 4
    narrow = _WARP_SHAPE.match(instruction)
    if narrow:
        m, n, k = _WARP_SIZES[narrow[1]]
        return 2 * m * n * k
    return 0


def warpgroup_shape(instruction: str) -> tuple[int, int, int]:
    """m, n and k of a warpgroup's matrix instruction.

    Raises:
        ValueError: it is none.
    """
    found = _WARPGROUP_SHAPE.match(instruction)
    if not found:
        raise ValueError(f"not a warpgroup's matrix instruction: {instruction}")
    m, n, k = map(int, found.groups())
    return m, n, k


def a_in_registers(instruction: str) -> bool:
    """Whether a warpgroup's matrix instruction takes its first factor from registers and not from shared memory."""
    operands = instruction.split(maxsplit=1)[1].split(",")
    return operands[1].strip().startswith("R") and operands[1].strip() != "RZ"


def instructions_and_loops(code: str) -> tuple[list[str], list[Loop]]:
    """All instructions of a disassembly, and its innermost loops in the order of the code.

    A loop is what lies between a label and a later branch back to it, unless the program ends in between: code that waits out
    of line, behind the end, comes back by such a branch. Loops of a few instructions wait for a barrier and are not
    counted as loops: they may lie inside of the one that works.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        label, found = _LABEL.match(line), _ADDRESS.search(line)
        if label:
            labels[label[1]] = len(lines)
        elif found:
            lines.append(found[1].strip())
    spans = set()
    for at, line in enumerate(lines):
        branch = _BRANCH.search(line)
        low = labels.get(branch[1], at) if branch else at
        if low < at and "EXIT" not in lines[low:at]:
            spans.add((low, at))
    spans = {(low, high) for low, high in spans if high - low >= _SPIN}
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    plain = [_GUARD.sub("", line) for line in lines]
    loops = []
    for low, high in sorted(inner):
        outer = [b - a for a, b in spans if a <= low and high <= b and (a, b) != (low, high)]
        loops.append(Loop(tuple(plain[low : high + 1]), min(outer, default=len(plain)) - (high - low)))
    return plain, loops


def main_loop(loops: list[Loop]) -> Loop | None:
    """Where the kernel spends its time on long inputs: the loop with the most matrix FLOPs, of several the one with the fewest
    instructions, so the one without masks; without any such, the longest loop. None for a kernel without a loop."""
    matrix = [loop for loop in loops if "tensor" in loop.pipes]
    if matrix:
        return min(matrix, key=lambda loop: (-(loop.warp_flops or loop.pipes["tensor"]), len(loop.instructions)))
    return max(loops, key=lambda loop: len(loop.instructions), default=None)


def disassemble(cubin: bytes) -> str:
    """The text of nvdisasm.

    Raises:
        subprocess.CalledProcessError: nvdisasm does not know the file.
    """
    return _tool("nvdisasm", cubin, "-c")


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only kernel in a file, as cuobjdump prints them: a thread's, SHARED a block's.

    Raises:
        subprocess.CalledProcessError: cuobjdump does not know the file.
    """
    usage = _tool("cuobjdump", cubin, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def _tool(name, cubin, *arguments):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([TOOLS / name, *arguments, file], check=True, capture_output=True, text=True).stdout
