"""What the InfoNCE kernels share: which pairs are compared, and the coefficient of a pair in the gradient."""

import triton
import triton.language as tl


@triton.jit
def own_columns(target_ptr, rows, in_rows, first_column, n_columns):
    """int32 [BLOCK_ROWS]: each row's own column within the tile, -1 where it lies elsewhere."""
    own = tl.load(target_ptr + rows, mask=in_rows, other=-1) - first_column
    return tl.where((own >= 0) & (own < n_columns), own, -1).to(tl.int32)


@triton.jit
def hidden_pairs(
    rows,
    columns,
    in_rows,
    in_columns,
    row_ids_ptr,
    column_ids_ptr,
    owners_ptr,
    restricted_ptr,
    first_number,
    IDS: tl.constexpr,
    OWN: tl.constexpr,
    RESTRICTED: tl.constexpr,
):
    """bool [r, c]: pairs that ids and owners exclude; [1, 1] false without either. IDS: kinds of ids, 0 for none."""
    hide = tl.zeros([1, 1], tl.int1)
    for kind in tl.static_range(IDS):
        row_id = tl.load(row_ids_ptr + rows * IDS + kind, mask=in_rows, other=-1)
        column_id = tl.load(column_ids_ptr + columns * IDS + kind, mask=in_columns, other=-1)
        hide = hide | ((row_id[:, None] == column_id[None, :]) & (column_id >= 0)[None, :])
    if OWN or RESTRICTED:
        owner = tl.load(owners_ptr + columns, mask=in_columns, other=-1)
        mine = owner[None, :] == (rows + first_number).to(tl.int64)[:, None]
        if OWN:
            hide = hide | mine
        if RESTRICTED:
            restricted = tl.load(restricted_ptr + columns, mask=in_columns, other=0)
            hide = hide | ((restricted != 0)[None, :] & ~mine)
    return hide


@triton.jit
def masked_scores(
    scores,
    limit_ptr,
    rows,
    columns,
    in_rows,
    hide,
    own,
    HIDE: tl.constexpr,
    KEEP: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Scores [r, c], -inf where a row is not compared with a column.

    limit_ptr points at the prefix. HIDE: `hide` excludes pairs. KEEP: a row's own column is always compared, else never.
    """
    if HIDE or LIMIT or not KEEP:
        is_own = columns[None, :] == own[:, None]
        if LIMIT:
            hide = hide | (scores > tl.load(limit_ptr + rows, mask=in_rows, other=0.0)[:, None])
        if KEEP:
            hide = hide & ~is_own
        else:
            hide = hide | is_own
        scores = tl.where(hide, float("-inf"), scores)
    return scores


@triton.jit
def fold(state_m, state_l, masked, p, PREFIXES: tl.constexpr):
    """The running maximum and sum [BLOCK_ROWS, PREFIXES], those of prefix p updated by a block of scores [r, c]."""
    at_p = tl.arange(0, PREFIXES)[None, :] == p
    m = tl.sum(tl.where(at_p, state_m, 0.0), 1)
    el = tl.sum(tl.where(at_p, state_l, 0.0), 1)
    top = tl.maximum(m, tl.max(masked, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    el = el * tl.exp(m - shift) + tl.sum(tl.exp(masked - shift[:, None]), 1)
    return tl.where(at_p, top[:, None], state_m), tl.where(at_p, el[:, None], state_l)


@triton.jit
def pair_coefficients(
    dots,
    row_scale_ptr,
    column_scale_ptr,
    lse_ptr,
    row_out_ptr,
    limit_ptr,
    rows,
    columns,
    in_rows,
    in_columns,
    hide,
    own,
    HIDE: tl.constexpr,
    KEEP: tl.constexpr,
    LIMIT: tl.constexpr,
    MINUS: tl.constexpr,
):
    """Coefficients [r, c] of the prefix that the pointers point at: (softmax - 1 at the pair if MINUS) * row_out * column_scale.

    Columns beyond the tile have a scale of 0, so their coefficients are 0.
    """
    row_scale = tl.load(row_scale_ptr + rows, mask=in_rows, other=0.0)
    column_scale = tl.load(column_scale_ptr + columns, mask=in_columns, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=0.0)
    row_out = tl.load(row_out_ptr + rows, mask=in_rows, other=0.0)
    scores = dots * row_scale[:, None] * column_scale[None, :]
    e = masked_scores(scores, limit_ptr, rows, columns, in_rows, hide, own, HIDE, KEEP, LIMIT) - lse[:, None]
    # Above 0 only for columns beyond the tile, where infinity times 0 would be NaN; the comparison preserves a true NaN.
    e = tl.exp(tl.where(e > 0.0, 0.0, e))
    if MINUS:
        e = tl.where(columns[None, :] == own[:, None], e - 1.0, e)
    return e * row_out[:, None] * column_scale[None, :]
