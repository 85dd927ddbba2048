"""Which path an op takes: its Triton kernel or its PyTorch reference."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch

_forced = False


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. There is none for Windows and macOS; CUDA on Windows takes the references."""
    return importlib.util.find_spec("triton") is not None


def takes_triton(x: torch.Tensor) -> bool:
    """True on CUDA with Triton, but for fp64: the kernels compute in fp32, too little for it."""
    return (x.is_cuda or _forced) and x.dtype != torch.float64 and has_triton()


@contextlib.contextmanager
def triton_everywhere() -> Iterator[None]:
    """Tensors on the CPU take the Triton kernels too: for tests in a process where Triton interprets them
    (TRITON_INTERPRET=1); a compiled kernel cannot run there."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
