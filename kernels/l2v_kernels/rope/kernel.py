"""Rotary position embedding as a Triton kernel. Bound by memory: it reads x once and writes it once."""

import torch
import triton
import triton.language as tl

from l2v_kernels.launching import on_device, unit_stride

CONFIG = {"BLOCK_ROWS": 32, "num_warps": 4}
"""Rows (token, head) a program: 32 rows of 128 columns are two loads of 16 bytes a thread for each half of the columns."""


@triton.jit(do_not_specialize=["n_rows"])
def rope_kernel(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    n_rows,
    stride_xt,
    stride_xh,
    stride_yt,
    stride_yh,
    stride_cos,
    stride_sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """(y1, y2) = (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), or, INVERSE, (x1 cos1 + x2 sin2, x2 cos2 - x1 sin1).

    Rows are heads within tokens: neighbouring rows share cos and sin, which then come from the cache. A program reads both
    halves before it writes either, so x and y may be one tensor.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head = row // HEADS, row % HEADS
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (row < n_rows)[:, None] & (columns < HALF)
    x_ptr += (token * stride_xt + head * stride_xh)[:, None] + columns
    y_ptr += (token * stride_yt + head * stride_yh)[:, None] + columns
    cos_ptr += (token * stride_cos)[:, None] + columns
    sin_ptr += (token * stride_sin)[:, None] + columns
    x1 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    cos1 = tl.load(cos_ptr, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    tl.store(y_ptr, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)


@on_device
def launch(
    x_THD: torch.Tensor, y_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, inverse: bool
) -> torch.Tensor:
    """Writes the rotated x into y [T, H, D], which may be x, and returns it. Arguments as in `op.rotate`."""
    T, H, D = x_THD.shape
    if x_THD.numel() == 0:
        return y_THD
    source = unit_stride(x_THD)
    target = y_THD if y_THD.stride(2) == 1 else torch.empty_like(source, memory_format=torch.contiguous_format)
    cos_TD, sin_TD = unit_stride(cos_TD), unit_stride(sin_TD)
    rope_kernel[(triton.cdiv(T * H, CONFIG["BLOCK_ROWS"]),)](
        source,
        target,
        cos_TD,
        sin_TD,
        T * H,
        *source.stride()[:2],
        *target.stride()[:2],
        cos_TD.stride(0),
        sin_TD.stride(0),
        HEADS=H,
        HALF=D // 2,
        BLOCK_HALF=triton.next_power_of_2(D // 2),
        INVERSE=inverse,
        **CONFIG,
    )
    return y_THD if target is y_THD else y_THD.copy_(target)
