"""Quantising rows as Triton kernels. Bound by memory: read once (twice beyond the widest row that registers hold), written
once at half the size.

Rounding is arithmetic, and the cast to e4m3 behind it exact, so that every build gives the same bytes: Triton's own cast goes
through fp16 on sm_89, which rounds twice, and its interpreter does not carry.
"""

import torch
import triton
import triton.language as tl

WIDEST = 16384
"""As many numbers of a row as one program holds in registers."""

TILE = 4096
"""Elements a program where rows are short. Longer rows take a program each, and more warps."""

WIDE = {"BLOCK_K": 4096, "num_warps": 4}

INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
ALL_BUT_SIGN = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
BELOW_448 = tl.constexpr(0x1FFFFF)
"""What carries a mantissa above that of 448, 1.75, into the exponent, and no other."""


@triton.jit
def magnitude_bits(x):
    """|x| of fp32 as an integer: ordered as the numbers are, infinity and then NaN above all."""
    return x.to(tl.int32, bitcast=True) & ALL_BUT_SIGN


@triton.jit
def scale_of(largest):
    """(scale, 1 / scale) of rows whose largest magnitude has these bits; NaN and 0 where it is not finite."""
    exponent = tl.maximum(((largest + BELOW_448) >> 23) - 8, 1)
    finite = largest < INFINITY
    scale = tl.where(finite, exponent << 23, NAN).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def to_e4m3(x):
    """The nearest number of e4m3, ties to even; |x| at most 448.

    1.5 * 2^(e + 20), e the exponent of x but at least that of the smallest normal number, leaves a sum the 3 bits behind the
    point that e4m3 has.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & INFINITY, (127 - 6) << 23)
    shift = (exponent + ((20 << 23) | (1 << 22))).to(tl.float32, bitcast=True)
    rounded = ((x + shift) - shift).to(tl.int32, bitcast=True) | (bits & SIGN)  # the sum loses the sign of a zero
    return rounded.to(tl.float32, bitcast=True).to(tl.float8e4nv)


@triton.jit
def _load(x_ptr, at, factors_ptr, columns, in_row, mask, FACTORS: tl.constexpr):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if FACTORS:
        x *= tl.load(factors_ptr + columns, mask=in_row, other=0.0)
    return x


@triton.jit
def _quantize(x, inverse):
    # Not x times 0: that is NaN for what is not finite.
    return to_e4m3(tl.where(inverse > 0, x * inverse, 0.0))


@triton.jit(do_not_specialize=["n_rows"])
def rows_kernel(
    x_ptr,
    factors_ptr,
    q_ptr,
    scale_ptr,
    n_rows,
    stride_x,
    FACTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows that fit into registers. WIDTH is a constant so that a mask whose end is a multiple of 8 leaves accesses wide."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < n_rows
    columns = tl.arange(0, BLOCK_K)[None, :]
    in_row = columns < WIDTH
    mask = in_rows[:, None] & in_row
    x = _load(x_ptr, row[:, None] * stride_x + columns, factors_ptr, columns, in_row, mask, FACTORS)
    scale, inverse = scale_of(tl.max(magnitude_bits(x), 1))
    tl.store(scale_ptr + row, scale, mask=in_rows)
    tl.store(q_ptr + row[:, None] * WIDTH + columns, _quantize(x, inverse[:, None]), mask=mask)


@triton.jit
def wide_rows_kernel(
    x_ptr,
    factors_ptr,
    q_ptr,
    scale_ptr,
    n_columns,
    stride_x,
    FACTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A longer row a program, in two passes; the second finds it in the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.int32)
    for start in tl.range(0, n_columns, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = columns < n_columns
        x = _load(x_ptr, row * stride_x + columns, factors_ptr, columns, mask, mask, FACTORS)
        largest = tl.maximum(largest, magnitude_bits(x))
    scale, inverse = scale_of(tl.max(largest, 0))
    tl.store(scale_ptr + row, scale)
    for start in tl.range(0, n_columns, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = columns < n_columns
        x = _load(x_ptr, row * stride_x + columns, factors_ptr, columns, mask, mask, FACTORS)
        tl.store(q_ptr + row * n_columns + columns, _quantize(x, inverse), mask=mask)


def config(width: int) -> dict[str, int]:
    """The tile for rows of `width`, at most WIDEST: several short ones, or one."""
    block = triton.next_power_of_2(width)
    warps = 4 if block < 4096 else 8 if block < WIDEST else 16
    return {"BLOCK_R": max(1, min(64, TILE // block)), "BLOCK_K": block, "num_warps": warps}


def launch_quantize(x_TK: torch.Tensor, factors_K: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `l2v_kernels.fp8.quantize_rows`; arguments are checked there."""
    T, K = x_TK.shape
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    q_TK = torch.empty((T, K), dtype=torch.float8_e4m3fn, device=x_TK.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TK.device)
    if T == 0 or K == 0:
        return q_TK, scale_T.fill_(2.0**-126)
    factors = scale_T if factors_K is None else factors_K.contiguous()
    common = (x_TK, factors, q_TK, scale_T)
    has = factors_K is not None
    if K <= WIDEST:
        chosen = config(K)
        grid = (triton.cdiv(T, chosen["BLOCK_R"]),)
        rows_kernel[grid](*common, T, x_TK.stride(0), FACTORS=has, WIDTH=K, **chosen)
    else:
        wide_rows_kernel[(T,)](*common, K, x_TK.stride(0), FACTORS=has, **WIDE)
    return q_TK, scale_T
