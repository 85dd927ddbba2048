"""The autograd function of a group of LoRA linears. Kept: x, xa and, without Triton, the dropout masks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.lora_linear import functional
from l2v_kernels.lora_linear.frozen import FrozenLinears
from l2v_kernels.lora_linear.settings import Adapter, Noise


class LoraLinear(torch.autograd.Function):
    """y [T, N]. The adapters' matrices come last, A and B of each in turn, so that gradients find them."""

    @staticmethod
    def forward(
        ctx, x_TE: torch.Tensor, linears: FrozenLinears, adapters: tuple[Adapter, ...], noise: Noise, *matrices
    ) -> torch.Tensor:
        y_TN, kept = functional.forward(x_TE, linears, adapters, noise)
        ctx.linears, ctx.noise = linears, noise
        ctx.adapters = [replace(a, a_RE=None, b_NR=None) for a in adapters]
        ctx.save_for_backward(x_TE, *matrices, *kept.tensors())
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN: torch.Tensor):
        x_TE, *tensors = ctx.saved_tensors
        n = len(ctx.adapters)
        adapters = tuple(replace(a, a_RE=tensors[2 * i], b_NR=tensors[2 * i + 1]) for i, a in enumerate(ctx.adapters))
        kept = functional.Kept.of(tuple(tensors[2 * n :]))
        found = functional.backward(
            dy_TN.contiguous(), x_TE, kept, ctx.linears, adapters, ctx.noise, want_dx=ctx.needs_input_grad[0]
        )
        pairs = [g for pair in zip(found.da, found.db, strict=True) for g in pair]
        return found.dx_TE, None, None, None, *pairs
