"""Products of FP8 rows: on the tensor cores of a GPU that has them, or the same numbers in fp32."""

from __future__ import annotations

import functools

import torch

from l2v_kernels.fp8.reference import scaled_product_reference

CAPABILITY = (8, 9)
"""The least compute capability whose tensor cores multiply e4m3."""


def obstacle(device: torch.device) -> str | None:
    """Why this device does not multiply FP8, as the rest of a sentence; None where it does."""
    if device.type != "cuda":
        return f"there is no GPU, and FP8 needs one from sm_{CAPABILITY[0]}{CAPABILITY[1]}"
    return _cuda_obstacle(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_obstacle(index: int) -> str | None:
    name = torch.cuda.get_device_name(index)
    if torch.version.cuda is None:
        return f"{name} is no NVIDIA GPU, and FP8 needs one from sm_{CAPABILITY[0]}{CAPABILITY[1]}"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < CAPABILITY:
        return f"{name} is sm_{major}{minor}, and FP8 needs sm_{CAPABILITY[0]}{CAPABILITY[1]} or later"
    return None


def scaled_product(
    q_TK: torch.Tensor,
    scale_T: torch.Tensor,
    w_NK: torch.Tensor,
    scale_N: torch.Tensor | None,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    emulate: bool,
) -> torch.Tensor:
    """y [T, N] = (q * scale_T) (w * scale_N)^T + bias, summed in fp32 and rounded to dtype once.

    q and w are e4m3 and contiguous, as the tensor cores of sm_89 and sm_90 take FP8: K along memory in both. scale_N of
    None is 1. emulate: `scaled_product_reference`, on any device.
    """
    if emulate:
        return scaled_product_reference(q_TK, scale_T, w_NK, scale_N, bias_N, dtype)
    if q_TK.numel() == 0 or w_NK.numel() == 0:
        return scaled_product_reference(q_TK, scale_T, w_NK, scale_N, bias_N, dtype)
    if scale_N is None:
        scale_N = _ones(len(w_NK), scale_T.device)
    # Fast accumulation keeps about 14 bits of a sum; over a contraction of 14,336 that is an error of its own.
    return torch._scaled_mm(
        q_TK,
        w_NK.t(),
        scale_a=scale_T[:, None],
        scale_b=scale_N[None],
        bias=bias_N,
        out_dtype=dtype,
        use_fast_accum=False,
    )


@functools.lru_cache(maxsize=16)
def _ones(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, device=device)
