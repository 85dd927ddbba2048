"""Clocks of one step of a kernel's main loop, by pipe, and what the kernel needs of an SM."""

from dataclasses import asdict, dataclass

from benchmarks.kernels.aot import Usage
from benchmarks.resources import sass
from benchmarks.resources.machine import MACHINES

_LOADS = {"LDS": 4, "LDSM": 16, "STS": 4, "STSM": 16, "LDGSTS": 16, "SHFL": 4}
"""Bytes of shared memory a thread moves where the code does not state the width."""
_WIDTHS = {".128": 16, ".64": 8, ".U8": 1, ".U16": 2}


@dataclass(frozen=True)
class Count:
    """The main loop of one build: clocks of an SM for one step of one block."""

    arch: int
    warps: int
    registers: int
    shared: int
    stack: int
    blocks: int
    """Blocks that an SM holds at once."""
    instructions: int
    around: int
    """Instructions of a warp before and after the loop, of the loop around it where there is one."""
    pipes: dict[str, int]
    """Instructions of a warp in a step, by pipe."""
    opcodes: dict[str, int]
    tensor: float
    """Clocks that the SM's tensor cores need; 0 for a kernel without matrix instructions."""
    issue: float
    clocks: dict[str, float]
    """Clocks of the other pipes: fp32, alu, exp, shared and, where known, l2."""

    @property
    def ratio(self) -> float | None:
        """Issue slots over tensor-core clocks: below 1 the tensor cores are the limit. None without matrix instructions."""
        return self.issue / self.tensor if self.tensor else None

    def tile_ratio(self, steps: float) -> float | None:
        """`ratio` of a whole tile of so many steps, with what is issued around the loop."""
        issue = steps * self.issue + self.around * self.warps / 4
        return issue / (steps * self.tensor) if self.tensor else None

    @property
    def limit(self) -> str:
        """The pipe that takes longest in a step."""
        return max((*self.clocks.items(), ("tensor", self.tensor), ("issue", self.issue)), key=lambda x: x[1])[0]

    @property
    def bound(self) -> float:
        """Clocks of a step if all pipes overlapped perfectly."""
        return max(self.tensor, self.issue, *self.clocks.values())

    @property
    def serial(self) -> float:
        """Clocks of a step if matrix instructions and arithmetic took turns, as in a block that waits for its matmuls.

        Loads and the matrix instructions' own operands do not wait: they are fetched ahead.
        """
        return self.tensor + max(self.issue, *(self.clocks[name] for name in ("fp32", "alu", "exp")))

    def row(self) -> dict[str, object]:
        """As JSON."""
        rounded = {name: round(value, 1) for name, value in self.clocks.items()}
        ratio = None if self.ratio is None else round(self.ratio, 3)
        return asdict(self) | {
            "clocks": rounded,
            "issue_over_tensor": ratio,
            "limit": self.limit,
            "clocks_overlapped": round(self.bound, 1),
            "clocks_in_turns": round(self.serial, 1),
        }


def count(
    usage: Usage, arch: int, warps: int, step_flops: int | None = None, step_bytes: int | None = None
) -> Count | None:
    """The main loop of a build, None where it has no loop.

    step_flops: matrix FLOPs of a block in a step, for machine code that does not state them (UTCHMMA of sm_100).
    step_bytes: what a block reads from global memory in a step, if known.

    Raises:
        subprocess.CalledProcessError: nvdisasm does not know the machine code.
        ValueError: the machine code does not state the FLOPs, and neither does step_flops.
    """
    _, loops = sass.instructions_and_loops(sass.disassemble(usage.cubin))
    loop = sass.main_loop(loops)
    if loop is None:
        return None
    return count_loop(loop, arch, warps, (usage.registers, usage.shared, usage.stack), step_flops, step_bytes)


def count_loop(
    loop: sass.Loop,
    arch: int,
    warps: int,
    used: tuple[int, int, int],
    step_flops: int | None = None,
    step_bytes: int | None = None,
) -> Count:
    """As `count`; used: registers a thread, bytes of shared memory a block, bytes of stack a thread."""
    machine, pipes = MACHINES[arch], loop.pipes
    flops = loop.warp_flops * warps
    if "tensor" in pipes and not flops:
        if not step_flops:
            raise ValueError("the machine code does not state the shapes of its matrix instructions: give step_flops")
        flops = step_flops
    scale = 1.0
    if arch == 90 and any(sass.opcode(x) == "HMMA" for x in loop.instructions):
        scale = machine.warp_matrix_share
    lanes = 32 * warps
    l2 = {"l2": step_bytes / machine.l2_bytes} if step_bytes and machine.l2_bytes else {}
    registers, shared, stack = used
    return Count(
        arch=arch,
        warps=warps,
        registers=registers,
        shared=shared,
        stack=stack,
        blocks=machine.blocks_per_sm(registers, shared, warps),
        instructions=len(loop.instructions),
        around=loop.around,
        pipes=pipes,
        opcodes=loop.opcodes,
        tensor=flops / (machine.tensor_flops * scale),
        issue=len(loop.instructions) * warps / 4,
        clocks={
            "fp32": pipes.get("fp32", 0) * lanes / machine.fp32,
            "alu": pipes.get("alu", 0) * lanes / machine.alu,
            "exp": pipes.get("exp", 0) * lanes / machine.exp,
            "shared": sum(map(_shared_bytes, loop.instructions)) * warps / machine.shared_bytes,
            **l2,
        },
    )


def _shared_bytes(instruction):
    """Bytes a warp moves through shared memory; of a warpgroup's matrix instruction its share of the operands read there."""
    name = sass.opcode(instruction)
    if name == "HGMMA":
        m, n, k = sass.warpgroup_shape(instruction)
        rows = n if sass.a_in_registers(instruction) else m + n
        return rows * k * 2 // 4
    if name == "LDSM":
        return 32 * 16 if ".4" in instruction else 32 * 8 if ".2" in instruction else 32 * 4
    if name not in _LOADS:
        return 0
    width = next((bytes_ for mark, bytes_ in _WIDTHS.items() if mark in instruction.split()[0]), _LOADS[name])
    return 32 * (4 if name == "LDGSTS" and width == 16 and ".128" not in instruction else width)
