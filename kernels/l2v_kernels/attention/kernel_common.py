"""What the forward and the backward kernels of packed attention share. A tile has BLOCK_M rows (query token, query head)
and BLOCK_N columns (key tokens).

Rows: GROUP query heads that read one key head share a tile, token by token: row r of a tile is token first + r // GROUP,
head group * GROUP + r % GROUP. A tile of few tokens then still fills the tensor core, and reads its keys once for all of
these heads.
"""

import triton
import triton.language as tl

from l2v_kernels.philox import DOMAIN_ATTENTION
from l2v_kernels.philox_kernel import random_bytes

_DOMAIN = tl.constexpr(DOMAIN_ATTENTION)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, offsets, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] at base + offsets, int64 [rows]; columns beyond HEAD_DIM are 0."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] + columns[None, :]
    if HEAD_DIM == BLOCK_D:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(base, offsets, rows, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores rows [rows, BLOCK_D] where inside [rows], in the pointer's dtype."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] + columns[None, :]
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(source, token, head, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[TOKENS * HEADS, BLOCK_D] of a tensor descriptor [tokens, heads, D], head after head within a token.

    The copy engine (TMA) computes the addresses: one instruction a tile, where pointers take a 64-bit address a row. What lies
    outside of the tensor is 0.
    """
    return source.load([token, head, 0]).reshape([TOKENS * HEADS, BLOCK_D])


@triton.jit
def store_tile(target, token, head, rows):
    """Stores rows [tokens, BLOCK_D] of one head through a tensor descriptor, in its dtype, where they lie inside the tensor."""
    target.store([token, head, 0], rows.to(target.dtype).expand_dims(1))


@triton.jit
def store_statistics(statistics_ptr, row, first, values, inside, stride, GROUP: tl.constexpr):
    """Stores a number for each row of a query tile, values [BLOCK_M], in the order of the tile's rows."""
    offsets = tl.arange(0, values.shape[0])
    tl.store(statistics_ptr + row.to(tl.int64) * stride + first * GROUP + offsets, values, mask=inside)


@triton.jit
def load_statistics(
    statistics_ptr,
    row,
    first,
    n_tokens,
    stride,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What `store_statistics` stored for the tile of query token `first`, fp32 [BLOCK_M]; any number outside of the pack."""
    if TMA and GROUP >= 4:
        # Pointers would do, but Triton 3.6.0 then copies each number once for every thread that needs it. A descriptor's
        # rows are 16 bytes at least, so 4 heads.
        values = statistics_ptr.load([row, first, 0]).reshape([BLOCK_M])
    else:
        offsets = first * GROUP + tl.arange(0, BLOCK_M)
        if MASKED:
            offsets = tl.minimum(offsets, n_tokens * GROUP - 1)
        values = tl.load(statistics_ptr + row.to(tl.int64) * stride + offsets)
    return values


@triton.jit
def key_tokens(
    position,
    n_tokens,
    n_blocks,
    block_first_ptr,
    block_end_ptr,
    BLOCK_N: tl.constexpr,
    BLOCKED: tl.constexpr,
    RELOAD: tl.constexpr = False,
):
    """int32 [BLOCK_N]: the tokens at the key positions from `position` on, -1 where there is none.

    A position is a token's place in the pack, or, BLOCKED, its place in the sequence of all key blocks of 16. RELOAD: load
    the blocks again, where the compiler would otherwise keep an earlier load in registers over a whole loop.
    """
    offsets = tl.arange(0, BLOCK_N)
    if BLOCKED:
        block = position // 16 + offsets // 16
        known = block < n_blocks
        token = tl.load(block_first_ptr + block, mask=known, other=n_tokens, volatile=RELOAD) + offsets % 16
        end = tl.load(block_end_ptr + block, mask=known, other=0, volatile=RELOAD)
        token = tl.where(token < end, token, -1)
    else:
        token = position + offsets
    return token


@triton.jit
def key_range(
    first,
    last,
    start_ptr,
    end_ptr,
    first_block_ptr,
    window,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCKED: tl.constexpr,
):
    """(low, whole, high, shift): the query tokens first .. last need the key positions [low, high).

    All of them see the whole tiles in [low, whole), where position - shift is the token.
    """
    start, end = tl.load(start_ptr + first), tl.load(end_ptr + last)
    last_start = tl.load(start_ptr + last)
    low, high, seen_by_all = start, end, end
    if CAUSAL:
        high = tl.minimum(high, last + 1)
        seen_by_all = tl.minimum(seen_by_all, first + 1)
    if WINDOW:
        low = tl.maximum(low, first - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, last + window)
        seen_by_all = low
    shift = 0
    if BLOCKED:
        # Whole blocks only; the window's mask hides the excess.
        shift = tl.load(first_block_ptr + first) * 16 - start
        low = start + (low - start) // 16 * 16 + shift
        high = tl.load(first_block_ptr + last) * 16 + high - last_start
        seen_by_all += shift
    seen_by_all = tl.where(start == last_start, seen_by_all, low)
    whole = low + tl.maximum(seen_by_all - low, 0) // BLOCK_N * BLOCK_N
    return low, whole, high, shift


@triton.jit
def in_reach(query, key, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Where causality and window let a query token see a key token of its segment. Shapes broadcast."""
    see = query == query
    if CAUSAL:
        see = see & (key <= query)
    if WINDOW:
        see = see & (key > query - window) & (key < query + window)
    return see


@triton.jit
def visible(query, start, end, key, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Where a query token, whose segment is [start, end), may see a key token. Shapes broadcast."""
    return (key >= start) & (key < end) & in_reach(query, key, window, CAUSAL, WINDOW)


@triton.jit
def kept(seed, query, start, first_block, position, stream, head, drop_below, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: which weights dropout keeps.

    seed, query, start, first_block and head are [BLOCK_M] (seed, start and first_block may be scalars); position is that of
    the first column, a multiple of 16 from the start of the row's segment.
    """
    row = (query - start)[:, None]
    block = tl.broadcast_to(position // 16 - first_block, query.shape)[:, None]
    seed = tl.broadcast_to(seed, query.shape)[:, None]
    domain = (head * 256 + _DOMAIN)[:, None]
    return random_bytes(seed, row, block, stream, domain, BLOCK_N // 16) >= drop_below


@triton.jit
def tanh(x):
    """tanh to about one unit in the last place; the series near 0 avoids the cancellation of 1 - exp."""
    magnitude = tl.abs(x)
    decay = tl.exp(-2.0 * magnitude)
    square = x * x
    series = 1.0 + square * (-0.3333333333333333 + square * (0.13333333333333333 - square * 0.05396825396825397))
    value = tl.where(magnitude < 0.15, magnitude * series, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0.0, -value, value)


@triton.jit
def log2_scores(dots, scale_in, scale_out, SOFTCAP: tl.constexpr):
    """(scores times log2(e) of the dot products q k^T, the softcap's factor of their gradient).

    Without softcap scale_in is scale * log2(e), and the second result is not used. With it scale_in is scale / softcap,
    scale_out is softcap * log2(e), and the second result is 1 - tanh^2.
    """
    scores = dots * scale_in
    slope = scores
    if SOFTCAP:
        capped = tanh(scores)
        slope = 1.0 - capped * capped
        scores = capped * scale_out
    return scores, slope
