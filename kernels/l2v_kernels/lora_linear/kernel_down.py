"""dropout(x) A^T and its gradients as Triton kernels. Bound by memory: both read x once for all adapters on it.

Dropout masks are computed where x is read, in the forward and again in the backward, and never written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.philox import DOMAIN_DROPOUT
from l2v_kernels.philox_kernel import random_bytes

_DOMAIN = tl.constexpr(DOMAIN_DROPOUT)

DOWN_CONFIG = {2: {"BLOCK_T": 32, "BLOCK_E": 64, "num_warps": 4, "num_stages": 3}}
"""By bytes an element. 16k tokens are 512 programs, so loads of some overlap with the arithmetic of others."""
DOWN_CONFIG[4] = {"BLOCK_T": 32, "BLOCK_E": 32, "num_warps": 4, "num_stages": 3}
DOWN_BACKWARD_CONFIG = {2: {"BLOCK_T": 32, "BLOCK_E": 64, "num_warps": 8, "num_stages": 2}}
DOWN_BACKWARD_CONFIG[4] = {"BLOCK_T": 32, "BLOCK_E": 32, "num_warps": 8, "num_stages": 2}
DOWN_BACKWARD_PROGRAMS = 1024
"""The backward splits the tokens into about this many programs; the splits' partial sums of dA are added afterwards, in order."""


@triton.jit
def _kept(x, seed, row, first_block, stream, drop_below, DROPOUT: tl.constexpr, BLOCKS: tl.constexpr):
    """(x where it is kept and 0 elsewhere, the mask)."""
    if DROPOUT:
        keep = random_bytes(seed, row, first_block, stream.to(tl.int32), _DOMAIN, BLOCKS) >= drop_below
    else:
        keep = tl.full(x.shape, 1, tl.int1)
    return tl.where(keep, x, 0.0), keep


