"""Pooling of segments as Triton kernels. Bound by memory: token states are read once, and never written, not even normalised.

Segments are cut into pieces of PIECE tokens, counted from their own first token, and each program pools one: few long
segments and many short ones both fill the device. Piece j of segment s has number cu_seqlens[s] // PIECE + s + j, which
no other piece has (a segment of n tokens, wherever it starts, crosses at least ceil(n / PIECE) - 1 multiples of PIECE). So
T // PIECE + S programs are enough whatever the lengths are, and the host launches them without reading cu_seqlens.
"""

import torch
import triton
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import cdiv, on_device, power_of_2, unit_stride
from l2v_kernels.rms_norm.kernel import load_factor
from l2v_kernels.segment_pool.reference import MIN_TOTAL

PIECE = 32
"""Tokens a piece. The partial sums of a long segment then cost 1/8 of the bytes of its bf16 states."""
TILE_ELEMENTS = 4096
"""Elements of the tile that a program moves over its piece."""
COMBINE_CONFIG = {"BLOCK_J": 16, "BLOCK_E": 512, "num_warps": 8}

_MIN_TOTAL = tl.constexpr(MIN_TOTAL)


@triton.jit
def segment_bounds(cu_ptr, segment, n_tokens):
    """First token and end of a segment, clamped into the pack."""
    begin = tl.load(cu_ptr + segment).to(tl.int64)
    end = tl.load(cu_ptr + segment + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), n_tokens)
    return begin, tl.minimum(tl.maximum(end, begin), n_tokens)


