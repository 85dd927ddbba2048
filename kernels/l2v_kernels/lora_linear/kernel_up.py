"""The gradients of xa B^T for one adapter as Triton kernels: dy [T, O] is read once, for dxa and for dB.

dxa sums over outputs and dB over tokens, so no program can finish both: each writes partial sums in fp32, which a second
kernel adds in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_BLOCK_R = 32
"""Above this rank the partial sums of dxa, 8 R bytes a token and block of outputs, cost as much as another read of dy."""
CHUNKS = 4
"""Chunks of a block of outputs, as unrolled in the kernel. In one piece, the operands of dxa would not fit in registers."""
UP_BACKWARD_CONFIG = {
    (2, 16): {"BLOCK_T": 32, "BLOCK_O": 128, "num_warps": 8, "num_stages": 3},
    (2, 32): {"BLOCK_T": 16, "BLOCK_O": 128, "num_warps": 8, "num_stages": 3},
    (4, 16): {"BLOCK_T": 16, "BLOCK_O": 32, "num_warps": 4, "num_stages": 2},
    (4, 32): {"BLOCK_T": 16, "BLOCK_O": 32, "num_warps": 4, "num_stages": 2},
}
"""By bytes an element and BLOCK_R; BLOCK_O is that of a chunk. 512 outputs are 1 KB of dy a token; 16 partial sums, written
and read, are an eighth of that."""
UP_BACKWARD_PROGRAMS = 528
"""Two waves of two programs on each of 132 multiprocessors."""
MIN_SPLIT_TOKENS = 256
"""Tokens of a split, at least: a split writes 8 R bytes of partial dB an output, against 2 bytes of dy a token and output."""
ORDERED_SUM_CONFIG = {"BLOCK": 512, "num_warps": 4}


@triton.jit
def _load_b(b_ptr, columns, r, n_columns, RANK: tl.constexpr):
    """B[columns], padded with columns of zeros to [BLOCK_O, BLOCK_R]."""
    at = columns.to(tl.int64)[:, None] * RANK + r[None, :]
    return tl.load(b_ptr + at, mask=(columns < n_columns)[:, None] & (r < RANK)[None, :], other=0.0)


@triton.jit
def _chunk_backward(
    dxa, db, dy_ptr, xa, b, tokens, in_pack, columns, n_columns, stride_dy, PRECISION: tl.constexpr
):  # fmt: skip
    """(dxa + dy B, db + xa^T dy) of a chunk. Ranks come first in db: 16 rows are the least that a matrix instruction takes."""
    mask = in_pack[:, None] & (columns < n_columns)[None, :]
    dy = tl.load(dy_ptr + tokens[:, None] * stride_dy + columns[None, :], mask=mask, other=0.0)
    dxa = tl.dot(dy, b, dxa, input_precision=PRECISION)
    db = tl.dot(tl.trans(xa), dy, db, input_precision=PRECISION)
    return dxa, db


@triton.jit
def _store_db(db_ptr, split, columns, r, n_columns, db, RANK: tl.constexpr):
    at = (split * n_columns + columns)[None, :] * RANK + r[:, None]
    tl.store(db_ptr + at, db, mask=(columns < n_columns)[None, :] & (r < RANK)[:, None])


@triton.jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_up_backward_kernel(
    dy_ptr,
    b_ptr,
    xa_ptr,
    dxa_ptr,
    db_ptr,
    n_tokens,
    n_columns,
    stride_dy,
    stride_xa,
    tokens_per_split,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Partial sums, fp32: dxa [J, T, R] = dy B over a block of outputs, db [J, O, R] = dy^T xa over a split of tokens.

    Program (i, j) computes block i, four chunks of BLOCK_O outputs, of split j.
    """
    split = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    columns_0 = tl.program_id(0) * (4 * BLOCK_O) + tl.arange(0, BLOCK_O)
    columns_1, columns_2, columns_3 = columns_0 + BLOCK_O, columns_0 + 2 * BLOCK_O, columns_0 + 3 * BLOCK_O
    b_0 = _load_b(b_ptr, columns_0, r, n_columns, RANK)
    b_1 = _load_b(b_ptr, columns_1, r, n_columns, RANK)
    b_2 = _load_b(b_ptr, columns_2, r, n_columns, RANK)
    b_3 = _load_b(b_ptr, columns_3, r, n_columns, RANK)
    db_0 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    db_1 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    db_2 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    db_3 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    dxa_ptr += tl.program_id(0).to(tl.int64) * n_tokens * RANK
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, n_tokens)
    for start in tl.range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        in_pack = tokens < end
        mask = in_pack[:, None] & (r < RANK)[None, :]
        xa = tl.load(xa_ptr + tokens[:, None] * stride_xa + r[None, :], mask=mask, other=0.0)
        dxa = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        dxa, db_0 = _chunk_backward(
            dxa, db_0, dy_ptr, xa, b_0, tokens, in_pack, columns_0, n_columns, stride_dy, PRECISION
        )
        dxa, db_1 = _chunk_backward(
            dxa, db_1, dy_ptr, xa, b_1, tokens, in_pack, columns_1, n_columns, stride_dy, PRECISION
        )
        dxa, db_2 = _chunk_backward(
            dxa, db_2, dy_ptr, xa, b_2, tokens, in_pack, columns_2, n_columns, stride_dy, PRECISION
        )
        dxa, db_3 = _chunk_backward(
            dxa, db_3, dy_ptr, xa, b_3, tokens, in_pack, columns_3, n_columns, stride_dy, PRECISION
        )
        tl.store(dxa_ptr + tokens[:, None] * RANK + r[None, :], dxa, mask=mask)
    _store_db(db_ptr, split, columns_0, r, n_columns, db_0, RANK)
    _store_db(db_ptr, split, columns_1, r, n_columns, db_1, RANK)
    _store_db(db_ptr, split, columns_2, r, n_columns, db_2, RANK)
    _store_db(db_ptr, split, columns_3, r, n_columns, db_3, RANK)


@triton.jit(do_not_specialize=["n_parts", "factor"])
def ordered_sum_kernel(
    parts_ptr,
    out_ptr,
    n_parts,
    n_elements,
    stride_out,
    factor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [rows, WIDTH] = factor * the sum of parts [J, rows, WIDTH] over J, added in order and rounded once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, n_parts):
        total += tl.load(parts_ptr + i, mask=mask, other=0.0)
        parts_ptr += n_elements
    out = (total * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i // WIDTH * stride_out + i % WIDTH, out, mask=mask)
