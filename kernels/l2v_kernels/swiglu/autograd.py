"""The autograd function of SwiGLU. It keeps its input alone."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.swiglu import functional


class SwiGlu(torch.autograd.Function):
    """product = silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate_up_TG):
        ctx.save_for_backward(gate_up_TG)
        return functional.forward(gate_up_TG)

    @staticmethod
    @once_differentiable
    def backward(ctx, dproduct_TF):
        return functional.backward(dproduct_TF, *ctx.saved_tensors)
