"""RMSNorm as Triton kernels. Bound by memory: a row is read once, held in registers, and written once."""

import torch
import triton
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import cdiv, on_device, power_of_2, unit_stride

TILE_ELEMENTS = 4096
"""Elements a program where rows are short. Longer rows take one program each, with more warps."""

WEIGHT_GRADIENT = {"BLOCK_ROWS": 32, "BLOCK_E": 128, "num_warps": 4}
MAX_WEIGHT_PROGRAMS = 512
"""Programs of the weight's gradient: a few for each multiprocessor of any GPU, and no more partial sums than that."""


@triton.jit
def row_offsets(row, stride_t, stride_h, HEADS: tl.constexpr):
    """Offset of row `row` of [T, HEADS, WIDTH], int64."""
    return (row // HEADS) * stride_t + (row % HEADS) * stride_h


@triton.jit
def load_factor(weight_ptr, column, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """OFFSET + weight in fp32."""
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return weight + OFFSET if OFFSET != 0.0 else weight


@jit(do_not_specialize=["n_rows", "known"])
def rms_norm_forward_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    n_rows,
    known,
    eps,
    stride_xt,
    stride_xh,
    stride_dt,
    stride_dh,
    DELTA: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """sum = x + delta (DELTA), rstd of it, y = sum * rstd * (OFFSET + weight); all contiguous.

    known (0 or 1): rstd is read, and y recomputed from it by the same two multiplications, so with the same bits. WIDTH is a
    constant: a mask that ends at a multiple of 8 then leaves accesses 16 bytes wide.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < n_rows
    column = tl.arange(0, BLOCK_E)[None, :]
    mask = in_rows[:, None] & (column < WIDTH)
    x_at = row_offsets(row, stride_xt, stride_xh, HEADS)[:, None] + column
    out_at = row[:, None] * WIDTH + column
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    weight = load_factor(weight_ptr, column, OFFSET, WIDTH)
    rstd = tl.load(rstd_ptr + row, mask=in_rows & (known != 0), other=0.0)
    if DELTA:
        delta_at = row_offsets(row, stride_dt, stride_dh, HEADS)[:, None] + column
        delta = tl.load(delta_ptr + delta_at, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + delta).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out_at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if known == 0:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
        tl.store(rstd_ptr + row, rstd, mask=in_rows)
    y = x * rstd[:, None] * weight
    tl.store(y_ptr + out_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_rows"])
def rms_norm_backward_kernel(
    dy_ptr,
    sum_ptr,
    rstd_ptr,
    weight_ptr,
    dsum_ptr,
    dx_ptr,
    n_rows,
    stride_gt,
    stride_gh,
    stride_st,
    stride_sh,
    stride_rt,
    stride_rh,
    stride_xt,
    stride_xh,
    DSUM: tl.constexpr,
    OFFSET: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dx = rstd * (g - unit * mean(g * unit)) + dsum (DSUM), g = dy * (OFFSET + weight), unit = sum * rstd.

    A program reads its rows before it writes them: dx may be dy or dsum.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < n_rows
    column = tl.arange(0, BLOCK_E)[None, :]
    mask = in_rows[:, None] & (column < WIDTH)
    dy_at = row_offsets(row, stride_gt, stride_gh, HEADS)[:, None] + column
    sum_at = row_offsets(row, stride_st, stride_sh, HEADS)[:, None] + column
    dx_at = row_offsets(row, stride_xt, stride_xh, HEADS)[:, None] + column
    rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
    weight = load_factor(weight_ptr, column, OFFSET, WIDTH)
    g = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32) * weight
    unit = tl.load(sum_ptr + sum_at, mask=mask, other=0.0).to(tl.float32) * rstd
    if DSUM:
        dsum_at = row_offsets(row, stride_rt, stride_rh, HEADS)[:, None] + column
        dsum = tl.load(dsum_ptr + dsum_at, mask=mask, other=0.0)
    dx = rstd * (g - unit * (tl.sum(g * unit, 1) / WIDTH)[:, None])
    if DSUM:
        dx += dsum.to(tl.float32)
    tl.store(dx_ptr + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_rows", "rows_per_program"])
def rms_norm_weight_gradient_kernel(
    dy_ptr,
    sum_ptr,
    rstd_ptr,
    partial_ptr,
    n_rows,
    rows_per_program,
    stride_gt,
    stride_gh,
    stride_st,
    stride_sh,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """partial fp32 [J, WIDTH]: sums of dy * sum * rstd over the rows of program i, column block j."""
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    total = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None] & (column < WIDTH)
        dy_at = row_offsets(row, stride_gt, stride_gh, HEADS)[:, None] + column
        sum_at = row_offsets(row, stride_st, stride_sh, HEADS)[:, None] + column
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]
        unit = tl.load(sum_ptr + sum_at, mask=mask, other=0.0).to(tl.float32) * rstd
        total += tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32) * unit
    at = tl.program_id(0) * WIDTH + column
    tl.store(partial_ptr + at, tl.sum(total, 0)[None, :], mask=column < WIDTH)


def config(width: int) -> dict[str, int]:
    """The tile for rows of `width` elements: several short rows, or one."""
    block = power_of_2(width)
    warps = 4 if block < 4096 else 8 if block < 16384 else 16
    return {"BLOCK_ROWS": max(1, min(32, TILE_ELEMENTS // block)), "BLOCK_E": block, "num_warps": warps}


@on_device
def launch_forward(
    x_TE: torch.Tensor,
    delta_TE: torch.Tensor | None,
    weight_E: torch.Tensor,
    eps: float,
    sum_TE: torch.Tensor | None,
    y_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    offset: float = 0.0,
    known: bool = False,
) -> None:
    """Writes y, rstd and, with a delta, sum, all contiguous; known: reads rstd. See `op.forward`."""
    n_rows, heads, width = _sizes(x_TE)
    if x_TE.numel() == 0:
        return
    x_TE, delta_TE = unit_stride(x_TE), unit_stride(x_TE if delta_TE is None else delta_TE)
    chosen = config(width)
    rms_norm_forward_kernel[(cdiv(n_rows, chosen["BLOCK_ROWS"]),)](
        x_TE,
        delta_TE,
        weight_E.contiguous(),
        y_TE if sum_TE is None else sum_TE,
        y_TE,
        rstd_T,
        n_rows,
        int(known),
        eps,
        *_strides(x_TE),
        *_strides(delta_TE),
        DELTA=sum_TE is not None,
        OFFSET=float(offset),
        HEADS=heads,
        WIDTH=width,
        **chosen,
    )


@on_device
def launch_backward(
    dy_TE: torch.Tensor,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_E: torch.Tensor,
    dsum_TE: torch.Tensor | None,
    dx_TE: torch.Tensor,
    offset: float = 0.0,
) -> torch.Tensor:
    """Writes dx, of stride 1 along E, and returns it. See `op.backward`."""
    n_rows, heads, width = _sizes(sum_TE)
    if sum_TE.numel() == 0:
        return dx_TE
    dy_TE, sum_TE = unit_stride(dy_TE), unit_stride(sum_TE)
    added_TE = sum_TE if dsum_TE is None else unit_stride(dsum_TE)
    chosen = config(width)
    rms_norm_backward_kernel[(cdiv(n_rows, chosen["BLOCK_ROWS"]),)](
        dy_TE,
        sum_TE,
        rstd_T,
        weight_E.contiguous(),
        added_TE,
        dx_TE,
        n_rows,
        *_strides(dy_TE),
        *_strides(sum_TE),
        *_strides(added_TE),
        *_strides(dx_TE),
        DSUM=dsum_TE is not None,
        OFFSET=float(offset),
        HEADS=heads,
        WIDTH=width,
        **chosen,
    )
    return dx_TE


@on_device
def launch_weight_gradient(dy_TE: torch.Tensor, sum_TE: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """dweight [E] fp32: partial sums by the kernel, then their total, both in a fixed order."""
    n_rows, heads, width = _sizes(sum_TE)
    if sum_TE.numel() == 0:
        return rstd_T.new_zeros(width)
    dy_TE, sum_TE = unit_stride(dy_TE), unit_stride(sum_TE)
    blocks, rows = cdiv(width, WEIGHT_GRADIENT["BLOCK_E"]), WEIGHT_GRADIENT["BLOCK_ROWS"]
    rows_per_program = rows * cdiv(cdiv(n_rows, rows), max(1, MAX_WEIGHT_PROGRAMS // blocks))
    partial_JE = rstd_T.new_empty(cdiv(n_rows, rows_per_program), width)
    rms_norm_weight_gradient_kernel[(len(partial_JE), blocks)](
        dy_TE,
        sum_TE,
        rstd_T,
        partial_JE,
        n_rows,
        rows_per_program,
        *_strides(dy_TE),
        *_strides(sum_TE),
        HEADS=heads,
        WIDTH=width,
        **WEIGHT_GRADIENT,
    )
    return partial_JE.sum(0)


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """(rows, heads, width) of [T, E] or [T, H, D]."""
    heads = x.shape[1] if x.ndim == 3 else 1
    return x.shape[0] * heads, heads, x.shape[-1]


def _strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.ndim == 3 else 0
