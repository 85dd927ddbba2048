"""Launchers of the LoRA kernels. Imported only where Triton is installed."""

from __future__ import annotations

import torch

from l2v_kernels.launching import PRECISION, cdiv, on_device, unit_stride
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
from l2v_kernels.lora_linear.settings import MAX_ADAPTERS, Adapters, InputDropout, PendingSum


@on_device
def down(x_TE: torch.Tensor, adapters: Adapters, dropout: InputDropout) -> torch.Tensor:
    """xa [T, sum of ranks] as `reference.down`, without masks: the backward recomputes them."""
    T, E = x_TE.shape
    xa_TR = x_TE.new_empty((T, adapters.ranks))
    if xa_TR.numel() == 0:
        return xa_TR
    x_TE, config = unit_stride(x_TE), DOWN_CONFIG[x_TE.element_size()]
    lora_down_kernel[(cdiv(T, config["BLOCK_T"]),)](
        x_TE,
        adapters.stacked_a(),
        xa_TR,
        *_keys(dropout, x_TE),
        T,
        E,
        x_TE.stride(0),
        *adapters.streams,
        *adapters.factors(dropout),
        dropout.threshold,
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
    pending: PendingSum | None = None,
) -> torch.Tensor | None:
    """dx [T, E] as `reference.down_backward`, masks recomputed; writes dA [sum of ranks, E], contiguous, summed in fp32.

    pending: takes the last addition of dA, if there is one.
    """
    T, E = x_TE.shape
    config = DOWN_BACKWARD_CONFIG[x_TE.element_size()]
    blocks = cdiv(E, config["BLOCK_E"])
    splits = max(1, min(cdiv(DOWN_BACKWARD_PROGRAMS, blocks), cdiv(T, 4 * config["BLOCK_T"])))
    per_split = cdiv(cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
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
        *adapters.streams,
        dropout.threshold,
        WANT_DX=want_dx,
        ADD_DX=add_dx,
        **_constants(adapters, dropout),
        **config,
    )
    if not at_once and pending is not None:
        pending.put(da_JRE, da_RE)
    elif not at_once:
        _ordered_sum(da_JRE, da_RE)
    return dx_TE


def finish(pending: PendingSum) -> None:
    """Add what is pending."""
    if (kept := pending.take()) is not None:
        _ordered_sum(*kept)


@on_device
def _ordered_sum(parts: torch.Tensor, out: torch.Tensor) -> None:
    n = out.numel()
    grid = (cdiv(n, ORDERED_SUM_CONFIG["BLOCK"]),)
    ordered_sum_kernel[grid](parts, out, len(parts), n, **ORDERED_SUM_CONFIG)


def takes_up_backward(adapters: Adapters) -> bool:
    """Whether the kernel, with one read of dy for both gradients, moves fewer bytes than two matmuls an adapter."""
    return adapters.block_r <= MAX_BLOCK_R


@on_device
def up_backward(
    dy_TO: torch.Tensor,
    xa_TR: torch.Tensor,
    sizes: tuple[int, ...],
    adapters: Adapters,
    dropout: InputDropout,
    dxa_TR: torch.Tensor,
    db: torch.Tensor,
    pending: PendingSum | None = None,
) -> None:
    """Gradients as `reference.up_backward` of up to three adapters of one rank: dxa [T, n R], and all dB, flat, contiguous.

    dy is read once; both are summed in fp32 and rounded once. sizes: columns of dy [T, O] of each linear of the group. pending:
    what another group has left to add, added in the same launch.
    """
    T, R = dy_TO.shape[0], adapters[0].rank
    if T == 0:
        db.zero_()
        return
    config = UP_BACKWARD_CONFIG[dy_TO.element_size(), adapters.block_r]
    block_o = CHUNKS * config["BLOCK_O"]
    blocks = [cdiv(n, block_o) for n in adapters.outputs]
    n_blocks = sum(blocks)
    splits = max(1, min(UP_BACKWARD_PROGRAMS // n_blocks, cdiv(T, MIN_SPLIT_TOKENS)))
    per_split = cdiv(cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    splits = cdiv(T, per_split)
    dy_TO, xa_TR = unit_stride(dy_TO), unit_stride(xa_TR)
    dxa_JTR = torch.empty((n_blocks, T, R), dtype=torch.float32, device=dy_TO.device)
    db_JN = torch.empty((splits, db.numel()), dtype=torch.float32, device=dy_TO.device)
    lora_up_backward_kernel[(n_blocks, splits)](
        dy_TO,
        adapters.stacked_b(),
        xa_TR,
        dxa_JTR,
        db_JN,
        T,
        *adapters.starts(sizes),
        *_pad(adapters.outputs, 0),
        dy_TO.stride(0),
        xa_TR.stride(0),
        per_split,
        RANK=R,
        BLOCK_R=adapters.block_r,
        PRECISION=PRECISION,
        **config,
    )
    block = ORDERED_SUM_CONFIG["BLOCK"]
    n_db = db.numel()
    dxa_programs, db_programs = cdiv(dxa_TR.numel(), block), cdiv(n_db, block)
    kept = pending.take() if pending is not None else None
    parts, out = kept or (db_JN, db)  # an argument must be a tensor; without programs it is not read
    n_out = out.numel() if kept else 0
    up_sums_kernel[(dxa_programs + db_programs + cdiv(n_out, block),)](
        dxa_JTR,
        db_JN,
        parts,
        dxa_TR,
        db,
        out,
        T,
        splits,
        len(parts),
        len(adapters),
        n_db,
        n_out,
        *_pad(blocks, 0),
        *adapters.factors(dropout),
        dxa_programs,
        db_programs,
        dxa_TR.stride(0),
        RANK=R,
        **ORDERED_SUM_CONFIG,
    )


def _pad(values, filler):
    return values + [filler] * (MAX_ADAPTERS - len(values))


def _keys(dropout, x_TE):
    # Never read without dropout, but an argument must be a tensor.
    return tuple(key_T.contiguous() for key_T in dropout.keys) if dropout.active else (x_TE, x_TE)


def _constants(adapters, dropout):
    ranks = adapters.padded_ranks
    return {
        "RANK_0": ranks[0],
        "RANK_1": ranks[1],
        "RANK_2": ranks[2],
        "BLOCK_R": adapters.block_r,
        "DROPOUT": dropout.active,
        "PRECISION": PRECISION,
    }
