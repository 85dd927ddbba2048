"""Packed attention, backward: two kernels, each of which owns what it writes, so there are no atomics and the bits do
not change from run to run. The weights are recomputed from q, k and the forward's lse, dropout's mask from its Philox key.

With P the softmax, M the mask divided by the kept fraction, O = (P * M) V and delta = rowsum(dO * O):
    dV = (P * M)^T dO        dS = P * (M * (dO V^T) - delta)        dQ = scale dS K        dK = scale dS^T Q
"""

import triton
import triton.language as tl

from l2v_kernels.attention.kernel_common import (
    LOG2E,
    in_reach,
    kept,
    key_range,
    key_tokens,
    load_rows,
    log2_scores,
    store_rows,
    visible,
)
from l2v_kernels.attention.kernel_forward import NOT_SPECIALIZED


@triton.jit
def _query_step(
    dq,
    q,
    do,
    lse2,
    delta,
    k_base,
    v_base,
    stride_kt,
    stride_vt,
    position,
    key,
    query,
    head,
    start,
    end,
    seed,
    row_block,
    n_tokens,
    scale_in,
    scale_out,
    window,
    stream,
    drop_below,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq [BLOCK_M, BLOCK_D], without the factor `scale`, after BLOCK_N more keys."""
    token = key
    if MASKED:
        token = tl.minimum(tl.maximum(key, 0), n_tokens - 1)
    token = token.to(tl.int64)
    k = load_rows(k_base, token * stride_kt, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, token * stride_vt, HEAD_DIM, BLOCK_D)
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores, slope = log2_scores(dots, scale_in, scale_out, SOFTCAP)
    weights = tl.exp2(scores - lse2[:, None])
    if MASKED:
        see = visible(query[:, None], start[:, None], end[:, None], key[None, :], window, CAUSAL, WINDOW)
        weights = tl.where(see, weights, 0.0)
    dweights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        keep = kept(seed, query, start, row_block, position, stream, head, drop_below, BLOCK_N)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    dscores = weights * (dweights - delta[:, None])
    if SOFTCAP:
        dscores *= slope
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
    delta_ptr,
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
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
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
):
    """Writes dq [T, H, D] and delta fp32 [H, T]. Tiles as in the forward."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    rows = tl.arange(0, BLOCK_M)
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, n_tokens) - 1
    inside = first + rows // GROUP < n_tokens
    query = tl.minimum(first + rows // GROUP, n_tokens - 1)
    head = tl.program_id(1) * GROUP + rows % GROUP
    key_head = (tl.program_id(1) // GROUPS_PER_KEY_HEAD).to(tl.int64)
    query64, head64 = query.to(tl.int64), head.to(tl.int64)

    do = load_rows(do_ptr, query64 * stride_dot + head64 * stride_doh, HEAD_DIM, BLOCK_D)
    o = load_rows(o_ptr, query64 * stride_ot + head64 * stride_oh, HEAD_DIM, BLOCK_D)
    # delta is computed here, where do is read anyway, and written for the other kernel: no pass of its own.
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + head64 * n_tokens + query64, delta, mask=inside)
    lse2 = tl.load(lse_ptr + head64 * n_tokens + query64) * LOG2E
    q = load_rows(q_ptr, query64 * stride_qt + head64 * stride_qh, HEAD_DIM, BLOCK_D)
    start, end = tl.load(start_ptr + query), tl.load(end_ptr + query)
    seed, row_block = start, start
    if DROPOUT:
        seed = tl.load(seeds_ptr + tl.load(segment_ptr + query))
        row_block = tl.load(first_block_ptr + query)
    k_base, v_base = k_ptr + key_head * stride_kh, v_ptr + key_head * stride_vh
    low, whole, high, shift = key_range(
        first, last, start_ptr, end_ptr, first_block_ptr, window, BLOCK_N, CAUSAL, WINDOW, DROPOUT
    )

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for position in range(low, whole, BLOCK_N):
        key = position - shift + tl.arange(0, BLOCK_N)
        dq = _query_step(
            dq, q, do, lse2, delta, k_base, v_base, stride_kt, stride_vt,
            position, key, query, head, start, end, seed, row_block, n_tokens,
            scale_in, scale_out, window, stream, drop_below, keep_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, MASKED=False,
        )  # fmt: skip
    for position in range(whole, high, BLOCK_N):
        key = key_tokens(position, n_tokens, n_blocks, block_first_ptr, block_end_ptr, BLOCK_N, DROPOUT)
        dq = _query_step(
            dq, q, do, lse2, delta, k_base, v_base, stride_kt, stride_vt,
            position, key, query, head, start, end, seed, row_block, n_tokens,
            scale_in, scale_out, window, stream, drop_below, keep_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, MASKED=True,
        )  # fmt: skip
    store_rows(dq_ptr, query64 * stride_dqt + head64 * stride_dqh, dq * scale, inside, HEAD_DIM, BLOCK_D)


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
    lse_ptr,
    delta_ptr,
    start_ptr,
    segment_ptr,
    first_block_ptr,
    seeds_ptr,
    n_tokens,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
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
    MASKED: tl.constexpr,
):
    """(dk without the factor `scale`, dv without that of dropout), both [BLOCK_N, BLOCK_D], after BLOCK_M more rows."""
    rows = tl.arange(0, BLOCK_M)
    query = first + rows // GROUP
    head = group * GROUP + rows % GROUP
    token = query
    if MASKED:
        token = tl.minimum(query, n_tokens - 1)
    query64, head64 = token.to(tl.int64), head.to(tl.int64)
    q = load_rows(q_ptr, query64 * stride_qt + head64 * stride_qh, HEAD_DIM, BLOCK_D)
    do = load_rows(do_ptr, query64 * stride_dot + head64 * stride_doh, HEAD_DIM, BLOCK_D)
    lse2 = tl.load(lse_ptr + head64 * n_tokens + query64) * LOG2E
    delta = tl.load(delta_ptr + head64 * n_tokens + query64)

    dots = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    scores, slope = log2_scores(dots, scale_in, scale_out, SOFTCAP)
    weights = tl.exp2(scores - lse2[None, :])
    if MASKED:
        see = (query[None, :] >= start[:, None]) & (query[None, :] < end[:, None])
        see = see & in_reach(query[None, :], key[:, None], window, CAUSAL, WINDOW)
        weights = tl.where(see, weights, 0.0)
    dweights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dropped_weights = weights
    if DROPOUT:
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
    dscores = weights * (dweights - delta[None, :])
    if SOFTCAP:
        dscores *= slope
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
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
):
    """Writes dk and dv [T, K, D], both with the same strides.

    Program (i, j) owns BLOCK_N key positions of key head j and adds up all query heads that read it, in a fixed order.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    position = tl.program_id(0) * BLOCK_N
    key_head = tl.program_id(1)
    key = key_tokens(position, n_tokens, n_blocks, block_first_ptr, block_end_ptr, BLOCK_N, DROPOUT)
    inside = (key >= 0) & (key < n_tokens)
    token = tl.where(inside, key, 0).to(tl.int64)
    head64 = key_head.to(tl.int64)
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
    for i in range(GROUPS_PER_KEY_HEAD):
        group = key_head * GROUPS_PER_KEY_HEAD + i
        for first in range(low, whole, TOKENS):
            dk, dv = _key_step(
                dk, dv, k, v, key, start, end, position, first, group, q_ptr, do_ptr, lse_ptr, delta_ptr,
                start_ptr, segment_ptr, first_block_ptr, seeds_ptr, n_tokens,
                stride_qt, stride_qh, stride_dot, stride_doh,
                scale_in, scale_out, window, stream, drop_below, keep_scale,
                HEAD_DIM, BLOCK_D, GROUP, BLOCK_M, BLOCK_N,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, MASKED=False,
            )  # fmt: skip
        for first in range(whole, high, TOKENS):
            dk, dv = _key_step(
                dk, dv, k, v, key, start, end, position, first, group, q_ptr, do_ptr, lse_ptr, delta_ptr,
                start_ptr, segment_ptr, first_block_ptr, seeds_ptr, n_tokens,
                stride_qt, stride_qh, stride_dot, stride_doh,
                scale_in, scale_out, window, stream, drop_below, keep_scale,
                HEAD_DIM, BLOCK_D, GROUP, BLOCK_M, BLOCK_N,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, MASKED=True,
            )  # fmt: skip
    key = key_tokens(position, n_tokens, n_blocks, block_first_ptr, block_end_ptr, BLOCK_N, DROPOUT, RELOAD=True)
    inside = (key >= 0) & (key < n_tokens)
    rows = key.to(tl.int64) * stride_dkt + head64 * stride_dkh
    store_rows(dk_ptr, rows, dk * scale, inside, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, rows, dv * keep_scale, inside, HEAD_DIM, BLOCK_D)
