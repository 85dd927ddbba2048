"""A group of frozen linears on one input, with LoRA and counter-based (Philox) dropout on some or all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from l2v_kernels.lora_linear.frozen import FrozenLinears, Linears, stack_weights
from l2v_kernels.lora_linear.op import LoraLinear
from l2v_kernels.lora_linear.settings import Adapter, Adapters, InputDropout

__all__ = ["Adapter", "Adapters", "FrozenLinears", "InputDropout", "Linears", "lora_linear", "stack_weights"]


def lora_linear(
    x_TE: torch.Tensor,
    linears: FrozenLinears,
    adapters: Sequence[Adapter] = (),
    dropout: InputDropout | None = None,
) -> torch.Tensor:
    """y = x W^T + bias for every linear of the group, side by side, plus scaling * dropout(x) A^T B^T where it is adapted.

    Args:
        x_TE: [T, E] fp64, fp32, fp16 or bf16.
        linears: the frozen weights [O, E] (and biases [O]) that read x: `Linears`, or another `FrozenLinears`.
        adapters: at most one for each linear: A [R, E], B [O, R] in x's dtype, any rank, ranks may differ.
        dropout: of the adapters' input, with the masks of `l2v_kernels.dropout`, a stream for each adapter. None drops
            nothing.

    Returns:
        [T, sum of O] in x's dtype, differentiable once in x, A and B. The frozen matmul accumulates onto the adapters'
        share, which is rounded to x's dtype first, as with two separate matmuls.

    Raises:
        ValueError: shapes, dtypes, devices or streams are outside the above; the message names them.

    Source: Hu et al. 2021 (LoRA), arXiv 2106.09685, equation 3.
    """
    adapters, dropout = tuple(adapters), dropout or InputDropout()
    _check(x_TE, linears, adapters, dropout)
    matrices = [matrix for adapter in adapters for matrix in (adapter.a_RE, adapter.b_OR)]
    return LoraLinear.apply(x_TE, linears, adapters, dropout, *matrices)


def _check(x_TE, linears, adapters, dropout):
    if x_TE.ndim != 2 or not x_TE.is_floating_point():
        raise ValueError(f"lora_linear needs floating x [T, E], got {x_TE.dtype} {tuple(x_TE.shape)}")
    if len({a.part for a in adapters}) != len(adapters):
        raise ValueError(f"at most one adapter a linear, got adapters on linears {[a.part for a in adapters]}")
    for adapter in adapters:
        a, b = adapter.a_RE, adapter.b_OR
        where = f"adapter on linear {adapter.part}: A {tuple(a.shape)} {a.dtype}, B {tuple(b.shape)} {b.dtype}"
        if not 0 <= adapter.part < len(linears.sizes):
            raise ValueError(f"{where}: there are {len(linears.sizes)} linears")
        fits = a.ndim == 2 and a.shape[1] == x_TE.shape[1] and b.shape == (linears.sizes[adapter.part], a.shape[0])
        if not fits or a.shape[0] == 0:
            raise ValueError(
                f"{where}: needs A [R, {x_TE.shape[1]}] and B [{linears.sizes[adapter.part]}, R] for x {tuple(x_TE.shape)}"
            )
        if not a.dtype == b.dtype == x_TE.dtype or not a.device == b.device == x_TE.device:
            raise ValueError(f"{where}: must have the dtype and device of x, {x_TE.dtype} on {x_TE.device}")
        if not 0 <= adapter.stream < 2**31:
            raise ValueError(f"{where}: stream must be at least 0 and below 2**31, got {adapter.stream}")
    if dropout.active and adapters:
        seeds, rows = dropout.seeds_T, dropout.rows_T
        good = seeds is not None and rows is not None and seeds.shape == rows.shape == x_TE.shape[:1]
        if not good or seeds.dtype != torch.int64 or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"dropout needs seeds_T int64 [{x_TE.shape[0]}] and rows_T int32 or int64 [{x_TE.shape[0]}], got "
                f"{None if seeds is None else (seeds.dtype, tuple(seeds.shape))} and "
                f"{None if rows is None else (rows.dtype, tuple(rows.shape))}"
            )
        if not seeds.device == rows.device == x_TE.device:
            raise ValueError(
                f"x, seeds and rows must be on one device, got {x_TE.device}, {seeds.device}, {rows.device}"
            )
