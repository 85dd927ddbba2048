"""Packed attention, backward: the gradient of the queries, and delta for the gradient of keys and values.

The backward is two kernels, each of which owns what it writes, so there are no atomics and the bits do not change from run to
run. The weights are recomputed from q, k and the forward's lse, dropout's mask from its Philox key.

With P the softmax, M the mask divided by the kept fraction, O = (P * M) V and delta = rowsum(dO * O):
    dV = (P * M)^T dO        dS = P * (M * (dO V^T) - delta)        dQ = scale dS K        dK = scale dS^T Q
"""

import triton
import triton.language as tl

from l2v_kernels.attention.kernel_common import (
    LOG2E,
    kept,
    key_range,
    key_tokens,
    load_rows,
    load_tile,
    log2_scores,
    store_rows,
    store_statistics,
    visible,
)
from l2v_kernels.attention.kernel_forward import NOT_SPECIALIZED
from l2v_kernels.jit import jit


@triton.jit
def _query_step(
    dq,
    q,
    do,
    lse2,
    delta,
    k_base,
    v_base,
    key_head,
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
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq [BLOCK_M, BLOCK_D], without the factor `scale`, after BLOCK_N more keys."""
    token = key
    if MASKED:
        token = tl.minimum(tl.maximum(key, 0), n_tokens - 1)
    token = token.to(tl.int64)
    if TMA:
        k = load_tile(k_base, position, key_head, BLOCK_N, 1, BLOCK_D)
        v = load_tile(v_base, position, key_head, BLOCK_N, 1, BLOCK_D)
    else:
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


@jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    dq_ptr,
    lse_ptr,
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
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
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
    """Writes dq [T, H, D], and for the other kernel lse / log(2) and delta, fp32 [2, H // GROUP, T, GROUP].

    Tiles, and TMA for q, k, v and do, as in the forward.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    rows = tl.arange(0, BLOCK_M)
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, n_tokens) - 1
    inside = first + rows // GROUP < n_tokens
    query = tl.minimum(first + rows // GROUP, n_tokens - 1)
    head = tl.program_id(1) * GROUP + rows % GROUP
    key_head = tl.program_id(1) // GROUPS_PER_KEY_HEAD
    query64, head64, key_head64 = query.to(tl.int64), head.to(tl.int64), key_head.to(tl.int64)

    if TMA:
        do = load_tile(do_ptr, first, tl.program_id(1) * GROUP, TOKENS, GROUP, BLOCK_D)
        q = load_tile(q_ptr, first, tl.program_id(1) * GROUP, TOKENS, GROUP, BLOCK_D)
        k_base, v_base = k_ptr, v_ptr
    else:
        do = load_rows(do_ptr, query64 * stride_dot + head64 * stride_doh, HEAD_DIM, BLOCK_D)
        q = load_rows(q_ptr, query64 * stride_qt + head64 * stride_qh, HEAD_DIM, BLOCK_D)
        k_base, v_base = k_ptr + key_head64 * stride_kh, v_ptr + key_head64 * stride_vh
    o = load_rows(o_ptr, query64 * stride_ot + head64 * stride_oh, HEAD_DIM, BLOCK_D)
    # delta is computed here, where do is read anyway, and written for the other kernel with the scaled lse: no pass of its own.
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse2 = tl.load(lse_ptr + head64 * n_tokens + query64) * LOG2E
    store_statistics(statistics_ptr, tl.program_id(1), first, lse2, inside, stride_statistics, GROUP)
    store_statistics(
        statistics_ptr, tl.num_programs(1) + tl.program_id(1), first, delta, inside, stride_statistics, GROUP
    )
    start, end = tl.load(start_ptr + query), tl.load(end_ptr + query)
    seed, row_block = start, start
    if DROPOUT:
        seed = tl.load(seeds_ptr + tl.load(segment_ptr + query))
        row_block = tl.load(first_block_ptr + query)
    low, whole, high, shift = key_range(
        first, last, start_ptr, end_ptr, first_block_ptr, window, BLOCK_N, CAUSAL, WINDOW, DROPOUT
    )

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for position in range(low, whole, BLOCK_N):
        key = position - shift + tl.arange(0, BLOCK_N)
        dq = _query_step(
            dq, q, do, lse2, delta, k_base, v_base, key_head, stride_kt, stride_vt,
            position, key, query, head, start, end, seed, row_block, n_tokens,
            scale_in, scale_out, window, stream, drop_below, keep_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, TMA, MASKED=False,
        )  # fmt: skip
    for position in range(whole, high, BLOCK_N):
        key = key_tokens(position, n_tokens, n_blocks, block_first_ptr, block_end_ptr, BLOCK_N, DROPOUT)
        dq = _query_step(
            dq, q, do, lse2, delta, k_base, v_base, key_head, stride_kt, stride_vt,
            position, key, query, head, start, end, seed, row_block, n_tokens,
            scale_in, scale_out, window, stream, drop_below, keep_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, TMA, MASKED=True,
        )  # fmt: skip
    # From the tile's corner, so that no address of 64 bits a row is kept over the loops.
    dq_ptr += first.to(tl.int64) * stride_dqt + (tl.program_id(1) * GROUP).to(tl.int64) * stride_dqh
    store_rows(dq_ptr, rows // GROUP * stride_dqt + rows % GROUP * stride_dqh, dq * scale, inside, HEAD_DIM, BLOCK_D)
