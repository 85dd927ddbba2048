"""Quantising rows to FP8: the Triton kernels where they run, the reference elsewhere. There is no gradient."""

from __future__ import annotations

import torch

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.fp8 import reference
from l2v_kernels.fp8.matmul import obstacle


def quantize_rows(x_TE: torch.Tensor, factors_E: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x * factors as q * scale, with q in e4m3 and one scale a row.

    The scale is the smallest power of two that brings the row's largest magnitude down to 448, the largest of e4m3. So
    scaling rounds nothing, and each number is rounded once, to the nearest of e4m3, ties to even. No row affects another.

    Args:
        x_TE: [T, E] fp32, fp16 or bf16.
        factors_E: [E] fp32, powers of two: scales of the other operand of a matmul that contracts over E, which has one
            scale a row itself and cannot apply them.

    Returns:
        q [T, E] float8_e4m3fn, contiguous, and scale [T] fp32. A row with NaN or Inf gets the scale NaN and zeros, because
        in 8 bits it would become finite. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices are outside the above.

    Source: Micikevicius et al. 2022 (e4m3), arXiv 2209.05433; scales of powers of two: Rouhani et al. 2023 (microscaling
        formats), arXiv 2310.10537, here one for a whole row.
    """
    if x_TE.ndim != 2 or x_TE.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"quantize_rows needs x [T, E] in fp32, fp16 or bf16, got {x_TE.dtype} {tuple(x_TE.shape)}")
    if factors_E is not None and (
        factors_E.shape != x_TE.shape[1:] or factors_E.dtype != torch.float32 or factors_E.device != x_TE.device
    ):
        raise ValueError(
            f"factors must be fp32 [{x_TE.shape[1]}] on {x_TE.device}, got {factors_E.dtype} {tuple(factors_E.shape)} on "
            f"{factors_E.device}"
        )
    x_TE = x_TE.detach()
    # Before sm_89 Triton has no e4m3.
    if not takes_triton(x_TE) or (x_TE.is_cuda and obstacle(x_TE.device) is not None):
        return reference.quantize_rows_reference(x_TE, factors_E)
    from l2v_kernels.fp8.kernel import launch_quantize

    return launch_quantize(x_TE, factors_E)
