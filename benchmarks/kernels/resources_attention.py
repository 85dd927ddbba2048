"""Registers, shared memory and spills of every kernel of packed attention, without a GPU.

python -m benchmarks.kernels.resources_attention                          the table for docs/attention.md
python -m benchmarks.kernels.resources_attention --arch 90 --head-dim 128  a part of it
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.kernels.aot import MATRIX_INSTRUCTION, Usage, build, print_usage
from l2v_kernels.attention.config import ARCHITECTURES, Config, Kind, default
from l2v_kernels.attention.kernel_forward import forward_kernel
from l2v_kernels.attention.kernel_key import key_gradient_kernel
from l2v_kernels.attention.kernel_query import query_gradient_kernel

KERNELS = {"forward": forward_kernel, "query": query_gradient_kernel, "key": key_gradient_kernel}
HEAD_DIMS = (64, 96, 128, 256)
_TABLES = {"start_ptr", "end_ptr", "segment_ptr", "first_block_ptr", "block_first_ptr", "block_end_ptr"}


@dataclass(frozen=True)
class Case:
    """One build of one kernel of packed attention."""

    kind: Kind
    arch: int
    head_dim: int
    dtype: str = "bf16"
    short: bool = False
    dropout: bool = False
    causal: bool = False
    window: bool = False
    softcap: bool = False
    group: int = 4
    medium: bool = False

    @property
    def config(self) -> Config:
        """What a launch of this case would take."""
        plain = not (self.dropout or self.causal or self.window or self.softcap)
        itemsize = 4 if self.dtype == "fp32" else 2
        return default(
            self.kind,
            self.arch,
            self.head_dim,
            itemsize,
            self.short,
            plain,
            self.arch >= 90,
            self.group,
            self.medium,
            self.window and self.dropout,
        )

    @property
    def matrix(self) -> str | None:
        """The tensor-core instruction this build must have; None for fp32, whose matmuls are exact."""
        if self.dtype == "fp32":
            return None
        rows = self.config.block_n if self.kind == "key" else self.config.block_m
        # The instructions of sm_90 and sm_100 take 64 rows at least; smaller tiles fall back to the older one.
        return "HMMA" if rows < 64 else MATRIX_INSTRUCTION[self.arch]

    def build(self, config: Config | None = None, disassemble: bool = True) -> Usage:
        """Raises: whatever Triton or ptxas raise."""
        kernel, config = KERNELS[self.kind], config or self.config
        signature = {p.name: _type(p.name, self.dtype) for p in kernel.params if not p.is_constexpr}
        if config.tma:
            width = block_d(self.head_dim)
            queries = f"tensordesc<{self.dtype}[{config.block_m // self.group}, {self.group}, {width}]>"
            keys = f"tensordesc<{self.dtype}[{config.block_n}, 1, {width}]>"
            described = {"q_ptr": queries, "do_ptr": queries}
            described |= dict.fromkeys(("dk_ptr", "dv_ptr") if self.kind == "key" else ("k_ptr", "v_ptr"), keys)
            if self.kind == "key" and self.group >= 4:
                described["statistics_ptr"] = f"tensordesc<fp32[1, {config.block_m // self.group}, {self.group}]>"
            signature |= {name: block for name, block in described.items() if name in signature}
        constants = {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_d(self.head_dim),
            "GROUP": self.group,
            "GROUPS_PER_KEY_HEAD": 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "SOFTCAP": self.softcap,
            "FOLD": not self.softcap,
            "DROPOUT": self.dropout,
            "PRECISION": "ieee",
            "TMA": config.tma,
        }
        constants = {p.name: constants[p.name] for p in kernel.params if p.is_constexpr}
        return build(kernel, signature, constants, self.arch, config.num_warps, config.num_stages, disassemble)


def block_d(head_dim: int) -> int:
    """The head dimension as the kernels compute with it: padded to a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _type(name, dtype):
    if name in _TABLES:
        return "*i32"
    special = {"seeds_ptr": "*i64", "lse_ptr": "*fp32", "statistics_ptr": "*fp32", "keep_scale": "fp32"}
    if name in special:
        return special[name]
    if name.endswith("_ptr"):
        return "*" + dtype
    return "fp32" if name.startswith("scale") else "i32"


def rows(options: argparse.Namespace) -> Iterator[tuple[tuple, Case]]:
    """The cases that were asked for, with their cells of the table."""
    for dtype, kind, head_dim, arch, short, dropout in itertools.product(
        options.dtype, options.kernel, options.head_dim, options.arch, (False, True), (False, True)
    ):
        case = Case(kind, arch, head_dim, dtype, short, dropout)
        config, segments = case.config, "short" if short else "long"
        cells = (kind, head_dim, dtype, segments, "yes" if dropout else "no", arch)
        yield (*cells, f"{config.block_m} x {config.block_n}", config.num_warps, config.num_stages), case


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table; the exit code is 1 if a build may not ship."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.resources_attention", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--head-dim", type=int, nargs="+", default=(64, 128, 256))
    parser.add_argument("--kernel", nargs="+", default=tuple(KERNELS), choices=tuple(KERNELS))
    parser.add_argument("--dtype", nargs="+", default=("bf16",), choices=("bf16", "fp16", "fp32"))
    options = parser.parse_args(argv)
    head = ("kernel", "D", "type", "segments", "dropout", "sm", "tile", "warps", "stages")
    return bool(print_usage(head, rows(options), no_unit="FFMA"))


if __name__ == "__main__":
    sys.exit(main())
