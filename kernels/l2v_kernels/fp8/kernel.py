"""Quantising rows as Triton kernels. Bound by memory: rows are read once (twice where registers cannot hold them) and
written once at half the size.

Rounding is done in arithmetic, and the cast to e4m3 after it is exact, so every build gives the same bytes: Triton's own
cast goes through fp16 on sm_89, which rounds twice, and its interpreter does not carry into the exponent.
"""

import torch
import triton
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import cdiv, on_device, power_of_2, unit_stride

MAX_WIDTH = 16384
"""Elements of the longest row that one program holds in registers."""

TILE_ELEMENTS = 4096
"""Elements a program where rows are short. Longer rows take one program each, with more warps."""

WIDE_CONFIG = {2: {"BLOCK_E": 4096, "num_warps": 8}, 4: {"BLOCK_E": 4096, "num_warps": 4}}
"""By bytes an element: with other warps Triton 3.6 spills on sm_100 (16-bit) or sm_90 (fp32)."""

INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
ALL_BUT_SIGN = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
BELOW_448 = tl.constexpr(0x1FFFFF)
"""Added to the bits, it carries a mantissa above that of 448, which is 1.75, into the exponent, and no other."""


@triton.jit
def magnitude_bits(x):
    """|x| of fp32 as an integer, in the same order as the numbers; infinity and then NaN come last."""
    return x.to(tl.int32, bitcast=True) & ALL_BUT_SIGN


@triton.jit
def scale_of(largest):
    """(scale, 1 / scale) of rows whose largest magnitude has these bits; (NaN, 0) where that is NaN or Inf."""
    exponent = tl.maximum(((largest + BELOW_448) >> 23) - 8, 1)
    finite = largest < INFINITY
    scale = tl.where(finite, exponent << 23, NAN).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def to_e4m3(x):
    """The nearest number of e4m3, ties to even; |x| at most 448.

    Adding 1.5 * 2^(e + 20), e the exponent of x but at least that of the smallest normal number, leaves the sum the 3
    fraction bits that e4m3 has.
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
    # Masked, not multiplied by 0: NaN or Inf times 0 is NaN.
    return to_e4m3(tl.where(inverse > 0, x * inverse, 0.0))


@jit(do_not_specialize=["n_rows"])
def rows_kernel(
    x_ptr,
    factors_ptr,
    q_ptr,
    scale_ptr,
    n_rows,
    stride_x,
    FACTORS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows that fit into registers. WIDTH is a constant: a mask that ends at a multiple of 8 then leaves accesses wide."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < n_rows
    columns = tl.arange(0, BLOCK_E)[None, :]
    in_row = columns < WIDTH
    mask = in_rows[:, None] & in_row
    x = _load(x_ptr, row[:, None] * stride_x + columns, factors_ptr, columns, in_row, mask, FACTORS)
    scale, inverse = scale_of(tl.max(magnitude_bits(x), 1))
    tl.store(scale_ptr + row, scale, mask=in_rows)
    tl.store(q_ptr + row[:, None] * WIDTH + columns, _quantize(x, inverse[:, None]), mask=mask)


@jit()
def wide_rows_kernel(
    x_ptr,
    factors_ptr,
    q_ptr,
    scale_ptr,
    n_columns,
    stride_x,
    FACTORS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One longer row a program, in two passes; the second reads it from the L2 cache."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_E,), tl.int32)
    for start in tl.range(0, n_columns, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        mask = columns < n_columns
        x = _load(x_ptr, row * stride_x + columns, factors_ptr, columns, mask, mask, FACTORS)
        largest = tl.maximum(largest, magnitude_bits(x))
    scale, inverse = scale_of(tl.max(largest, 0))
    tl.store(scale_ptr + row, scale)
    for start in tl.range(0, n_columns, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        mask = columns < n_columns
        x = _load(x_ptr, row * stride_x + columns, factors_ptr, columns, mask, mask, FACTORS)
        tl.store(q_ptr + row * n_columns + columns, _quantize(x, inverse), mask=mask)


def config(width: int) -> dict[str, int]:
    """The tile for rows of `width` elements, at most MAX_WIDTH: several short rows, or one."""
    block = power_of_2(width)
    warps = 4 if block < 4096 else 8 if block < MAX_WIDTH else 16
    return {"BLOCK_ROWS": max(1, min(64, TILE_ELEMENTS // block)), "BLOCK_E": block, "num_warps": warps}


@on_device
def launch_quantize(x_TE: torch.Tensor, factors_E: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(q [T, E], scale [T]). Arguments as in `l2v_kernels.fp8.quantize_rows`, which checks them."""
    T, E = x_TE.shape
    x_TE = unit_stride(x_TE)
    q_TE = torch.empty((T, E), dtype=torch.float8_e4m3fn, device=x_TE.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TE.device)
    if T == 0 or E == 0:
        return q_TE, scale_T.fill_(2.0**-126)
    factors = scale_T if factors_E is None else factors_E.contiguous()
    common = (x_TE, factors, q_TE, scale_T)
    has = factors_E is not None
    if E <= MAX_WIDTH:
        chosen = config(E)
        grid = (cdiv(T, chosen["BLOCK_ROWS"]),)
        rows_kernel[grid](*common, T, x_TE.stride(0), FACTORS=has, WIDTH=E, **chosen)
    else:
        wide_rows_kernel[(T,)](*common, E, x_TE.stride(0), FACTORS=has, **WIDE_CONFIG[x_TE.element_size()])
    return q_TE, scale_T
