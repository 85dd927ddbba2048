"""Packed attention, backward: the gradients of keys and values; kernel_query.py has the formulas and runs first."""

import triton
import triton.language as tl

from l2v_kernels.attention.kernel_common import (
    in_reach,
    kept,
    key_tokens,
    load_rows,
    load_statistics,
    load_tile,
    log2_scores,
    store_rows,
    store_tile,
)
from l2v_kernels.attention.kernel_forward import NOT_SPECIALIZED
from l2v_kernels.jit import jit


@triton.jit
def _key_step(
    dk,
    dv,
    k,
    v,
    key,
    start,
    end,
    position,
    first,
    group,
    q_ptr,
    do_ptr,
    statistics_ptr,
    n_groups,
    start_ptr,
    segment_ptr,
    first_block_ptr,
    seeds_ptr,
    n_tokens,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    stride_statistics,
    scale_in,
    scale_out,
    window,
    stream,
    drop_below,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(dk without the factor `scale`, dv without that of dropout), both [BLOCK_N, BLOCK_D], after BLOCK_M more rows."""
    rows = tl.arange(0, BLOCK_M)
    query = first + rows // GROUP
    head = group * GROUP + rows % GROUP
    token = query
    if MASKED:
        token = tl.minimum(query, n_tokens - 1)
    if TMA:
        q = load_tile(q_ptr, first, group * GROUP, BLOCK_M // GROUP, GROUP, BLOCK_D)
        do = load_tile(do_ptr, first, group * GROUP, BLOCK_M // GROUP, GROUP, BLOCK_D)
    else:
        query64, head64 = token.to(tl.int64), head.to(tl.int64)
        q = load_rows(q_ptr, query64 * stride_qt + head64 * stride_qh, HEAD_DIM, BLOCK_D)
        do = load_rows(do_ptr, query64 * stride_dot + head64 * stride_doh, HEAD_DIM, BLOCK_D)
    lse2 = load_statistics(statistics_ptr, group, first, n_tokens, stride_statistics, GROUP, BLOCK_M, TMA, MASKED)
    delta = load_statistics(
        statistics_ptr, n_groups + group, first, n_tokens, stride_statistics, GROUP, BLOCK_M, TMA, MASKED
    )

    dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    scores, slope = log2_scores(dots, scale_in, scale_out, SOFTCAP)
    weights = tl.exp2(scores - lse2[None, :])
    if MASKED:
        see = (query[None, :] - start[:, None]).to(tl.uint32) < (end - start).to(tl.uint32)[:, None]
        see = see & in_reach(query[None, :], key[:, None], window, CAUSAL, WINDOW)
        weights = tl.where(see, weights, 0.0)
    dropped_weights = weights
    if DROPOUT:
        dweights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if MASKED:
            segment, row_start = tl.load(segment_ptr + token), tl.load(start_ptr + token)
            row_block = tl.load(first_block_ptr + token)
        else:
            # A single segment: the first row's values hold for all rows.
            segment, row_start = tl.load(segment_ptr + first), tl.load(start_ptr + first)
            row_block = tl.load(first_block_ptr + first)
        seed = tl.load(seeds_ptr + segment)
        keep = tl.trans(kept(seed, query, row_start, row_block, position, stream, head, drop_below, BLOCK_N))
        dropped_weights = tl.where(keep, weights, 0.0)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    dv = tl.dot(dropped_weights.to(do.dtype), do, dv, input_precision=PRECISION)
    if not DROPOUT:
        dweights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dscores = weights * (dweights - delta[None, :])
    if SOFTCAP:
        dscores *= slope
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@jit(do_not_specialize=NOT_SPECIALIZED)
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    statistics_ptr,
    start_ptr,
    end_ptr,
    segment_ptr,
    first_block_ptr,
    block_first_ptr,
    block_end_ptr,
    seeds_ptr,
    n_tokens,
    n_blocks,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_statistics,
    scale,
    scale_in,
    scale_out,
    window,
    stream,
    drop_below,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_KEY_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Writes dk and dv [T, K, D], both with the same strides.

    Program (i, j) owns BLOCK_N key positions of key head j and adds up all query heads that read it, in a fixed order. TMA:
    q_ptr, do_ptr, dk_ptr and dv_ptr are tensor descriptors, and with 4 heads or more in a group statistics_ptr, with blocks
    [1, BLOCK_M // GROUP, GROUP]; there is no dropout then.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    position = tl.program_id(0) * BLOCK_N
    key_head = tl.program_id(1)
    key = key_tokens(position, n_tokens, n_blocks, block_first_ptr, block_end_ptr, BLOCK_N, DROPOUT)
    inside = (key >= 0) & (key < n_tokens)
    token = tl.where(inside, key, 0).to(tl.int64)
    head64 = key_head.to(tl.int64)
    # Never by TMA: the compiler keeps such tiles in registers over the whole loop, and spills.
    k = load_rows(k_ptr + head64 * stride_kh, token * stride_kt, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + head64 * stride_vh, token * stride_vt, HEAD_DIM, BLOCK_D)

    # Spare blocks own no token: first > last, and the ranges below are empty.
    first_key = tl.min(tl.where(inside, key, n_tokens))
    last_key = tl.max(tl.where(inside, key, -1))
    some = last_key >= 0
    first_start = tl.load(start_ptr + first_key, mask=some, other=0)
    last_start = tl.load(start_ptr + last_key, mask=some, other=0)
    low, high = first_start, tl.load(end_ptr + last_key, mask=some, other=0)
    # Visibility within a segment is symmetric, so a key only needs the bounds of its own segment. A key outside the pack
    # sees nothing. The keys stay while rows pass: masking by the keys' bounds keeps the mask out of the loop's registers.
    start = tl.load(start_ptr + token, mask=inside, other=0)
    end = tl.load(end_ptr + token, mask=inside, other=0)
    if CAUSAL:
        low = tl.maximum(low, first_key)
    if WINDOW:
        high = tl.minimum(high, last_key + window)
        if not CAUSAL:
            low = tl.maximum(low, first_key - window + 1)
    whole = low
    if not (CAUSAL or WINDOW):
        whole = tl.where(first_start == last_start, low + (high - low) // TOKENS * TOKENS, low)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    n_groups = tl.num_programs(1) * GROUPS_PER_KEY_HEAD
    for i in range(GROUPS_PER_KEY_HEAD):
        group = key_head * GROUPS_PER_KEY_HEAD + i
        for first in range(low, whole, TOKENS):
            dk, dv = _key_step(
                dk, dv, k, v, key, start, end, position, first, group, q_ptr, do_ptr, statistics_ptr, n_groups,
                start_ptr, segment_ptr, first_block_ptr, seeds_ptr, n_tokens,
                stride_qt, stride_qh, stride_dot, stride_doh, stride_statistics,
                scale_in, scale_out, window, stream, drop_below, keep_scale,
                HEAD_DIM, BLOCK_D, GROUP, BLOCK_M, BLOCK_N,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, TMA, MASKED=False,
            )  # fmt: skip
        for first in range(whole, high, TOKENS):
            dk, dv = _key_step(
                dk, dv, k, v, key, start, end, position, first, group, q_ptr, do_ptr, statistics_ptr, n_groups,
                start_ptr, segment_ptr, first_block_ptr, seeds_ptr, n_tokens,
                stride_qt, stride_qh, stride_dot, stride_doh, stride_statistics,
                scale_in, scale_out, window, stream, drop_below, keep_scale,
                HEAD_DIM, BLOCK_D, GROUP, BLOCK_M, BLOCK_N,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, TMA, MASKED=True,
            )  # fmt: skip
    if TMA:
        # 0, which the compiler cannot know: it computes the tile's place again instead of keeping it over the loops.
        again = tl.minimum(tl.load(start_ptr, volatile=True), 0)
        position, key_head = (tl.program_id(0) + again) * BLOCK_N, tl.program_id(1) + again
        store_tile(dk_ptr, position, key_head, dk * scale)
        store_tile(dv_ptr, position, key_head, dv)
    else:
        key = key_tokens(position, n_tokens, n_blocks, block_first_ptr, block_end_ptr, BLOCK_N, DROPOUT, RELOAD=True)
        inside = (key >= 0) & (key < n_tokens)
        rows = key.to(tl.int64) * stride_dkt + head64 * stride_dkh
        store_rows(dk_ptr, rows, dk * scale, inside, HEAD_DIM, BLOCK_D)
        store_rows(dv_ptr, rows, dv * keep_scale, inside, HEAD_DIM, BLOCK_D)
