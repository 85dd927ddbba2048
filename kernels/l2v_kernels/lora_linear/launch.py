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
    up_sums_kernel,
)
from l2v_kernels.lora_linear.settings import MAX_ADAPTERS, Adapters, InputDropout
from l2v_kernels.philox import threshold


@on_device
def down(x_TE: torch.Tensor, adapters: Adapters, dropout: InputDropout) -> torch.Tensor:
    """xa [T, sum of ranks] as `reference.down`, without masks: the backward recomputes them."""
    T, E = x_TE.shape
    xa_TR = x_TE.new_empty((T, adapters.ranks))
    if xa_TR.numel() == 0:
        return xa_TR
    factors = _pad([a.scaling * dropout.scale for a in adapters], 0.0)
    x_TE, config = unit_stride(x_TE), DOWN_CONFIG[x_TE.element_size()]
    lora_down_kernel[(triton.cdiv(T, config["BLOCK_T"]),)](
        x_TE,
        adapters.stacked_a(),
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
    adapters: Adapters,
    dropout: InputDropout,
    dx_TE: torch.Tensor | None,
    da_RE: torch.Tensor,
    *,
    want_dx: bool,
) -> torch.Tensor | None:
    """dx [T, E] as `reference.down_backward`, masks recomputed; writes dA [sum of ranks, E], contiguous, summed in fp32."""
    T, E = x_TE.shape
    config = DOWN_BACKWARD_CONFIG[x_TE.element_size()]
    blocks = triton.cdiv(E, config["BLOCK_E"])
    splits = max(1, min(triton.cdiv(DOWN_BACKWARD_PROGRAMS, blocks), triton.cdiv(T, 4 * config["BLOCK_T"])))
    per_split = triton.cdiv(triton.cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    add_dx = dx_TE is not None
    if want_dx and not add_dx:
        dx_TE = torch.empty((T, E), dtype=x_TE.dtype, device=x_TE.device)
    if T == 0:
        da_RE.zero_()
        return dx_TE
    at_once = splits == 1 and da_RE.dtype == torch.float32
    da_JRE = da_RE if at_once else torch.empty((splits, *da_RE.shape), dtype=torch.float32, device=x_TE.device)
    x_TE = unit_stride(x_TE)
    lora_backward_kernel[(blocks, splits)](
        x_TE,
        dxa_TR.contiguous(),
        adapters.stacked_a(),
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
    if not at_once:
        grid = (triton.cdiv(da_RE.numel(), ORDERED_SUM_CONFIG["BLOCK"]),)
        ordered_sum_kernel[grid](da_JRE, da_RE, splits, da_RE.numel(), **ORDERED_SUM_CONFIG)
    return dx_TE


def takes_up_backward(adapters: Adapters) -> bool:
    """Whether the kernel, with one read of dy for both gradients, moves fewer bytes than two matmuls an adapter."""
    return _block_r(adapters[0].rank) <= MAX_BLOCK_R


@on_device
def up_backward(
    dy_TO: torch.Tensor,
    xa_TR: torch.Tensor,
    sizes: tuple[int, ...],
    adapters: Adapters,
    dropout: InputDropout,
    dxa_TR: torch.Tensor,
    db: torch.Tensor,
) -> None:
    """Gradients as `reference.up_backward` of up to three adapters of one rank: dxa [T, n R], and all dB, flat, contiguous.

    dy is read once; both are summed in fp32 and rounded once. sizes: columns of dy [T, O] of each linear of the group.
    """
    T, R = dy_TO.shape[0], adapters[0].rank
    if T == 0:
        db.zero_()
        return
    starts = [sum(sizes[: a.part]) for a in adapters]
    config = UP_BACKWARD_CONFIG[dy_TO.element_size(), _block_r(R)]
    outputs = [a.b_OR.shape[0] for a in adapters]
    blocks = [triton.cdiv(n, CHUNKS * config["BLOCK_O"]) for n in outputs]
    splits = max(1, min(UP_BACKWARD_PROGRAMS // sum(blocks), triton.cdiv(T, MIN_SPLIT_TOKENS)))
    per_split = triton.cdiv(triton.cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    splits = triton.cdiv(T, per_split)
    dy_TO, xa_TR = unit_stride(dy_TO), unit_stride(xa_TR)
    dxa_JTR = torch.empty((sum(blocks), T, R), dtype=torch.float32, device=dy_TO.device)
    db_JN = torch.empty((splits, db.numel()), dtype=torch.float32, device=dy_TO.device)
    lora_up_backward_kernel[(sum(blocks), splits)](
        dy_TO,
        adapters.stacked_b(),
        xa_TR,
        dxa_JTR,
        db_JN,
        T,
        *_pad(starts, 0),
        *_pad(outputs, 0),
        dy_TO.stride(0),
        xa_TR.stride(0),
        per_split,
        RANK=R,
        BLOCK_R=_block_r(R),
        PRECISION=PRECISION,
        **config,
    )
    block = ORDERED_SUM_CONFIG["BLOCK"]
    dxa_programs = triton.cdiv(dxa_TR.numel(), block)
    up_sums_kernel[(dxa_programs + triton.cdiv(db.numel(), block),)](
        dxa_JTR,
        db_JN,
        dxa_TR,
        db,
        T,
        splits,
        db.numel(),
        *_pad(blocks, 0),
        *_pad([a.scaling * dropout.scale for a in adapters], 0.0),
        dxa_programs,
        dxa_TR.stride(0),
        RANK=R,
        ADAPTERS=len(adapters),
        **ORDERED_SUM_CONFIG,
    )


def _block_r(rank):
    # tl.dot needs sides of at least 16.
    return max(16, triton.next_power_of_2(rank))


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
