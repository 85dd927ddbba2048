"""What the launchers of every op share. Needs torch only."""

from __future__ import annotations

import torch

PRECISION = "ieee"
"""How kernels multiply fp32: exactly. TF32 would round inputs to 10 bits; 16-bit inputs are not affected."""


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with stride 1 along its last dimension, as kernels read it: x itself, or a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def architecture(major: int, minor: int) -> int:
    """Which of the tuned architectures (80, 90, 100, 120) a compute capability takes its tiles from.

    8.6 and 8.9 have the small shared memory of 12.0.
    """
    if major == 8:
        return 80 if minor in (0, 7) else 120
    return {9: 90, 10: 100, 11: 100}.get(major, 120)
