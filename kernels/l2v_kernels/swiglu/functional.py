"""SwiGLU without autograd, for code that writes its own backward: see `l2v_kernels.swiglu` for the op.

Arguments are not checked. Rows may lie apart; the last dimension is best of stride 1.
"""

import torch

from l2v_kernels.swiglu import reference


def forward(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """product [T, F] = silu(gate) * up of gate_up [T, G], G = 2 F: gate in its first F columns, up in the others."""
    return reference.forward_reference(gate_up_TG)


def backward(dproduct_TF: torch.Tensor, gate_up_TG: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """dgate_up [T, G], into `out` if given; out may be gate_up itself, which is then lost."""
    return reference.backward_reference(dproduct_TF, gate_up_TG, out)