@triton.jit
def find_piece(cu_ptr, number, n_segments, n_tokens, PIECE: tl.constexpr):
    """(segment, first token, end, pieces of that segment) of a piece by its number; first >= end if it does not exist."""
    low, high = tl.full([], 0, tl.int32), n_segments
    while high - low > 1:
        middle = (low + high) // 2
        begin, end = segment_bounds(cu_ptr, middle, n_tokens)
        inside = begin // PIECE + middle <= number
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle)
    begin, end = segment_bounds(cu_ptr, low, n_tokens)
    piece = number - (begin // PIECE + low)
    at = begin + piece * PIECE
    # Below 0 only if cu_seqlens does not start at 0.
    return low, at, tl.where(piece < 0, 0, tl.minimum(at + PIECE, end)), tl.cdiv(end - begin, PIECE)


@jit(do_not_specialize=["n_segments", "n_tokens"])
def pool_kernel(
    x_ptr,
    weights_ptr,
    cu_ptr,
    norm_weight_ptr,
    vectors_ptr,
    totals_ptr,
    rstd_ptr,
    partial_ptr,
    partial_totals_ptr,
    n_segments,
    n_tokens,
    stride_x,
    eps,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program i sums weight * x, or (NORM) weight * rstd * x, over piece i.

    That is the vector of a segment of one piece, else a partial sum [J, WIDTH]. A token of weight 0 is not read.
    """
    number = tl.program_id(0)
    segment, begin, end, n_pieces = find_piece(cu_ptr, number, n_segments, n_tokens, PIECE)
    if begin < end:
        column = tl.arange(0, BLOCK_E)[None, :]
        in_columns = column < WIDTH
        sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        for at in range(begin, end, BLOCK_T):
            token = at + tl.arange(0, BLOCK_T)
            weight = tl.load(weights_ptr + token, mask=token < end, other=0.0)
            total += weight
            used = weight != 0.0
            x_at = (token * stride_x)[:, None] + column
            x = tl.load(x_ptr + x_at, mask=used[:, None] & in_columns, other=0.0).to(tl.float32)
            if NORM:
                rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
                tl.store(rstd_ptr + token, rstd, mask=used)
                weight *= rstd
            # Masked, not multiplied by weight 0: the rstd of zeros may be infinite.
            sums += tl.where(used[:, None], weight[:, None] * x, 0.0)
        vector, total = tl.sum(sums, 0)[None, :], tl.sum(total, 0)
        if n_pieces == 1:
            vector /= tl.maximum(total, _MIN_TOTAL)
            if NORM:
                vector *= load_factor(norm_weight_ptr, column, OFFSET, WIDTH)
            tl.store(vectors_ptr + segment.to(tl.int64) * WIDTH + column, vector, mask=in_columns)
            tl.store(totals_ptr + segment, total)
        else:
            tl.store(partial_ptr + number.to(tl.int64) * WIDTH + column, vector, mask=in_columns)
            tl.store(partial_totals_ptr + number, total)


@jit(do_not_specialize=["n_tokens"])
def combine_kernel(
    cu_ptr,
    norm_weight_ptr,
    partial_ptr,
    partial_totals_ptr,
    vectors_ptr,
    totals_ptr,
    n_tokens,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (s, i): column block i of the vector of segment s from its partial sums, zeros where it has none."""
    segment = tl.program_id(0)
    begin, end = segment_bounds(cu_ptr, segment, n_tokens)
    n_pieces = tl.cdiv(end - begin, PIECE)
    if n_pieces != 1:
        column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
        in_columns = column < WIDTH
        sums = tl.zeros([BLOCK_J, BLOCK_E], tl.float32)
        total = tl.zeros([BLOCK_J], tl.float32)
        first = begin // PIECE + segment
        for at in range(first, first + n_pieces, BLOCK_J):
            number = at + tl.arange(0, BLOCK_J)
            in_segment = number < first + n_pieces
            total += tl.load(partial_totals_ptr + number, mask=in_segment, other=0.0)
            partial_at = (number * WIDTH)[:, None] + column
            sums += tl.load(partial_ptr + partial_at, mask=in_segment[:, None] & in_columns, other=0.0)
        whole = tl.sum(total, 0)
        vector = tl.sum(sums, 0)[None, :] / tl.maximum(whole, _MIN_TOTAL)
        if NORM:
            vector *= load_factor(norm_weight_ptr, column, OFFSET, WIDTH)
        tl.store(vectors_ptr + segment.to(tl.int64) * WIDTH + column, vector, mask=in_columns)
        if tl.program_id(1) == 0:
            tl.store(totals_ptr + segment, whole)


@jit(do_not_specialize=["n_segments", "n_tokens"])
def pool_backward_kernel(
    dvectors_ptr,
    x_ptr,
    weights_ptr,
    cu_ptr,
    norm_weight_ptr,
    rstd_ptr,
    totals_ptr,
    dx_ptr,
    n_segments,
    n_tokens,
    stride_x,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dx of piece i, [T, WIDTH], contiguous: weight * g, or (NORM) weight * rstd * (g - unit * mean(g * unit)).

    g = dvector * (OFFSET + norm_weight) / total is the same for all tokens of a piece, and unit = x * rstd.
    """
    number = tl.program_id(0)
    segment, begin, end, _ = find_piece(cu_ptr, number, n_segments, n_tokens, PIECE)
    if begin < end:
        column = tl.arange(0, BLOCK_E)[None, :]
        in_columns = column < WIDTH
        g = tl.load(dvectors_ptr + segment.to(tl.int64) * WIDTH + column, mask=in_columns, other=0.0)
        g /= tl.maximum(tl.load(totals_ptr + segment), _MIN_TOTAL)
        if NORM:
            g *= load_factor(norm_weight_ptr, column, OFFSET, WIDTH)
        for at in range(begin, end, BLOCK_T):
            token = at + tl.arange(0, BLOCK_T)
            in_piece = token < end
            weight = tl.load(weights_ptr + token, mask=in_piece, other=0.0)
            used = (weight != 0.0)[:, None]
            if NORM:
                rstd = tl.load(rstd_ptr + token, mask=weight != 0.0, other=0.0)
                x_at = (token * stride_x)[:, None] + column
                unit = tl.load(x_ptr + x_at, mask=used & in_columns, other=0.0).to(tl.float32) * rstd[:, None]
                mean = tl.sum(g * unit, 1) / WIDTH
                dx = (weight * rstd)[:, None] * (g - unit * mean[:, None])
            else:
                dx = weight[:, None] * g
            dx = tl.where(used, dx, 0.0).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + (token * WIDTH)[:, None] + column, dx, mask=in_piece[:, None] & in_columns)


def config(width: int) -> dict[str, int]:
    """The tile for states of `width` elements: several tokens where they are short, else one."""
    block = power_of_2(width)
    return {
        "BLOCK_T": max(1, min(PIECE, TILE_ELEMENTS // block)),
        "BLOCK_E": block,
        "num_warps": 8 if block < 16384 else 32,
    }


@on_device
def launch_forward(
    x_TE: torch.Tensor,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    eps: float,
    vectors_SE: torch.Tensor,
    totals_S: torch.Tensor,
    rstd_T: torch.Tensor | None,
    offset: float = 0.0,
) -> None:
    """Writes vectors and totals, contiguous, and with a norm rstd. See `op.forward`."""
    (T, E), S = x_TE.shape, len(cu_seqlens) - 1
    if S == 0:
        return
    x_TE, weights_T, cu_seqlens = unit_stride(x_TE), weights_T.contiguous(), cu_seqlens.contiguous()
    norm, norm_weight_E = norm_weight_E is not None, vectors_SE if norm_weight_E is None else norm_weight_E.contiguous()
    n_pieces = T // PIECE + S
    partial_JE, partial_J = vectors_SE.new_empty(n_pieces, E), vectors_SE.new_empty(n_pieces)
    constants = {"NORM": norm, "OFFSET": float(offset), "WIDTH": E, "PIECE": PIECE}
    pool_kernel[(n_pieces,)](
        x_TE,
        weights_T,
        cu_seqlens,
        norm_weight_E,
        vectors_SE,
        totals_S,
        totals_S if rstd_T is None else rstd_T,
        partial_JE,
        partial_J,
        S,
        T,
        x_TE.stride(0),
        eps,
        **constants,
        **config(E),
    )
    combine_kernel[(S, cdiv(E, COMBINE_CONFIG["BLOCK_E"]))](
        cu_seqlens, norm_weight_E, partial_JE, partial_J, vectors_SE, totals_S, T, **constants, **COMBINE_CONFIG
    )


@on_device
def launch_backward(
    dvectors_SE: torch.Tensor,
    x_TE: torch.Tensor | None,
    weights_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight_E: torch.Tensor | None,
    rstd_T: torch.Tensor | None,
    totals_S: torch.Tensor,
    dx_TE: torch.Tensor,
    offset: float = 0.0,
) -> torch.Tensor:
    """Writes dx, contiguous, and returns it. See `op.backward`."""
    (T, E), S = dx_TE.shape, len(cu_seqlens) - 1
    if T == 0 or S == 0:
        return dx_TE
    # What a pooling without a norm lacks is never read, but an argument must be a tensor.
    x_TE = dx_TE if x_TE is None else unit_stride(x_TE)
    pool_backward_kernel[(T // PIECE + S,)](
        dvectors_SE.contiguous(),
        x_TE,
        weights_T.contiguous(),
        cu_seqlens.contiguous(),
        dvectors_SE if norm_weight_E is None else norm_weight_E.contiguous(),
        totals_S if rstd_T is None else rstd_T,
        totals_S,
        dx_TE,
        S,
        T,
        x_TE.stride(0),
        NORM=norm_weight_E is not None,
        OFFSET=float(offset),
        WIDTH=E,
        PIECE=PIECE,
        **config(E),
    )
    return dx_TE
