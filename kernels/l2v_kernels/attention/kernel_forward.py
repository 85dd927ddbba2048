"""Packed attention, forward: one pass over the keys with a running softmax (Milakov and Gimelshein 2018; Dao 2022).

Program (i, j) owns tile i of the pack, BLOCK_M // GROUP consecutive tokens of any segments, for the query heads of group j.
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
    visible,
)
from l2v_kernels.jit import jit

NOT_SPECIALIZED = ("n_tokens", "n_blocks", "window", "stream", "drop_below")
"""Arguments whose values must not trigger another compilation."""


@triton.jit
def _forward_step(
    acc,
    total,
    peak,
    q,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(acc [BLOCK_M, BLOCK_D], total [BLOCK_M], peak [BLOCK_M]) after BLOCK_N more keys."""
    token = key
    if MASKED:
        token = tl.minimum(tl.maximum(key, 0), n_tokens - 1)
    token = token.to(tl.int64)
    if TMA:
        k = load_tile(k_base, position, key_head, BLOCK_N, 1, BLOCK_D)
    else:
        k = load_rows(k_base, token * stride_kt, HEAD_DIM, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not FOLD:
        scores, _ = log2_scores(scores, scale_in, scale_out, SOFTCAP)
    if MASKED:
        see = visible(query[:, None], start[:, None], end[:, None], key[None, :], window, CAUSAL, WINDOW)
        scores = tl.where(see, scores, float("-inf"))
    # peak starts at a finite number, so a row that has seen no key of its segment yet stays at total 0, not NaN.
    if FOLD:
        # One multiply-add a weight: the largest dot is the largest score too, as the scale is positive.
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_in)
        weights = tl.exp2(scores * scale_in - new_peak[:, None])
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if DROPOUT:
        keep = kept(seed, query, start, row_block, position, stream, head, drop_below, BLOCK_N)
        weights = tl.where(keep, weights, 0.0)
    if TMA:
        v = load_tile(v_base, position, key_head, BLOCK_N, 1, BLOCK_D)
    else:
        v = load_rows(v_base, token * stride_vt, HEAD_DIM, BLOCK_D)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_peak


@jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
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
    FOLD: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Writes o [T, H, D] and lse fp32 [H, T], the natural logarithm of the sum of exp(scores).

    TMA: q_ptr, k_ptr and v_ptr are tensor descriptors with blocks [BLOCK_M // GROUP, GROUP, BLOCK_D] and [BLOCK_N, 1, BLOCK_D];
    there is no dropout then. FOLD: the scale is positive and there is no softcap.
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
        q = load_tile(q_ptr, first, tl.program_id(1) * GROUP, TOKENS, GROUP, BLOCK_D)
        k_base, v_base = k_ptr, v_ptr
    else:
        q = load_rows(q_ptr, query64 * stride_qt + head64 * stride_qh, HEAD_DIM, BLOCK_D)
        k_base, v_base = k_ptr + key_head64 * stride_kh, v_ptr + key_head64 * stride_vh
    start, end = tl.load(start_ptr + query), tl.load(end_ptr + query)
    seed, row_block = start, start
    if DROPOUT:
        seed = tl.load(seeds_ptr + tl.load(segment_ptr + query))
        row_block = tl.load(first_block_ptr + query)
    low, whole, high, shift = key_range(
        first, last, start_ptr, end_ptr, first_block_ptr, window, BLOCK_N, CAUSAL, WINDOW, DROPOUT
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    for position in range(low, whole, BLOCK_N):
        key = position - shift + tl.arange(0, BLOCK_N)
        acc, total, peak = _forward_step(
            acc, total, peak, q, k_base, v_base, key_head, stride_kt, stride_vt,
            position, key, query, head, start, end, seed, row_block, n_tokens,
            scale_in, scale_out, window, stream, drop_below,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, FOLD, DROPOUT, PRECISION, TMA, MASKED=False,
        )  # fmt: skip
    for position in range(whole, high, BLOCK_N):
        key = key_tokens(position, n_tokens, n_blocks, block_first_ptr, block_end_ptr, BLOCK_N, DROPOUT)
        acc, total, peak = _forward_step(
            acc, total, peak, q, k_base, v_base, key_head, stride_kt, stride_vt,
            position, key, query, head, start, end, seed, row_block, n_tokens,
            scale_in, scale_out, window, stream, drop_below,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, FOLD, DROPOUT, PRECISION, TMA, MASKED=True,
        )  # fmt: skip

    acc = acc * (keep_scale / total)[:, None]
    store_rows(o_ptr, query64 * stride_ot + head64 * stride_oh, acc, inside, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head64 * n_tokens + query64, (peak + tl.log2(total)) / LOG2E, mask=inside)
