"""`philox.keep_bytes` inside Triton kernels."""

import triton
import triton.language as tl

from l2v_kernels.philox import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def random_bytes(seed, row, first_block, stream, domain, n_blocks: tl.constexpr):
    """int32 [rows, 16 * n_blocks] in 0 .. 255: `philox.keep_bytes` from column 16 * first_block on.

    seed int64 [rows, 1], row int32 [rows, 1], first_block and domain int32 or [rows, 1], stream int32. One Philox call
    serves 16 columns. Threads exchange words (1 byte a column) to match the layout of what the mask is for, and split
    them into bytes afterwards.
    """
    rows: tl.constexpr = row.shape[0]
    block = first_block + tl.arange(0, n_blocks)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, block, row, stream, domain, n_rounds=_ROUNDS)
    # join makes a new last axis, so the order 0, 1, 2, 3 comes from pairing (0, 2) with (1, 3).
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows, 4 * n_blocks))
    low, high = words & 0xFFFF, words >> 16
    data = tl.join(tl.join(low & 0xFF, high & 0xFF), tl.join(low >> 8, high >> 8))
    return tl.reshape(data, (rows, 16 * n_blocks)).to(tl.int32)
