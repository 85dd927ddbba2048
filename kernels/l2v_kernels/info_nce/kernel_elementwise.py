"""The passes over a tile of dot products, and the last pass over a gradient, as Triton kernels. Bound by memory."""

import triton.language as tl

from l2v_kernels.info_nce.kernel_common import fold, hidden_pairs, masked_scores, own_columns, pair_coefficients
from l2v_kernels.jit import jit

NOT_SPECIALIZED = ["n_rows", "n_columns", "first_column", "first_number", "n_prefixes"]
NOT_SPECIALIZED += [f"{name}_stride" for name in ("state", "row_scale", "lse", "row_out", "limit")]
"""Arguments whose divisibility gains little: specialising them would only compile more often, at batches of another size.
Those of planes and columns are not among them: a mask that ends at a multiple of 16 lets loads be 16 bytes wide. n_prefixes
is P once more, for loops: with a bound that it knows, the compiler unrolls them all and spills."""


@jit(do_not_specialize=["n_rows", "n_prefixes"])
def norms_kernel(
    x_ptr,
    bounds_ptr,
    out_ptr,
    n_rows,
    x_stride,
    n_prefixes,
    P: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out float64 [P, n]: 1 / norm of the prefixes of x, 0 for a norm of 0. bounds int32 [P + 1]: 0 and the prefixes / ALIGN.

    Squares are added in fp32 within a block and across blocks in float64: an error here would shift all scores of a row.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < n_rows
    x_ptr += rows.to(tl.int64)[:, None] * x_stride
    squares = tl.zeros([BLOCK_ROWS], tl.float64)
    for p in range(n_prefixes if P > 1 else 1):
        begin = tl.load(bounds_ptr + p) * ALIGN
        end = tl.load(bounds_ptr + p + 1) * ALIGN
        for start in range(0, end - begin, BLOCK_E):
            columns = begin + start + tl.arange(0, BLOCK_E)
            mask = in_rows[:, None] & (columns < end)[None, :]
            x = tl.load(x_ptr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, 1).to(tl.float64)
        inverse = tl.where(squares == 0.0, 0.0, 1.0 / tl.sqrt(squares))
        tl.store(out_ptr + tl.cast(p, tl.int64) * n_rows + rows, inverse, mask=in_rows)


@jit(do_not_specialize=NOT_SPECIALIZED)
def statistics_kernel(
    planes_ptr,
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
    row_stride,
    plane_stride,
    state_stride,
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
    PAIR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Updates m, l and (PAIR) pair [P, r], of stride state_stride, by planes [P, r, c].

    From c to row_stride, which is a multiple of 16, rows of planes are zero and column_scale can be read.

    A program owns its rows, so the order of sums is fixed. PREFIXES is P, rounded up to a power of two.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < n_rows
    own = own_columns(target_ptr, rows, in_rows, first_column, n_columns)
    prefixes = tl.arange(0, PREFIXES)[None, :]
    at_state = rows[:, None] + prefixes.to(tl.int64) * state_stride
    in_state = in_rows[:, None] & (prefixes < P)
    state_m = tl.load(m_ptr + at_state, mask=in_state, other=float("-inf"))
    state_l = tl.load(l_ptr + at_state, mask=in_state, other=0.0)
    if PAIR:
        pair = tl.load(pair_ptr + at_state, mask=in_state, other=0.0)
    planes_ptr += rows.to(tl.int64)[:, None] * row_stride
    for start in range(0, n_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        in_columns = columns < n_columns
        hide = hidden_pairs(
            rows, columns, in_rows, in_columns, row_ids_ptr, column_ids_ptr, owners_ptr, restricted_ptr, first_number,
            IDS, OWN, RESTRICTED,
        )  # fmt: skip
        # Columns beyond the end are excluded by a vector: a mask of all scores would take as many registers as the scores.
        beyond = tl.where(in_columns, 0.0, float("-inf"))
        in_memory = columns < row_stride
        inside = in_rows[:, None] & in_memory[None, :]
        dots = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for p in range(n_prefixes if P > 1 else 1):
            dots += tl.load(planes_ptr + tl.cast(p, tl.int64) * plane_stride + columns[None, :], mask=inside, other=0.0)
            row_scale = tl.load(row_scale_ptr + p * row_scale_stride + rows, mask=in_rows, other=0.0)
            column_scale = tl.load(column_scale_ptr + p * column_scale_stride + columns, mask=in_memory, other=0.0)
            scores = dots * row_scale[:, None] * column_scale[None, :]
            masked = masked_scores(
                scores, limit_ptr + p * limit_stride, rows, columns, in_rows, hide, own, HIDE, KEEP, LIMIT
            )
            state_m, state_l = fold(state_m, state_l, masked + beyond[None, :], p, PREFIXES)
            if PAIR:
                here = (own >= start) & (own < start + BLOCK_COLUMNS)
                picked = tl.sum(tl.where(columns[None, :] == own[:, None], scores, 0.0), 1)
                pair = tl.where(here[:, None] & (prefixes == p), picked[:, None], pair)
    tl.store(m_ptr + at_state, state_m, mask=in_state)
    tl.store(l_ptr + at_state, state_l, mask=in_state)
    if PAIR:
        tl.store(pair_ptr + at_state, pair, mask=in_state)


@jit(do_not_specialize=NOT_SPECIALIZED)
def coefficients_kernel(
    planes_ptr,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out [P, r, c] from planes [P, r, c], and sums of coefficient * dot. From c to row_stride as in the statistics.

    row_sums [column blocks, P, r] and column_sums [row blocks, P, c] have one entry a program, to be added up. With several
    prefixes a program reads the planes twice: first for the sum of all coefficients, then each slice gets the rest of it.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows, in_columns = rows < n_rows, columns < n_columns
    in_memory = columns < row_stride
    inside = in_rows[:, None] & in_memory[None, :]
    own = own_columns(target_ptr, rows, in_rows, first_column, n_columns)
    hide = hidden_pairs(
        rows, columns, in_rows, in_columns, row_ids_ptr, column_ids_ptr, owners_ptr, restricted_ptr, first_number,
        IDS, OWN, RESTRICTED,
    )  # fmt: skip
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    left = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for turn in tl.static_range(2 if P > 1 else 1):
        dots = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for p in range(n_prefixes if P > 1 else 1):
            at_p = tl.cast(p, tl.int64) * plane_stride + at
            dots += tl.load(planes_ptr + at_p, mask=inside, other=0.0)
            h = pair_coefficients(
                dots, row_scale_ptr + p * row_scale_stride, column_scale_ptr + p * column_scale_stride,
                lse_ptr + p * lse_stride, row_out_ptr + p * row_out_stride, limit_ptr + p * limit_stride, rows, columns,
                in_rows, in_memory, hide, own, HIDE, KEEP, LIMIT, MINUS,
            )  # fmt: skip
            if turn == 0:
                left += h
                moment = h * dots
                row_at = (tl.program_id(1) * P + p).to(tl.int64) * n_rows + rows
                column_at = (tl.program_id(0) * P + p).to(tl.int64) * n_columns + columns
                tl.store(row_sums_ptr + row_at, tl.sum(moment, 1), mask=in_rows)
                tl.store(column_sums_ptr + column_at, tl.sum(moment, 0), mask=in_columns)
            if P == 1 or turn == 1:
                tl.store(out_ptr + at_p, left.to(out_ptr.dtype.element_ty), mask=inside)
                left -= h


@jit(do_not_specialize=["n_rows"])
def finish_kernel(
    sum_ptr,
    x_ptr,
    along_ptr,
    unscale_ptr,
    factor_ptr,
    out_ptr,
    n_rows,
    begin,
    end,
    sum_stride,
    x_stride,
    out_stride,
    UNSCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out = (sum * unscale - x * along) * factor, columns begin .. end of rows; one rounding to out's dtype. out may be sum."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = begin + tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (rows < n_rows)[:, None] & (columns < end)[None, :]
    along = tl.load(along_ptr + rows, mask=rows < n_rows, other=0.0)
    total = tl.load(sum_ptr + rows[:, None] * sum_stride + columns[None, :], mask=mask, other=0.0)
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if UNSCALE:
        total *= tl.load(unscale_ptr)
    y = total - x * along[:, None]
    if FACTOR:
        y *= tl.load(factor_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)
