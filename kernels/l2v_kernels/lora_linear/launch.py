"""Launchers of the LoRA kernels. Imported only where Triton is installed."""

from __future__ import annotations

import torch
import triton

from l2v_kernels.launching import PRECISION, on_device, unit_stride
from l2v_kernels.lora_linear.kernel_down import (
    DOWN_BACKWARD_CONFIG,
    DOWN_BACKWARD_PROGRAMS,
    DOWN_CONFIG,
    lora_backward_kernel,
    lora_down_kernel,
)
from l2v_kernels.lora_linear.kernel_up import (
    CHUNKS,
    MAX_BLOCK_R,
    MIN_SPLIT_TOKENS,
    ORDERED_SUM_CONFIG,
    UP_BACKWARD_CONFIG,
    UP_BACKWARD_PROGRAMS,
    lora_up_backward_kernel,
    ordered_sum_kernel,
)
from l2v_kernels.lora_linear.settings import MAX_ADAPTERS, Adapter, InputDropout, rank_slices
from l2v_kernels.philox import threshold


@on_device
def down(x_TE: torch.Tensor, adapters: tuple[Adapter, ...], dropout: InputDropout) -> torch.Tensor:
    """xa [T, sum of ranks] as `reference.down`, without masks: the backward recomputes them."""
    T, E = x_TE.shape
    xa_TR = x_TE.new_empty((T, sum(a.rank for a in adapters)))
    if xa_TR.numel() == 0:
        return xa_TR
    factors = _pad([a.scaling * dropout.scale for a in adapters], 0.0)
    x_TE, config = unit_stride(x_TE), DOWN_CONFIG[x_TE.element_size()]
    lora_down_kernel[(triton.cdiv(T, config["BLOCK_T"]),)](
        x_TE,
        _stack(adapters),
        xa_TR,
        *_keys(dropout, x_TE),
        T,
        E,
        x_TE.stride(0),
        *_pad([a.stream for a in adapters], 0),
        *factors,
        threshold(dropout.p),
        **_constants(adapters, dropout),
        **config,
    )
    return xa_TR


@on_device
def down_backward(
    x_TE: torch.Tensor,
    dxa_TR: torch.Tensor,
    adapters: tuple[Adapter, ...],
    dropout: InputDropout,
    dx_TE: torch.Tensor | None = None,
    *,
    want_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """(dx [T, E], dA [R, E] of each) as `reference.down_backward`, masks recomputed. dA in A's dtype, summed in fp32."""
    T, E = x_TE.shape
    config = DOWN_BACKWARD_CONFIG[x_TE.element_size()]
    blocks = triton.cdiv(E, config["BLOCK_E"])
    splits = max(1, min(triton.cdiv(DOWN_BACKWARD_PROGRAMS, blocks), triton.cdiv(T, 4 * config["BLOCK_T"])))
    per_split = triton.cdiv(triton.cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    add_dx = dx_TE is not None
    if want_dx and not add_dx:
        dx_TE = torch.empty((T, E), dtype=x_TE.dtype, device=x_TE.device)
    da_JRE = torch.empty((splits, dxa_TR.shape[1], E), dtype=torch.float32, device=x_TE.device)
    if T == 0:
        da_JRE.zero_()
    else:
        x_TE = unit_stride(x_TE)
        lora_backward_kernel[(blocks, splits)](
            x_TE,
            dxa_TR.contiguous(),
            _stack(adapters),
            x_TE if dx_TE is None else dx_TE,
            da_JRE,
            *_keys(dropout, x_TE),
            T,
            E,
            x_TE.stride(0),
            per_split,
            *_pad([a.stream for a in adapters], 0),
            threshold(dropout.p),
            WANT_DX=want_dx,
            ADD_DX=add_dx,
            **_constants(adapters, dropout),
            **config,
        )
    da_RE = da_JRE[0]
    if splits > 1 or x_TE.dtype != torch.float32:
        da_RE = torch.empty_like(da_RE, dtype=x_TE.dtype)
        _ordered_sum(da_JRE, da_RE, 1.0)
    return dx_TE, [da_RE[rows] for rows in rank_slices(adapters)]


def takes_up_backward(adapter: Adapter) -> bool:
    """Whether the kernel, with one read of dy for both gradients, moves fewer bytes than two matmuls."""
    return _block_r(adapter.rank) <= MAX_BLOCK_R


@on_device
def up_backward(
    dy_TO: torch.Tensor, xa_TR: torch.Tensor, b_OR: torch.Tensor, factor: float, dxa_TR: torch.Tensor
) -> torch.Tensor:
    """dB [O, R] as `reference.up_backward`, with one read of dy. Both gradients are summed in fp32 and rounded once."""
    (T, n_outputs), R = dy_TO.shape, b_OR.shape[1]
    db_OR = torch.empty_like(b_OR, memory_format=torch.contiguous_format)
    if T == 0:
        return db_OR.zero_()
    config = UP_BACKWARD_CONFIG[dy_TO.element_size(), _block_r(R)]
    blocks = triton.cdiv(n_outputs, CHUNKS * config["BLOCK_O"])
    splits = max(1, min(UP_BACKWARD_PROGRAMS // blocks, triton.cdiv(T, MIN_SPLIT_TOKENS)))
    per_split = triton.cdiv(triton.cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    splits = triton.cdiv(T, per_split)
    dy_TO, xa_TR = unit_stride(dy_TO), unit_stride(xa_TR)
    dxa_JTR = torch.empty((blocks, T, R), dtype=torch.float32, device=dy_TO.device)
    db_JOR = torch.empty((splits, n_outputs, R), dtype=torch.float32, device=dy_TO.device)
    lora_up_backward_kernel[(blocks, splits)](
        dy_TO,
        b_OR.contiguous(),
        xa_TR,
        dxa_JTR,
        db_JOR,
        T,
        n_outputs,
        dy_TO.stride(0),
        xa_TR.stride(0),
        per_split,
        RANK=R,
        BLOCK_R=_block_r(R),
        PRECISION=PRECISION,
        **config,
    )
    _ordered_sum(dxa_JTR, dxa_TR, factor)
    _ordered_sum(db_JOR, db_OR, 1.0)
    return db_OR


def _ordered_sum(parts, out, factor):
    """out [rows, width] = factor * parts [J, rows, width] summed over J."""
    n_parts, rows, width = parts.shape
    grid = (triton.cdiv(rows * width, ORDERED_SUM_CONFIG["BLOCK"]),)
    ordered_sum_kernel[grid](
        parts, out, n_parts, rows * width, out.stride(0), factor, WIDTH=width, **ORDERED_SUM_CONFIG
    )


def _block_r(rank):
    # tl.dot needs sides of at least 16.
    return max(16, triton.next_power_of_2(rank))


def _stack(adapters):
    """A of all adapters, one below the other: [sum of ranks, E]."""
    return adapters[0].a_RE.contiguous() if len(adapters) == 1 else torch.cat([a.a_RE for a in adapters])


def _pad(values, filler):
    return values + [filler] * (MAX_ADAPTERS - len(values))


def _keys(dropout, x_TE):
    # Never read without dropout, but an argument must be a tensor.
    return tuple(key_T.contiguous() for key_T in dropout.keys) if dropout.active else (x_TE, x_TE)


def _constants(adapters, dropout):
    ranks = _pad([a.rank for a in adapters], 0)
    return {
        **{f"RANK_{i}": rank for i, rank in enumerate(ranks)},
        "BLOCK_R": _block_r(max(ranks)),
        "DROPOUT": dropout.active,
        "PRECISION": PRECISION,
    }
