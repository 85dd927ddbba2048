"""Rotary position embedding as Triton kernels. Bound by memory: they read x once and write it once."""

import torch
import triton
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import PRECISION, cdiv, on_device, power_of_2, unit_stride

CONFIG = {"BLOCK_ROWS": 32, "num_warps": 4}
"""Rows (token, head) a program: 32 rows of 128 columns are two loads of 16 bytes a thread for each half of the columns."""


@jit(do_not_specialize=["n_rows"])
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


HEADS_CONFIG = {"BLOCK_T": 32, "num_warps": 4, "num_stages": 1}
"""32 tokens of a head of 128 columns are two loads of 16 bytes a thread for each half, all before anything is written."""


@triton.jit
def _share(xa, b_ptr, row, r, in_half, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """xa B^T of the outputs from `row`, one a column of the half."""
    b = tl.load(
        b_ptr + row.to(tl.int64)[None, :] * RANK + r[:, None], mask=(r < RANK)[:, None] & in_half[None, :], other=0.0
    )
    return tl.dot(xa, b, input_precision=PRECISION)


@jit(do_not_specialize=["n_tokens"])
def heads_kernel(
    x_ptr,
    xa_ptr,
    b_ptr,
    cos_ptr,
    sin_ptr,
    n_tokens,
    stride_x,
    stride_xa,
    stride_cos,
    stride_sin,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """x [T, (H + 2 K) D] += the adapters' xa B^T, then queries and keys rotated, all in place and rounded once.

    Program (i, j) computes head j of token block i.
    """
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column, r = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_R)
    in_pack, in_half = token < n_tokens, column < HALF
    mask = in_pack[:, None] & in_half[None, :]
    x_ptr += (token * stride_x)[:, None] + (head * (2 * HALF) + column)[None, :]
    x1 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    adapter = (head >= QUERY_HEADS).to(tl.int32) + (head >= QUERY_HEADS + KEY_HEADS).to(tl.int32)
    xa = tl.load(
        xa_ptr + (token * stride_xa)[:, None] + (adapter * RANK + r)[None, :],
        mask=in_pack[:, None] & (r < RANK)[None, :],
        other=0.0,
    )
    row = head * (2 * HALF) + column
    x1 += _share(xa, b_ptr, row, r, in_half, RANK, PRECISION)
    x2 += _share(xa, b_ptr, row + HALF, r, in_half, RANK, PRECISION)
    y1, y2 = x1, x2
    if head < QUERY_HEADS + KEY_HEADS:
        of_cos = cos_ptr + (token * stride_cos)[:, None] + column[None, :]
        of_sin = sin_ptr + (token * stride_sin)[:, None] + column[None, :]
        cos1 = tl.load(of_cos, mask=mask, other=0.0).to(tl.float32)
        cos2 = tl.load(of_cos + HALF, mask=mask, other=0.0).to(tl.float32)
        sin1 = tl.load(of_sin, mask=mask, other=0.0).to(tl.float32)
        sin2 = tl.load(of_sin + HALF, mask=mask, other=0.0).to(tl.float32)
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    # The matmuls move elements between threads: without a barrier, one could overwrite what another has yet to read.
    tl.debug_barrier()
    tl.store(x_ptr, y1.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(x_ptr + HALF, y2.to(x_ptr.dtype.element_ty), mask=mask)


@on_device
def launch_heads(
    qkv_TN: torch.Tensor,
    xa_TR: torch.Tensor,
    b_NR: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    heads: tuple[int, int],
) -> None:
    """Writes into qkv, of stride 1 along N. Arguments as in `op.add_and_rotate`."""
    (T, D), R = cos_TD.shape, b_NR.shape[1]
    if T == 0:
        return
    xa_TR, cos_TD, sin_TD = unit_stride(xa_TR), unit_stride(cos_TD), unit_stride(sin_TD)
    heads_kernel[(cdiv(T, HEADS_CONFIG["BLOCK_T"]), heads[0] + 2 * heads[1])](
        qkv_TN,
        xa_TR,
        b_NR.contiguous(),
        cos_TD,
        sin_TD,
        T,
        qkv_TN.stride(0),
        xa_TR.stride(0),
        cos_TD.stride(0),
        sin_TD.stride(0),
        QUERY_HEADS=heads[0],
        KEY_HEADS=heads[1],
        HALF=D // 2,
        BLOCK_HALF=power_of_2(D // 2),
        RANK=R,
        BLOCK_R=max(16, power_of_2(R)),
        PRECISION=PRECISION,
        **HEADS_CONFIG,
    )


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
    rope_kernel[(cdiv(T * H, CONFIG["BLOCK_ROWS"]),)](
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
        BLOCK_HALF=power_of_2(D // 2),
        INVERSE=inverse,
        **CONFIG,
    )
    return y_THD if target is y_THD else y_THD.copy_(target)
