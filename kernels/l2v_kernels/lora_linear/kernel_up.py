"""The gradients of xa B^T as Triton kernels, of up to three adapters at once: dy [T, O] is read once, for dxa and for dB.

dxa sums over outputs and dB over tokens, so no program can finish both: each writes partial sums in fp32, which a second
kernel adds in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from l2v_kernels.jit import jit

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
def _store_db(db_ptr, columns, r, n_columns, db, RANK: tl.constexpr):
    at = columns[None, :] * RANK + r[:, None]
    tl.store(db_ptr + at, db, mask=(columns < n_columns)[None, :] & (r < RANK)[:, None])


@jit(do_not_specialize=["n_tokens", "tokens_per_split"])
def lora_up_backward_kernel(
    dy_ptr,
    b_ptr,
    xa_ptr,
    dxa_ptr,
    db_ptr,
    n_tokens,
    start_0,
    start_1,
    start_2,
    outputs_0,
    outputs_1,
    outputs_2,
    stride_dy,
    stride_xa,
    tokens_per_split,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Partial sums of up to three adapters, fp32: dxa [J, T, R] = dy B over a block of outputs, db [J, O, R] = dy^T xa over a
    split of tokens.

    B [O, R] and db hold the adapters' outputs one below the other; those of adapter i are `outputs_i` columns of dy from
    column `start_i`. Program (i, j) computes block i, four chunks of BLOCK_O outputs of one adapter, of split j.
    """
    split = tl.program_id(1).to(tl.int64)
    first_1 = tl.cdiv(outputs_0, 4 * BLOCK_O)
    first_2 = first_1 + tl.cdiv(outputs_1, 4 * BLOCK_O)
    program = tl.program_id(0)
    adapter = (program >= first_1).to(tl.int32) + (program >= first_2).to(tl.int32)
    block = program - tl.where(adapter == 0, 0, tl.where(adapter == 1, first_1, first_2))
    start = tl.where(adapter == 0, start_0, tl.where(adapter == 1, start_1, start_2))
    n_columns = tl.where(adapter == 0, outputs_0, tl.where(adapter == 1, outputs_1, outputs_2))
    above = tl.where(adapter == 0, 0, tl.where(adapter == 1, outputs_0, outputs_0 + outputs_1))
    r = tl.arange(0, BLOCK_R)
    columns_0 = block * (4 * BLOCK_O) + tl.arange(0, BLOCK_O)
    columns_1, columns_2, columns_3 = columns_0 + BLOCK_O, columns_0 + 2 * BLOCK_O, columns_0 + 3 * BLOCK_O
    dy_ptr += start
    xa_ptr += adapter * RANK
    b_ptr += above.to(tl.int64) * RANK
    b_0 = _load_b(b_ptr, columns_0, r, n_columns, RANK)
    b_1 = _load_b(b_ptr, columns_1, r, n_columns, RANK)
    b_2 = _load_b(b_ptr, columns_2, r, n_columns, RANK)
    b_3 = _load_b(b_ptr, columns_3, r, n_columns, RANK)
    db_0 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    db_1 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    db_2 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    db_3 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    dxa_ptr += program.to(tl.int64) * n_tokens * RANK
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, n_tokens)
    for start_token in tl.range(begin, end, BLOCK_T):
        tokens = start_token + tl.arange(0, BLOCK_T)
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
    db_ptr += (split * (outputs_0 + outputs_1 + outputs_2) + above) * RANK
    _store_db(db_ptr, columns_0, r, n_columns, db_0, RANK)
    _store_db(db_ptr, columns_1, r, n_columns, db_1, RANK)
    _store_db(db_ptr, columns_2, r, n_columns, db_2, RANK)
    _store_db(db_ptr, columns_3, r, n_columns, db_3, RANK)


@triton.jit
def _ordered_sum(parts_ptr, out_ptr, n_parts, n_elements, program, BLOCK: tl.constexpr):
    """One block of out [n] = the sum of parts [J, n] over J, added in order and rounded once."""
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n_elements
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, n_parts):
        total += tl.load(parts_ptr + i, mask=mask, other=0.0)
        parts_ptr += n_elements
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=mask)


_OF_EACH = [f"{name}_{i}" for name in ("blocks", "factor") for i in range(3)]


_COUNTS = ["n_tokens", "n_splits", "n_pending_parts", "n_adapters", "dxa_programs", "db_programs"]


@jit(do_not_specialize=[*_COUNTS, *_OF_EACH])
def up_sums_kernel(
    dxa_parts_ptr,
    db_parts_ptr,
    pending_parts_ptr,
    dxa_ptr,
    db_ptr,
    pending_ptr,
    n_tokens,
    n_splits,
    n_pending_parts,
    n_adapters,
    n_db,
    n_pending,
    blocks_0,
    blocks_1,
    blocks_2,
    factor_0,
    factor_1,
    factor_2,
    dxa_programs,
    db_programs,
    stride_dxa,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `lora_up_backward_kernel` left to add, in order, each sum rounded once: dxa [T, n_adapters R], of each adapter times
    its factor, by the first `dxa_programs` programs, and db [n_db] by the next `db_programs`. The others add what was pending.

    n_adapters is no constant, which would compile a kernel for each size of group; it is divided by as one.
    """
    if tl.program_id(0) < dxa_programs:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        in_dxa = i < n_tokens.to(tl.int64) * n_adapters * RANK
        pair = i // RANK  # of a token and an adapter
        token = tl.where(n_adapters == 1, pair, tl.where(n_adapters == 2, pair // 2, pair // 3))
        adapter = pair - token * n_adapters
        first = tl.where(adapter == 0, 0, tl.where(adapter == 1, blocks_0, blocks_0 + blocks_1))
        blocks = tl.where(adapter == 0, blocks_0, tl.where(adapter == 1, blocks_1, blocks_2))
        factor = tl.where(adapter == 0, factor_0, tl.where(adapter == 1, factor_1, factor_2))
        at = (first.to(tl.int64) * n_tokens + token) * RANK + i % RANK
        total = tl.zeros((BLOCK,), tl.float32)
        for part in tl.range(0, tl.maximum(blocks_0, tl.maximum(blocks_1, blocks_2))):
            total += tl.load(dxa_parts_ptr + at, mask=in_dxa & (part < blocks), other=0.0)
            at += n_tokens.to(tl.int64) * RANK
        at = token * stride_dxa + adapter * RANK + i % RANK
        tl.store(dxa_ptr + at, (total * factor).to(dxa_ptr.dtype.element_ty), mask=in_dxa)
    elif tl.program_id(0) < dxa_programs + db_programs:
        _ordered_sum(db_parts_ptr, db_ptr, n_splits, n_db, tl.program_id(0) - dxa_programs, BLOCK)
    else:
        program = tl.program_id(0) - dxa_programs - db_programs
        _ordered_sum(pending_parts_ptr, pending_ptr, n_pending_parts, n_pending, program, BLOCK)


@jit(do_not_specialize=["n_parts"])
def ordered_sum_kernel(parts_ptr, out_ptr, n_parts, n_elements, BLOCK: tl.constexpr):
    """out [n] = the sum of parts [J, n] over J, added in order and rounded once."""
    _ordered_sum(parts_ptr, out_ptr, n_parts, n_elements, tl.program_id(0), BLOCK)
