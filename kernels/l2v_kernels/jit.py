"""Triton's `jit` for kernels that a step launches thousands of times. Imported only where Triton is installed.

At each launch Triton works out again what a kernel would be compiled for: 21 of the 25 microseconds that a launch takes on the
host. Here the compiled kernel is looked up by a key that takes less than half of that and distinguishes at least as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

KNOWN_VERSIONS = ("3.6", "3.7")
"""Versions of Triton whose way to launch a compiled kernel was read; others launch by themselves."""


def jit(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator like `triton.jit`; in Triton's interpreter, and under a version that is not known, the same."""

    def wrap(function: Callable[..., Any]) -> Any:
        names = list(do_not_specialize)
        known = triton.__version__.rsplit(".", 1)[0] in KNOWN_VERSIONS
        if knobs.runtime.interpret or not known:
            return triton.jit(do_not_specialize=names)(function)
        return QuickKernel(function, do_not_specialize=names)

    return wrap


class QuickKernel(JITFunction):
    """A kernel whose launches after the first of their kind look nothing up but the compiled kernel."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._launches: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        """Launch it; arguments are those of `kernel[grid](*args, **constants)`. Everything unusual is left to Triton."""
        key = None
        if not (
            warmup or callable(grid) or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
        ):
            device = torch._C._cuda_getDevice()
            key = kind_of(args, device, constants)
            if key is not None and (known := self._launches.get(key)) is not None:
                compiled, rest = known
                stream = torch._C._cuda_getCurrentRawStream(device)
                x, y, z = (*grid, 1, 1)[:3]
                none = (None, None, None)  # metadata and hooks of a profiler
                compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, *none, *args, *rest)
                return compiled
        compiled = super().run(*args, grid=grid, warmup=warmup, **constants)
        if key is not None and compiled is not None:
            rest = self.params[len(args) :]
            if all(parameter.is_constexpr and parameter.name in constants for parameter in rest):
                values = tuple(constants[parameter.name] for parameter in rest)
                self._launches[key] = compiled, values
        return compiled


def kind_of(args: tuple[Any, ...], device: int, constants: dict[str, Any]) -> tuple[Any, ...] | None:
    """What decides which compiled kernel a launch takes, or more than that; None for arguments of another type than those here.

    Triton compiles for dtypes, for pointers and integers that are multiples of 16, for integers that are 1, and for the width
    of an integer. Constants are distinguished by value and type, because 1, 1.0 and True are equal.
    """
    key: list[Any] = [device]
    for value in args:
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            key.append(value.dtype)
            key.append(value.data_ptr() & 15 == 0)
        elif kind is int:
            narrow = -0x80000000 <= value <= 0x7FFFFFFF
            key.append((value & 15 == 0) + 2 * (value == 1) + 4 * narrow + 8 * (value >> 63))
        elif kind is float:
            key.append(float)
        elif kind is TensorDescriptor:
            tf32 = getattr(value, "round_f32_to_tf32", False)  # not in Triton 3.6
            key.append((value.base.dtype, *value.block_shape, value.padding, tf32))
        else:
            return None
    values = constants.values()
    return (*key, *constants, *values, *map(type, values))