@triton.jit
def _load_a(a_ptr, first, columns, in_row, n_columns, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """A[first : first + RANK, columns], padded with rows of zeros to [BLOCK_R, BLOCK_E]."""
    r = tl.arange(0, BLOCK_R)
    at = (first + r).to(tl.int64)[:, None] * n_columns + columns[None, :]
    return tl.load(a_ptr + at, mask=(r < RANK)[:, None] & in_row[None, :], other=0.0)


@triton.jit
def _store_xa(
    xa_ptr, tokens, in_pack, first, acc, factor, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr
):
    r = tl.arange(0, BLOCK_R)
    at = tokens[:, None] * RANKS + (first + r)[None, :]
    tl.store(xa_ptr + at, (acc * factor).to(xa_ptr.dtype.element_ty), mask=in_pack[:, None] & (r < RANK)[None, :])


@jit(do_not_specialize=["n_tokens", "stream_0", "stream_1", "stream_2", "drop_below"])
def lora_down_kernel(
    x_ptr,
    a_ptr,
    xa_ptr,
    seeds_ptr,
    rows_ptr,
    n_tokens,
    n_columns,
    stride_x,
    stream_0,
    stream_1,
    stream_2,
    factor_0,
    factor_1,
    factor_2,
    drop_below,
    RANK_0: tl.constexpr,
    RANK_1: tl.constexpr,
    RANK_2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """xa[:, adapter] = factor * where(keep, x, 0) A^T for up to three adapters (RANK 0: no such adapter).

    Program i computes token block i over the whole width.
    """
    RANKS: tl.constexpr = RANK_0 + RANK_1 + RANK_2
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_pack = tokens < n_tokens
    seed = tl.load(seeds_ptr + tokens, mask=in_pack, other=0)[:, None] if DROPOUT else tokens[:, None]
    row = tl.load(rows_ptr + tokens, mask=in_pack, other=0).to(tl.int32)[:, None] if DROPOUT else tokens[:, None]
    acc_0 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if RANK_1 > 0:
        acc_1 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if RANK_2 > 0:
        acc_2 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in tl.range(0, n_columns, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        in_row = columns < n_columns
        x = tl.load(
            x_ptr + tokens[:, None] * stride_x + columns[None, :], mask=in_pack[:, None] & in_row[None, :], other=0.0
        )
        block = start // 16
        kept, _ = _kept(x, seed, row, block, stream_0, drop_below, DROPOUT, BLOCK_E // 16)
        a = _load_a(a_ptr, 0, columns, in_row, n_columns, RANK_0, BLOCK_R)
        acc_0 = tl.dot(kept.to(a.dtype), tl.trans(a), acc_0, input_precision=PRECISION)
        if RANK_1 > 0:
            kept, _ = _kept(x, seed, row, block, stream_1, drop_below, DROPOUT, BLOCK_E // 16)
            a = _load_a(a_ptr, RANK_0, columns, in_row, n_columns, RANK_1, BLOCK_R)
            acc_1 = tl.dot(kept.to(a.dtype), tl.trans(a), acc_1, input_precision=PRECISION)
        if RANK_2 > 0:
            kept, _ = _kept(x, seed, row, block, stream_2, drop_below, DROPOUT, BLOCK_E // 16)
            a = _load_a(a_ptr, RANK_0 + RANK_1, columns, in_row, n_columns, RANK_2, BLOCK_R)
            acc_2 = tl.dot(kept.to(a.dtype), tl.trans(a), acc_2, input_precision=PRECISION)
    _store_xa(xa_ptr, tokens, in_pack, 0, acc_0, factor_0, RANK_0, RANKS, BLOCK_R)
    if RANK_1 > 0:
        _store_xa(xa_ptr, tokens, in_pack, RANK_0, acc_1, factor_1, RANK_1, RANKS, BLOCK_R)
    if RANK_2 > 0:
        _store_xa(xa_ptr, tokens, in_pack, RANK_0 + RANK_1, acc_2, factor_2, RANK_2, RANKS, BLOCK_R)


@triton.jit
def _adapter_backward(
    x,
    dx,
    da,
    dxa_ptr,
    a,
    tokens,
    in_pack,
    seed,
    row,
    block,
    stream,
    drop_below,
    first,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WANT_DX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One adapter's part of a tile: (dx + where(keep, dxa A, 0), dA + dxa^T where(keep, x, 0))."""
    kept, keep = _kept(x, seed, row, block, stream, drop_below, DROPOUT, BLOCKS)
    r = tl.arange(0, BLOCK_R)
    at = tokens[:, None] * RANKS + (first + r)[None, :]
    dxa = tl.load(dxa_ptr + at, mask=in_pack[:, None] & (r < RANK)[None, :], other=0.0)
    da = tl.dot(tl.trans(dxa), kept.to(dxa.dtype), da, input_precision=PRECISION)
    if WANT_DX:
        dx += tl.where(keep, tl.dot(dxa, a, input_precision=PRECISION), 0.0)
    return dx, da


@triton.jit
def _store_da(
    da_ptr, split, first, columns, in_row, n_columns, da, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr
):
    r = tl.arange(0, BLOCK_R)
    at = (split * RANKS + first + r).to(tl.int64)[:, None] * n_columns + columns[None, :]
    tl.store(da_ptr + at, da, mask=(r < RANK)[:, None] & in_row[None, :])


@jit(do_not_specialize=["n_tokens", "tokens_per_split", "stream_0", "stream_1", "stream_2", "drop_below"])
def lora_backward_kernel(
    x_ptr,
    dxa_ptr,
    a_ptr,
    dx_ptr,
    da_ptr,
    seeds_ptr,
    rows_ptr,
    n_tokens,
    n_columns,
    stride_x,
    tokens_per_split,
    stream_0,
    stream_1,
    stream_2,
    drop_below,
    RANK_0: tl.constexpr,
    RANK_1: tl.constexpr,
    RANK_2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    WANT_DX: tl.constexpr,
    ADD_DX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dx [T, E] and dA, fp32 [J, R, E], of up to three adapters; each mask is computed once for both. ADD_DX: adds to dx.

    Program (i, j) computes column block i of the tokens of split j. dxa has the factors in it already.
    """
    RANKS: tl.constexpr = RANK_0 + RANK_1 + RANK_2
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_row = columns < n_columns
    block = tl.program_id(0) * (BLOCK_E // 16)
    a_0 = _load_a(a_ptr, 0, columns, in_row, n_columns, RANK_0, BLOCK_R)
    da_0 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    if RANK_1 > 0:
        a_1 = _load_a(a_ptr, RANK_0, columns, in_row, n_columns, RANK_1, BLOCK_R)
        da_1 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    if RANK_2 > 0:
        a_2 = _load_a(a_ptr, RANK_0 + RANK_1, columns, in_row, n_columns, RANK_2, BLOCK_R)
        da_2 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    begin = split.to(tl.int64) * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, n_tokens)
    for start in tl.range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        in_pack = tokens < end
        seed = tl.load(seeds_ptr + tokens, mask=in_pack, other=0)[:, None] if DROPOUT else tokens[:, None]
        row = tl.load(rows_ptr + tokens, mask=in_pack, other=0).to(tl.int32)[:, None] if DROPOUT else tokens[:, None]
        mask = in_pack[:, None] & in_row[None, :]
        x = tl.load(x_ptr + tokens[:, None] * stride_x + columns[None, :], mask=mask, other=0.0)
        dx = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        dx, da_0 = _adapter_backward(
            x, dx, da_0, dxa_ptr, a_0, tokens, in_pack, seed, row, block, stream_0, drop_below, 0,
            RANK_0, RANKS, BLOCK_R, BLOCK_E // 16, DROPOUT, WANT_DX, PRECISION,
        )  # fmt: skip
        if RANK_1 > 0:
            dx, da_1 = _adapter_backward(
                x, dx, da_1, dxa_ptr, a_1, tokens, in_pack, seed, row, block, stream_1, drop_below, RANK_0,
                RANK_1, RANKS, BLOCK_R, BLOCK_E // 16, DROPOUT, WANT_DX, PRECISION,
            )  # fmt: skip
        if RANK_2 > 0:
            dx, da_2 = _adapter_backward(
                x, dx, da_2, dxa_ptr, a_2, tokens, in_pack, seed, row, block, stream_2, drop_below, RANK_0 + RANK_1,
                RANK_2, RANKS, BLOCK_R, BLOCK_E // 16, DROPOUT, WANT_DX, PRECISION,
            )  # fmt: skip
        if WANT_DX:
            at = tokens[:, None] * n_columns + columns[None, :]
            if ADD_DX:
                dx += tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    _store_da(da_ptr, split, 0, columns, in_row, n_columns, da_0, RANK_0, RANKS, BLOCK_R)
    if RANK_1 > 0:
        _store_da(da_ptr, split, RANK_0, columns, in_row, n_columns, da_1, RANK_1, RANKS, BLOCK_R)
    if RANK_2 > 0:
        _store_da(da_ptr, split, RANK_0 + RANK_1, columns, in_row, n_columns, da_2, RANK_2, RANKS, BLOCK_R)
