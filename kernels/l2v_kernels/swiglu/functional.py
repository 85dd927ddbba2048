"""SwiGLU without autograd, for code that writes its own backward: see `l2v_kernels.swiglu` for the op.

Arguments are not checked. Rows may lie apart; where the last dimension is not of stride 1, there is a copy.
"""

import torch

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.spans import spanned
from l2v_kernels.swiglu.reference import backward_reference, forward_reference


@spanned("swiglu")
def forward(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """product [T, F] = silu(gate) * up of gate_up [T, G], G = 2 F: gate in its first F columns, up in the others."""
    if not takes_triton(gate_up_TG):
        return forward_reference(gate_up_TG)
    from l2v_kernels.swiglu.kernel import launch_forward

    T, G = gate_up_TG.shape
    return launch_forward(gate_up_TG, gate_up_TG.new_empty(T, G // 2))


@spanned("swiglu")
def backward(dproduct_TF: torch.Tensor, gate_up_TG: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """dgate_up [T, G], into `out` if given; out may be gate_up itself, which is then lost."""
    if out is None:
        out = torch.empty_like(gate_up_TG, memory_format=torch.contiguous_format)
    if not takes_triton(gate_up_TG):
        return backward_reference(dproduct_TF, gate_up_TG, out)
    from l2v_kernels.swiglu.kernel import launch_backward

    return launch_backward(dproduct_TF, gate_up_TG, out)
