"""Matmuls of FP8 rows: on the tensor cores of a GPU that has them, or the same numbers in fp32."""

from __future__ import annotations

import functools

import torch

from l2v_kernels.fp8.reference import scaled_matmul_reference

CAPABILITY = (8, 9)
"""The lowest compute capability whose tensor cores multiply e4m3."""


def obstacle(device: torch.device) -> str | None:
    """Why this device cannot multiply FP8, as a clause for a message; None where it can."""
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


def scaled_matmul(
    q_TE: torch.Tensor,
    scale_T: torch.Tensor,
    w_OE: torch.Tensor,
    scale_O: torch.Tensor | None,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    emulate: bool,
) -> torch.Tensor:
    """y [T, O] = (q * scale_T) (w * scale_O)^T + bias, summed in fp32 and rounded to dtype once.

    Args:
        q_TE, w_OE: e4m3, contiguous: tensor cores of sm_89 and sm_90 read FP8 with the contracted side E along memory.
        scale_T: fp32 [T].
        scale_O: fp32 [O]; None is 1.
        bias_O: [O] in dtype, or None.
        dtype: of the result.
        emulate: `scaled_matmul_reference`, on any device.
    """
    if emulate:
        return scaled_matmul_reference(q_TE, scale_T, w_OE, scale_O, bias_O, dtype)
    if q_TE.numel() == 0 or w_OE.numel() == 0:
        return scaled_matmul_reference(q_TE, scale_T, w_OE, scale_O, bias_O, dtype)
    if scale_O is None:
        scale_O = _ones(len(w_OE), scale_T.device)
    # Fast accumulation keeps about 14 bits of a sum, which adds an error of its own over a contraction of 14,336.
    return torch._scaled_mm(
        q_TE,
        w_OE.t(),
        scale_a=scale_T[:, None],
        scale_b=scale_O[None],
        bias=bias_O,
        out_dtype=dtype,
        use_fast_accum=False,
    )


@functools.lru_cache(maxsize=16)
def _ones(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, device=device)
