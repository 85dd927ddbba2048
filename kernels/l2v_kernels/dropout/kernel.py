"""Dropout as a Triton kernel. Bound by memory: it reads x once, writes y once and keeps no mask."""

import torch
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import cdiv, on_device, unit_stride
from l2v_kernels.philox import DOMAIN_DROPOUT, keep_scale, threshold
from l2v_kernels.philox_kernel import random_bytes

_DOMAIN = tl.constexpr(DOMAIN_DROPOUT)

CONFIG = {"BLOCK_T": 8, "BLOCK_E": 512, "num_warps": 8}
"""4096 elements a program: 16 a thread, which is what one Philox call serves."""


@jit(do_not_specialize=["stream", "drop_below"])
def dropout_kernel(
    x_ptr,
    y_ptr,
    seeds_ptr,
    rows_ptr,
    n_tokens,
    n_columns,
    stride_x,
    stride_y,
    stream,
    drop_below,
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """y = where(byte >= drop_below, x * scale, 0). Program (i, j) computes token block i of column block j."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_pack = tokens < n_tokens
    seed = tl.load(seeds_ptr + tokens, mask=in_pack, other=0)[:, None]
    row = tl.load(rows_ptr + tokens, mask=in_pack, other=0).to(tl.int32)[:, None]
    mask = in_pack[:, None] & (columns < n_columns)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * stride_x + columns[None, :], mask=mask, other=0.0)
    first_block = tl.program_id(1) * (BLOCK_E // 16)
    byte = random_bytes(seed, row, first_block, stream.to(tl.int32), _DOMAIN, BLOCK_E // 16)
    y = tl.where(byte >= drop_below, x.to(tl.float32) * scale, 0.0)
    tl.store(y_ptr + tokens[:, None] * stride_y + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@on_device
def launch(
    x_TE: torch.Tensor, y_TE: torch.Tensor, p: float, seeds_T: torch.Tensor, rows_T: torch.Tensor, stream: int
) -> torch.Tensor:
    """Writes dropout(x) into y [T, E], of stride 1 along E, and returns it. Arguments as in `l2v_kernels.dropout`."""
    n_tokens, n_columns = x_TE.shape
    if x_TE.numel() == 0:
        return y_TE
    x_TE = unit_stride(x_TE)
    grid = (cdiv(n_tokens, CONFIG["BLOCK_T"]), cdiv(n_columns, CONFIG["BLOCK_E"]))
    dropout_kernel[grid](
        x_TE,
        y_TE,
        seeds_T.contiguous(),
        rows_T.contiguous(),
        n_tokens,
        n_columns,
        x_TE.stride(0),
        y_TE.stride(0),
        stream,
        threshold(p),
        keep_scale(p),
        **CONFIG,
    )
    return y_TE
