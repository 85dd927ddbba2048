"""Scores that never leave the kernel that computes them: a matmul on the tensor cores, then statistics or coefficients."""

import triton
import triton.language as tl

from l2v_kernels.info_nce.kernel_common import fold, hidden_pairs, masked_scores, own_columns, pair_coefficients
from l2v_kernels.jit import jit

NOT_SPECIALIZED = ["n_rows", "first_column", "first_number", "n_prefixes"]


@triton.jit
def add_slice(
    dots,
    x_ptr,
    y_ptr,
    bounds_ptr,
    in_rows,
    in_columns,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dots [r, c] + x[:, begin:end] y[:, begin:end]^T. x and y point at the first element of rows, [r, 1] and [c, 1].

    bounds holds begin / ALIGN and end / ALIGN: from the multiplication by 16 the compiler sees that loads are 16 bytes wide.
    EVEN: BLOCK_E divides the slice, so its end needs no mask.
    """
    begin = tl.load(bounds_ptr) * ALIGN
    length = tl.load(bounds_ptr + 1) * ALIGN - begin
    x_ptr += begin
    y_ptr += begin
    for block in range(tl.cdiv(length, BLOCK_E)):
        k = block * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
        if EVEN:
            x = tl.load(x_ptr + k, mask=in_rows[:, None], other=0.0)
            y = tl.load(y_ptr + k, mask=in_columns[:, None], other=0.0)
        else:
            x = tl.load(x_ptr + k, mask=in_rows[:, None] & (k < length), other=0.0)
            y = tl.load(y_ptr + k, mask=in_columns[:, None] & (k < length), other=0.0)
        dots = tl.dot(x, tl.trans(y), dots, input_precision=PRECISION)
    return dots


@jit(do_not_specialize=[*NOT_SPECIALIZED, "split_columns"])
def fused_statistics_kernel(
    x_ptr,
    y_ptr,
    bounds_ptr,
    m_ptr,
    l_ptr,
    pair_ptr,
    row_scale_ptr,
    column_scale_ptr,
    limit_ptr,
    target_ptr,
    row_ids_ptr,
    column_ids_ptr,
    owners_ptr,
    restricted_ptr,
    n_rows,
    n_columns,
    split_columns,
    x_stride,
    y_stride,
    row_scale_stride,
    column_scale_stride,
    limit_stride,
    first_column,
    first_number,
    n_prefixes,
    P: tl.constexpr,
    PREFIXES: tl.constexpr,
    HIDE: tl.constexpr,
    IDS: tl.constexpr,
    OWN: tl.constexpr,
    RESTRICTED: tl.constexpr,
    LIMIT: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """m, l and pair [J, P, r]: program (i, j) covers split_columns columns from split_columns * j on; parts are merged later.

    bounds int32 [P + 1] holds 0 and the prefixes / ALIGN. pair is 0 in splits without a row's own column.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < n_rows
    own = own_columns(target_ptr, rows, in_rows, first_column, n_columns)
    prefixes = tl.arange(0, PREFIXES)[None, :]
    state_m = tl.full([BLOCK_ROWS, PREFIXES], float("-inf"), tl.float32)
    state_l = tl.zeros([BLOCK_ROWS, PREFIXES], tl.float32)
    pair = tl.zeros([BLOCK_ROWS, PREFIXES], tl.float32)
    x_rows_ptr = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    first = tl.program_id(1) * split_columns
    for start in range(first, min(first + split_columns, n_columns), BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        in_columns = columns < n_columns
        y_columns_ptr = y_ptr + columns.to(tl.int64)[:, None] * y_stride
        dots = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for p in range(n_prefixes if P > 1 else 1):
            dots = add_slice(
                dots, x_rows_ptr, y_columns_ptr, bounds_ptr + p, in_rows, in_columns, ALIGN, EVEN, BLOCK_E, PRECISION
            )
            hide = hidden_pairs(
                rows, columns, in_rows, in_columns, row_ids_ptr, column_ids_ptr, owners_ptr, restricted_ptr, first_number,
                IDS, OWN, RESTRICTED,
            )  # fmt: skip
            row_scale = tl.load(row_scale_ptr + p * row_scale_stride + rows, mask=in_rows, other=0.0)
            column_scale = tl.load(column_scale_ptr + p * column_scale_stride + columns, mask=in_columns, other=0.0)
            scores = dots * row_scale[:, None] * column_scale[None, :]
            picked = tl.sum(tl.where(columns[None, :] == own[:, None], scores, 0.0), 1)
            pair += tl.where(prefixes == p, picked[:, None], 0.0)
            masked = masked_scores(
                scores, limit_ptr + p * limit_stride, rows, columns, in_rows, hide, own, HIDE, KEEP, LIMIT
            )
            beyond = tl.where(in_columns, 0.0, float("-inf"))
            state_m, state_l = fold(state_m, state_l, masked + beyond[None, :], p, PREFIXES)
    at_state = (tl.program_id(1) * P + prefixes).to(tl.int64) * n_rows + rows[:, None]
    in_state = in_rows[:, None] & (prefixes < P)
    tl.store(m_ptr + at_state, state_m, mask=in_state)
    tl.store(l_ptr + at_state, state_l, mask=in_state)
    tl.store(pair_ptr + at_state, pair, mask=in_state)


@jit(do_not_specialize=NOT_SPECIALIZED)
def fused_coefficients_kernel(
    x_ptr,
    y_ptr,
    bounds_ptr,
    out_ptr,
    row_sums_ptr,
    column_sums_ptr,
    row_scale_ptr,
    column_scale_ptr,
    lse_ptr,
    row_out_ptr,
    limit_ptr,
    target_ptr,
    row_ids_ptr,
    column_ids_ptr,
    owners_ptr,
    restricted_ptr,
    n_rows,
    n_columns,
    x_stride,
    y_stride,
    row_stride,
    plane_stride,
    row_scale_stride,
    column_scale_stride,
    lse_stride,
    row_out_stride,
    limit_stride,
    first_column,
    first_number,
    n_prefixes,
    P: tl.constexpr,
    HIDE: tl.constexpr,
    IDS: tl.constexpr,
    OWN: tl.constexpr,
    RESTRICTED: tl.constexpr,
    LIMIT: tl.constexpr,
    KEEP: tl.constexpr,
    MINUS: tl.constexpr,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """As `coefficients_kernel`, from the embeddings.

    Each prefix's coefficients are written as soon as they are computed; with several prefixes, a program then reads back
    what it wrote, last prefix first, and adds up. GROUP rows of tiles run together, so that the columns they read are still
    in the cache.
    """
    row_blocks, column_blocks = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_columns, BLOCK_COLUMNS)
    group = tl.program_id(0) // (GROUP * column_blocks)
    inside_group = tl.program_id(0) % (GROUP * column_blocks)
    height = min(row_blocks - group * GROUP, GROUP)
    row_block, column_block = group * GROUP + inside_group % height, inside_group // height
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows, in_columns = rows < n_rows, columns < n_columns
    inside = in_rows[:, None] & in_columns[None, :]
    own = own_columns(target_ptr, rows, in_rows, first_column, n_columns)
    x_rows_ptr = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    y_columns_ptr = y_ptr + columns.to(tl.int64)[:, None] * y_stride
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    dots = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for p in range(n_prefixes if P > 1 else 1):
        dots = add_slice(
            dots, x_rows_ptr, y_columns_ptr, bounds_ptr + p, in_rows, in_columns, ALIGN, EVEN, BLOCK_E, PRECISION
        )
        # Not before the loop: it would take registers from the matmul.
        hide = hidden_pairs(
            rows, columns, in_rows, in_columns, row_ids_ptr, column_ids_ptr, owners_ptr, restricted_ptr, first_number,
            IDS, OWN, RESTRICTED,
        )  # fmt: skip
        h = pair_coefficients(
            dots, row_scale_ptr + p * row_scale_stride, column_scale_ptr + p * column_scale_stride,
            lse_ptr + p * lse_stride, row_out_ptr + p * row_out_stride, limit_ptr + p * limit_stride, rows, columns,
            in_rows, in_columns, hide, own, HIDE, KEEP, LIMIT, MINUS,
        )  # fmt: skip
        at_p = tl.cast(p, tl.int64) * plane_stride + at
        tl.store(out_ptr + at_p, h.to(out_ptr.dtype.element_ty), mask=inside)
        moment = h * dots
        row_at = (column_block * P + p).to(tl.int64) * n_rows + rows
        column_at = (row_block * P + p).to(tl.int64) * n_columns + columns
        tl.store(row_sums_ptr + row_at, tl.sum(moment, 1), mask=in_rows)
        tl.store(column_sums_ptr + column_at, tl.sum(moment, 0), mask=in_columns)
    if P > 1:
        # A thread may read back what another one wrote, if the compiler chooses another layout for loads than for stores.
        tl.debug_barrier()
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for q in range(n_prefixes):
            at_q = tl.cast(P - 1 - q, tl.int64) * plane_stride + at
            total += tl.load(out_ptr + at_q, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at_q, total.to(out_ptr.dtype.element_ty), mask=inside)
