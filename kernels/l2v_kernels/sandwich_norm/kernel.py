"""The sandwich norm as Triton kernels. Bound by memory: a row is read once, held in registers, and written once."""

from __future__ import annotations

import torch
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import cdiv, on_device, unit_stride
from l2v_kernels.rms_norm.kernel import config, load_factor


@jit(do_not_specialize=["n_rows"])
def sandwich_forward_kernel(
    delta_ptr,
    residual_ptr,
    after_ptr,
    before_ptr,
    sum_ptr,
    y_ptr,
    delta_rstd_ptr,
    rstd_ptr,
    n_rows,
    eps,
    stride_delta,
    stride_residual,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """sum = residual + norm(delta) * (OFFSET + after), and (NORM) y = norm(sum) * (OFFSET + before); all contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < n_rows
    column = tl.arange(0, BLOCK_E)[None, :]
    mask = in_rows[:, None] & (column < WIDTH)
    out_at = row[:, None] * WIDTH + column
    delta = tl.load(delta_ptr + (row * stride_delta)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    residual_at = (row * stride_residual)[:, None] + column
    residual = tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
    delta_rstd = tl.rsqrt(tl.sum(delta * delta, 1) / WIDTH + eps)
    tl.store(delta_rstd_ptr + row, delta_rstd, mask=in_rows)
    total = delta * delta_rstd[:, None] * load_factor(after_ptr, column, OFFSET, WIDTH) + residual
    rounded = total.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + out_at, rounded, mask=mask)
    if NORM:
        total = rounded.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(total * total, 1) / WIDTH + eps)
        tl.store(rstd_ptr + row, rstd, mask=in_rows)
        y = total * rstd[:, None] * load_factor(before_ptr, column, OFFSET, WIDTH)
        tl.store(y_ptr + out_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_rows"])
def sandwich_backward_kernel(
    dy_ptr,
    dsum_ptr,
    sum_ptr,
    rstd_ptr,
    before_ptr,
    delta_ptr,
    delta_rstd_ptr,
    after_ptr,
    dresidual_ptr,
    ddelta_ptr,
    n_rows,
    stride_dy,
    stride_dsum,
    stride_sum,
    stride_delta,
    DSUM: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dresidual = rstd * (g - unit * mean(g * unit)) + dsum (DSUM), with g = dy * (OFFSET + before) and unit = sum * rstd;
    ddelta by the same formula from dresidual, after and delta. Both contiguous.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < n_rows
    column = tl.arange(0, BLOCK_E)[None, :]
    mask = in_rows[:, None] & (column < WIDTH)
    out_at = row[:, None] * WIDTH + column
    rstd = tl.load(rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
    g = tl.load(dy_ptr + (row * stride_dy)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    g *= load_factor(before_ptr, column, OFFSET, WIDTH)
    unit = tl.load(sum_ptr + (row * stride_sum)[:, None] + column, mask=mask, other=0.0).to(tl.float32) * rstd
    dresidual = rstd * (g - unit * (tl.sum(g * unit, 1) / WIDTH)[:, None])
    if DSUM:
        dresidual += tl.load(dsum_ptr + (row * stride_dsum)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    rounded = dresidual.to(dresidual_ptr.dtype.element_ty)
    tl.store(dresidual_ptr + out_at, rounded, mask=mask)
    rstd = tl.load(delta_rstd_ptr + row, mask=in_rows, other=0.0)[:, None]
    g = rounded.to(tl.float32) * load_factor(after_ptr, column, OFFSET, WIDTH)
    unit = tl.load(delta_ptr + (row * stride_delta)[:, None] + column, mask=mask, other=0.0).to(tl.float32) * rstd
    ddelta = rstd * (g - unit * (tl.sum(g * unit, 1) / WIDTH)[:, None])
    tl.store(ddelta_ptr + out_at, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)


def backward_config(width: int) -> dict[str, int]:
    """The tile of the backward: half the rows, since it holds four tensors where a norm's holds three."""
    chosen = config(width)
    return chosen | {"BLOCK_ROWS": max(1, chosen["BLOCK_ROWS"] // 2)}


@on_device
def launch_forward(
    delta_TE: torch.Tensor,
    residual_TE: torch.Tensor,
    after_E: torch.Tensor,
    before_E: torch.Tensor | None,
    eps: float,
    offset: float,
    sum_TE: torch.Tensor,
    y_TE: torch.Tensor | None,
    delta_rstd_T: torch.Tensor,
    rstd_T: torch.Tensor | None,
) -> None:
    """Writes sum and the rstd of delta, and with `before` y and its rstd, all contiguous. See `op.forward`."""
    T, E = delta_TE.shape
    if delta_TE.numel() == 0:
        return
    delta_TE, residual_TE, chosen = unit_stride(delta_TE), unit_stride(residual_TE), config(E)
    # What is missing without a second norm is never read or written, but an argument must be a tensor.
    sandwich_forward_kernel[(cdiv(T, chosen["BLOCK_ROWS"]),)](
        delta_TE,
        residual_TE,
        after_E.contiguous(),
        after_E.contiguous() if before_E is None else before_E.contiguous(),
        sum_TE,
        sum_TE if y_TE is None else y_TE,
        delta_rstd_T,
        delta_rstd_T if rstd_T is None else rstd_T,
        T,
        eps,
        delta_TE.stride(0),
        residual_TE.stride(0),
        NORM=before_E is not None,
        OFFSET=float(offset),
        WIDTH=E,
        **chosen,
    )


@on_device
def launch_backward(
    dy_TE: torch.Tensor,
    dsum_TE: torch.Tensor | None,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    before_E: torch.Tensor,
    delta_TE: torch.Tensor,
    delta_rstd_T: torch.Tensor,
    after_E: torch.Tensor,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dresidual, ddelta), contiguous. See `op.backward`."""
    T, E = sum_TE.shape
    dresidual_TE = torch.empty_like(sum_TE, memory_format=torch.contiguous_format)
    ddelta_TE = torch.empty_like(dresidual_TE)
    if sum_TE.numel() == 0:
        return dresidual_TE, ddelta_TE
    dy_TE, sum_TE, delta_TE = unit_stride(dy_TE), unit_stride(sum_TE), unit_stride(delta_TE)
    added_TE, chosen = sum_TE if dsum_TE is None else unit_stride(dsum_TE), backward_config(E)
    sandwich_backward_kernel[(cdiv(T, chosen["BLOCK_ROWS"]),)](
        dy_TE,
        added_TE,
        sum_TE,
        rstd_T,
        before_E.contiguous(),
        delta_TE,
        delta_rstd_T,
        after_E.contiguous(),
        dresidual_TE,
        ddelta_TE,
        T,
        dy_TE.stride(0),
        added_TE.stride(0),
        sum_TE.stride(0),
        delta_TE.stride(0),
        DSUM=dsum_TE is not None,
        OFFSET=float(offset),
        WIDTH=E,
        **chosen,
    )
    return dresidual_TE, ddelta_TE
