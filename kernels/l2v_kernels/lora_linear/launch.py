"""From tensors to launches. Imported only where Triton is."""

from __future__ import annotations

import torch
import triton

from l2v_kernels.lora_linear.kernel import BACKWARD, DOWN, PROGRAMS, lora_backward_kernel, lora_down_kernel
from l2v_kernels.lora_linear.settings import MAX_ADAPTERS, Adapter, Noise, rank_slices
from l2v_kernels.lora_linear.up_kernel import (
    CHUNKS,
    MAX_BLOCK_R,
    ORDERED_SUM,
    UP_BACKWARD,
    UP_PROGRAMS,
    UP_TOKENS,
    lora_up_backward_kernel,
    ordered_sum_kernel,
)
from l2v_kernels.philox import threshold


def down(x_TE: torch.Tensor, adapters: tuple[Adapter, ...], noise: Noise) -> torch.Tensor:
    """As `reference.down`, without masks: they are made anew from the addresses."""
    T, E = x_TE.shape
    xa_TR = x_TE.new_empty((T, sum(a.rank for a in adapters)))
    if xa_TR.numel() == 0:
        return xa_TR
    factors = _pad([a.scaling * noise.scale for a in adapters], 0.0)
    x_TE, config = _last_stride_1(x_TE), DOWN[x_TE.element_size()]
    lora_down_kernel[(triton.cdiv(T, config["BLOCK_T"]),)](
        x_TE,
        _stack(adapters),
        xa_TR,
        *_addresses(noise, x_TE),
        T,
        E,
        x_TE.stride(0),
        *_pad([a.stream for a in adapters], 0),
        *factors,
        threshold(noise.p),
        **_constants(adapters, noise),
        **config,
    )
    return xa_TR


def down_backward(
    x_TE: torch.Tensor,
    dxa_TR: torch.Tensor,
    adapters: tuple[Adapter, ...],
    noise: Noise,
    dx_TE: torch.Tensor | None = None,
    *,
    want_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """As `reference.down_backward`, with masks made anew. dA comes in A's dtype, summed in fp32."""
    T, E = x_TE.shape
    config = BACKWARD[x_TE.element_size()]
    blocks = triton.cdiv(E, config["BLOCK_E"])
    splits = max(1, min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(T, 4 * config["BLOCK_T"])))
    per_split = triton.cdiv(triton.cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    add = dx_TE is not None
    if want_dx and not add:
        dx_TE = torch.empty((T, E), dtype=x_TE.dtype, device=x_TE.device)
    da_SRE = torch.empty((splits, dxa_TR.shape[1], E), dtype=torch.float32, device=x_TE.device)
    if T == 0:
        da_SRE.zero_()
    else:
        x_TE = _last_stride_1(x_TE)
        lora_backward_kernel[(blocks, splits)](
            x_TE,
            dxa_TR.contiguous(),
            _stack(adapters),
            x_TE if dx_TE is None else dx_TE,
            da_SRE,
            *_addresses(noise, x_TE),
            T,
            E,
            x_TE.stride(0),
            per_split,
            *_pad([a.stream for a in adapters], 0),
            threshold(noise.p),
            WANT_DX=want_dx,
            ADD_DX=add,
            **_constants(adapters, noise),
            **config,
        )
    da_RE = (da_SRE[0] if splits == 1 else da_SRE.sum(0)).to(x_TE.dtype)
    return dx_TE, [da_RE[rows] for rows in rank_slices(adapters)]


def takes_up_backward(adapter: Adapter) -> bool:
    """Whether one read of dy for both gradients moves fewer bytes than a read for each."""
    return _block_r(adapter.rank) <= MAX_BLOCK_R


def up_backward(
    dy_TN: torch.Tensor, xa_TR: torch.Tensor, b_NR: torch.Tensor, factor: float, dxa_TR: torch.Tensor
) -> torch.Tensor:
    """As `reference.up_backward`, with one read of dy. Both gradients are summed in fp32 and rounded once."""
    (T, N), R = dy_TN.shape, b_NR.shape[1]
    db_NR = torch.empty_like(b_NR, memory_format=torch.contiguous_format)
    if T == 0:
        return db_NR.zero_()
    config = UP_BACKWARD[dy_TN.element_size(), _block_r(R)]
    blocks = triton.cdiv(N, CHUNKS * config["BLOCK_N"])
    splits = max(1, min(UP_PROGRAMS // blocks, triton.cdiv(T, UP_TOKENS)))
    per_split = triton.cdiv(triton.cdiv(T, splits), config["BLOCK_T"]) * config["BLOCK_T"]
    splits = triton.cdiv(T, per_split)
    dy_TN, xa_TR = _last_stride_1(dy_TN), _last_stride_1(xa_TR)
    dxa_BTR = torch.empty((blocks, T, R), dtype=torch.float32, device=dy_TN.device)
    db_SNR = torch.empty((splits, N, R), dtype=torch.float32, device=dy_TN.device)
    lora_up_backward_kernel[(blocks, splits)](
        dy_TN,
        b_NR.contiguous(),
        xa_TR,
        dxa_BTR,
        db_SNR,
        T,
        N,
        dy_TN.stride(0),
        xa_TR.stride(0),
        per_split,
        RANK=R,
        BLOCK_R=_block_r(R),
        PRECISION="ieee",  # see _constants
        **config,
    )
    _ordered_sum(dxa_BTR, dxa_TR, factor)
    _ordered_sum(db_SNR, db_NR, 1.0)
    return db_NR


def _ordered_sum(parts, out, factor):
    n_parts, rows, width = parts.shape
    grid = (triton.cdiv(rows * width, ORDERED_SUM["BLOCK"]),)
    ordered_sum_kernel[grid](parts, out, n_parts, rows * width, out.stride(0), factor, WIDTH=width, **ORDERED_SUM)


def _block_r(rank):
    # tl.dot takes no side below 16.
    return max(16, triton.next_power_of_2(rank))


def _stack(adapters):
    """A of all adapters, one below the other."""
    return adapters[0].a_RE.contiguous() if len(adapters) == 1 else torch.cat([a.a_RE for a in adapters])


def _pad(values, filler):
    return values + [filler] * (MAX_ADAPTERS - len(values))


def _addresses(noise, x_TE):
    # Never read without dropout, but an argument must be a tensor.
    return (noise.seeds_T.contiguous(), noise.rows_T.contiguous()) if noise.active else (x_TE, x_TE)


def _constants(adapters, noise):
    ranks = _pad([a.rank for a in adapters], 0)
    return {
        **{f"RANK_{i}": rank for i, rank in enumerate(ranks)},
        "BLOCK_R": _block_r(max(ranks)),
        "DROPOUT": noise.active,
        # TF32 would round fp32 inputs to 10 bits; it says nothing for 16-bit inputs.
        "PRECISION": "ieee",
    }


def _last_stride_1(x):
    return x if x.stride(-1) == 1 else x.contiguous()
