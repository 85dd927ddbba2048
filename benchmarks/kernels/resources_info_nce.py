"""Registers, shared memory and spills of every kernel of InfoNCE, without a GPU.

python -m benchmarks.kernels.resources_info_nce                the table for docs/info-nce.md
python -m benchmarks.kernels.resources_info_nce --arch 90      a part of it
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.kernels.aot import MATRIX_INSTRUCTION, Usage, build, print_usage
from l2v_kernels.info_nce import kernel_elementwise, kernel_fused
from l2v_kernels.info_nce.config import ARCHITECTURES, GROUP, Config, elementwise, fused

KERNELS = {
    "statistics": kernel_elementwise.statistics_kernel,
    "coefficients": kernel_elementwise.coefficients_kernel,
    "fused statistics": kernel_fused.fused_statistics_kernel,
    "fused coefficients": kernel_fused.fused_coefficients_kernel,
}
_PLAIN = {"IDS": 0, "OWN": False, "RESTRICTED": False, "LIMIT": False, "KEEP": True, "MINUS": True, "PAIR": True}
_OTHER_ROWS = {"KEEP": False, "MINUS": False, "PAIR": False, "OWN": True}
OPTIONS = {
    "none": {},
    "ids": {"IDS": 1},
    "ids, doc_to_doc": {"IDS": 1, **_OTHER_ROWS},
    "all": {"IDS": 2, "RESTRICTED": True, "LIMIT": True},
    "all, doc_to_doc": {"IDS": 2, "RESTRICTED": True, "LIMIT": True, **_OTHER_ROWS},
}
"""What a call's options make of a kernel."""
_INT64 = {"target_ptr", "row_ids_ptr", "column_ids_ptr", "owners_ptr"}


@dataclass(frozen=True)
class Case:
    """One build of one kernel of InfoNCE."""

    kernel: str
    arch: int
    options: str = "ids"
    prefixes: int = 1
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"

    @property
    def flags(self) -> dict[str, object]:
        """The constexpr arguments that the options decide."""
        flags = _PLAIN | OPTIONS[self.options]
        return flags | {"HIDE": bool(flags["IDS"] or flags["OWN"] or flags["RESTRICTED"])}

    @property
    def config(self) -> Config:
        """What a launch of this case would take."""
        second = self.kernel.endswith("coefficients")
        if not self.kernel.startswith("fused"):
            return elementwise(self.prefixes)[second]
        flags = self.flags
        heavy = flags["LIMIT"] or flags["RESTRICTED"] or flags["IDS"] > 1
        itemsize = 4 if self.dtype == "fp32" else 2
        return fused(self.arch, itemsize, self.prefixes, heavy)[second]

    @property
    def matrix(self) -> str | None:
        """The tensor-core instruction this build must have; None where it has no matmul, or an exact one."""
        if not self.kernel.startswith("fused") or self.dtype == "fp32":
            return None
        return "HMMA" if self.config.block_rows < 64 else MATRIX_INSTRUCTION[self.arch]

    def build(self, disassemble: bool = True) -> Usage:
        """Raises: whatever Triton or ptxas raise."""
        kernel, config = KERNELS[self.kernel], self.config
        meta = config.meta(fused=self.kernel.startswith("fused"))
        num_warps, num_stages = meta.pop("num_warps"), meta.pop("num_stages")
        constants = self.flags | meta
        constants |= {"P": self.prefixes, "PREFIXES": 1 << (self.prefixes - 1).bit_length(), "GROUP": GROUP}
        constants |= {"ALIGN": 16, "EVEN": True, "PRECISION": "ieee" if self.dtype == "fp32" else "tf32"}
        constants = {p.name: constants[p.name] for p in kernel.params if p.is_constexpr}
        signature = {p.name: self._type(p.name) for p in kernel.params if not p.is_constexpr}
        return build(kernel, signature, constants, self.arch, num_warps, num_stages, disassemble)

    def _type(self, name: str) -> str:
        if name in ("x_ptr", "y_ptr", "out_ptr"):
            return "*" + self.dtype
        if name in _INT64:
            return "*i64"
        special = {"restricted_ptr": "*u8", "bounds_ptr": "*i32"}
        return special.get(name, "*fp32" if name.endswith("_ptr") else "i32")


def rows(options: argparse.Namespace) -> Iterator[tuple[tuple, Case]]:
    """The cases that were asked for, with their cells of the table."""
    for kernel, arch, chosen, prefixes in itertools.product(
        options.kernel, options.arch, options.options, options.prefixes
    ):
        case = Case(kernel, arch, chosen, prefixes)
        config = case.config
        tile = f"{config.block_rows} x {config.block_columns}" + (f" x {config.block_e}" if config.block_e else "")
        yield (kernel, chosen, prefixes, arch, tile, config.num_warps, config.num_stages), case


def main(argv: list[str] | None = None) -> int:
    """Prints a Markdown table; the exit code is 1 if a build may not ship."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.resources_info_nce", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", default=tuple(KERNELS), choices=tuple(KERNELS))
    parser.add_argument("--options", nargs="+", default=("none", "ids", "all"), choices=tuple(OPTIONS))
    parser.add_argument("--prefixes", type=int, nargs="+", default=(1, 6))
    options = parser.parse_args(argv)
    head = ("kernel", "options", "prefixes", "sm", "tile", "warps", "stages")
    return bool(print_usage(head, rows(options), no_unit="none"))


if __name__ == "__main__":
    sys.exit(main())
