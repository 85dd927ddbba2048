"""Which path an op takes: its Triton kernels or its PyTorch reference."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch

_forced = False


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. It does not exist for Windows and macOS; CUDA on Windows takes the references."""
    return importlib.util.find_spec("triton") is not None


def takes_triton(x: torch.Tensor) -> bool:
    """True on CUDA with Triton, except for fp64: the kernels compute in fp32, which is not enough for it."""
    return (x.is_cuda or _forced) and x.dtype != torch.float64 and has_triton()


@contextlib.contextmanager
def triton_everywhere() -> Iterator[None]:
    """Inside, tensors on the CPU take the Triton kernels too.

    For tests in a process where Triton interprets its kernels (TRITON_INTERPRET=1); compiled kernels cannot run there.
    """
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
