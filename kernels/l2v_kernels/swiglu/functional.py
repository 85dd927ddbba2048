"""SwiGLU without autograd, for code that writes its own backward: see `l2v_kernels.swiglu` for the op.

With `lora`, gate_up holds the frozen linears' product alone, and LoRA's share is added to it where it is read, in fp32: it
is written to memory nowhere. Gradients are those of gate and up as they are with the share.

Arguments are not checked. Rows may lie apart; where the last dimension is not of stride 1, there is a copy.
"""

from __future__ import annotations

import torch

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.spans import spanned
from l2v_kernels.swiglu.lora import MAX_RANK, GateUpLora
from l2v_kernels.swiglu.reference import backward_reference, forward_reference

__all__ = ["MAX_RANK", "GateUpLora", "backward", "forward"]


@spanned("swiglu")
def forward(gate_up_TG: torch.Tensor, lora: GateUpLora | None = None) -> torch.Tensor:
    """product [T, F] = silu(gate) * up of gate_up [T, G], G = 2 F: gate in its first F columns, up in the others.

    Ranks of `lora` are at most MAX_RANK.
    """
    if not takes_triton(gate_up_TG):
        return forward_reference(gate_up_TG, lora)
    from l2v_kernels.swiglu.kernel import launch_forward

    T, G = gate_up_TG.shape
    return launch_forward(gate_up_TG, gate_up_TG.new_empty(T, G // 2), lora)


@spanned("swiglu")
def backward(
    dproduct_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    out: torch.Tensor | None = None,
    lora: GateUpLora | None = None,
) -> torch.Tensor:
    """dgate_up [T, G], into `out` if given; out may be gate_up itself, which is then lost."""
    if out is None:
        out = torch.empty_like(gate_up_TG, memory_format=torch.contiguous_format)
    if not takes_triton(gate_up_TG):
        return backward_reference(dproduct_TF, gate_up_TG, out, lora)
    from l2v_kernels.swiglu.kernel import launch_backward

    return launch_backward(dproduct_TF, gate_up_TG, out, lora)
