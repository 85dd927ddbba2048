"""SwiGLU and GeGLU with autograd, and without it for code that writes its own backward.

With `lora`, gate_up holds the frozen linears' output alone, and the adapters' share is added where gate_up is read, in
fp32: the sum is never written to memory. Gradients are those of gate and up with the share added.

`forward` and `backward` do not check their arguments. Rows may lie apart in memory; where the last dimension is not of
stride 1, it is copied.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.spans import spanned
from l2v_kernels.swiglu.reference import ACTIVATIONS, Activation, GateUpLora, backward_reference, forward_reference

__all__ = ["ACTIVATIONS", "MAX_RANK", "Activation", "GateUpLora", "SwiGlu", "backward", "forward"]

MAX_RANK = 64
"""Up to this rank the kernels compile without spills on every architecture, and read xa and B in one piece."""


@spanned("swiglu")
def forward(gate_up_TG: torch.Tensor, lora: GateUpLora | None = None, activation: Activation = "silu") -> torch.Tensor:
    """product [T, F] = activation(gate) * up of gate_up [T, G], G = 2 F: gate in its first F columns, up in the others.

    Ranks of `lora` are at most MAX_RANK.
    """
    if not takes_triton(gate_up_TG):
        return forward_reference(gate_up_TG, lora, activation)
    from l2v_kernels.swiglu.kernel import launch_forward

    T, G = gate_up_TG.shape
    return launch_forward(gate_up_TG, gate_up_TG.new_empty(T, G // 2), lora, activation)


@spanned("swiglu")
def backward(
    dproduct_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    out: torch.Tensor | None = None,
    lora: GateUpLora | None = None,
    activation: Activation = "silu",
) -> torch.Tensor:
    """dgate_up [T, G], into `out` if given; out may be gate_up itself, which is then overwritten."""
    if out is None:
        out = torch.empty_like(gate_up_TG, memory_format=torch.contiguous_format)
    if not takes_triton(gate_up_TG):
        return backward_reference(dproduct_TF, gate_up_TG, out, lora, activation)
    from l2v_kernels.swiglu.kernel import launch_backward

    return launch_backward(dproduct_TF, gate_up_TG, out, lora, activation)


class SwiGlu(torch.autograd.Function):
    """product = activation(gate) * up. Only its input is kept."""

    @staticmethod
    def forward(ctx, gate_up_TG, activation):
        ctx.save_for_backward(gate_up_TG)
        ctx.activation = activation
        return forward(gate_up_TG, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dproduct_TF):
        (gate_up_TG,) = ctx.saved_tensors
        return backward(dproduct_TF, gate_up_TG, activation=ctx.activation), None
