"""FP8: rows of numbers in 8 bits with one scale each, and frozen linears that multiply in them."""

from __future__ import annotations

import torch

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.fp8 import reference
from l2v_kernels.fp8.linears import ALIGN, Fp8Linears, Fp8Weight
from l2v_kernels.fp8.product import CAPABILITY, obstacle

__all__ = ["ALIGN", "CAPABILITY", "Fp8Linears", "Fp8Weight", "obstacle", "quantize_rows"]


def quantize_rows(x_TK: torch.Tensor, factors_K: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x * factors as q * scale, with q in e4m3 and one scale a row.

    The scale is the smallest power of two that brings the row's largest number down to 448, the largest of e4m3. So scaling
    rounds nothing, and each number is rounded once, to the nearest of e4m3, ties to even. A row sees no other row.

    Args:
        x_TK: [T, K] fp32, fp16 or bf16.
        factors_K: [K] fp32, powers of two that belong to the other operand of a product over K, which has one scale a row
            of its own and cannot carry them.
    Returns: q [T, K] float8_e4m3fn, contiguous, and scale [T] fp32. A row that holds an infinity or NaN gets the scale NaN
        and zeros, for 8 bits would make it finite. Not differentiable.
    Errors: ValueError on other shapes, dtypes or devices.
    Source: Micikevicius et al. 2022 (e4m3), arXiv 2209.05433; scales of powers of two: Rouhani et al. 2023 (microscaling
        formats), arXiv 2310.10537, here one for a whole row.
    """
    if x_TK.ndim != 2 or x_TK.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"quantize_rows needs x [T, K] in fp32, fp16 or bf16, got {x_TK.dtype} {tuple(x_TK.shape)}")
    if factors_K is not None and (
        factors_K.shape != x_TK.shape[1:] or factors_K.dtype != torch.float32 or factors_K.device != x_TK.device
    ):
        raise ValueError(
            f"factors must be fp32 [{x_TK.shape[1]}] on {x_TK.device}, got {factors_K.dtype} {tuple(factors_K.shape)} on "
            f"{factors_K.device}"
        )
    x_TK = x_TK.detach()
    # Before sm_89 Triton has no e4m3.
    if not takes_triton(x_TK) or (x_TK.is_cuda and obstacle(x_TK.device)):
        return reference.quantize_rows_reference(x_TK, factors_K)
    from l2v_kernels.fp8.kernel import launch_quantize

    return launch_quantize(x_TK, factors_K)
