"""What the launchers of every op share. Needs torch only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

PRECISION = "ieee"
"""How kernels multiply fp32: exactly. TF32 would round inputs to 10 bits; 16-bit inputs are not affected."""


def on_device(launcher: Launcher, at: int = 0) -> Launcher:
    """The launcher, run with its tensor's GPU as the current one: Triton launches on the current device's stream.

    at: the positional argument that is a tensor. With a model on cuda:1 while cuda:0 is current, an unguarded kernel would
    run on cuda:0 and read memory that is not its own. Where the device is current already, two integers are compared.
    """

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        device = args[at].get_device()  # -1 on a CPU, where kernels are interpreted
        if device < 0 or device == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return cast(Launcher, launch)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with stride 1 along its last dimension, as kernels read it: x itself, or a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up: Triton's function of this name, which costs a launch's host time twenty times as much."""
    return -(-x // y)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1; also for Triton's of this name."""
    return 1 << (n - 1).bit_length()


def architecture(major: int, minor: int) -> int:
    """Which of the tuned architectures (80, 90, 100, 120) a compute capability takes its tiles from.

    8.6 and 8.9 have the small shared memory of 12.0.
    """
    if major == 8:
        return 80 if minor in (0, 7) else 120
    return {9: 90, 10: 100, 11: 100}.get(major, 120)
