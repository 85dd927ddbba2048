"""The autograd function of RMSNorm with a residual. It keeps the sum, which the residual stream holds anyway, and rstd."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.rms_norm import functional


class RmsNorm(torch.autograd.Function):
    """(sum, y) with a residual, y without. Gradients of the two outputs meet in one pass."""

    @staticmethod
    def forward(ctx, x_TE, weight_E, eps, residual_TE):
        sum_TE, y_TE, rstd_T = functional.forward(x_TE, weight_E, eps, residual_TE)
        ctx.save_for_backward(sum_TE, rstd_T, weight_E)
        ctx.set_materialize_grads(False)
        return y_TE if residual_TE is None else (sum_TE, y_TE)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        sum_TE, rstd_T, weight_E = ctx.saved_tensors
        to_x, to_weight, _, to_residual = ctx.needs_input_grad
        dsum_TE, dy_TE = grads if len(grads) == 2 else (None, *grads)
        dx_TE = dweight_E = None
        if dy_TE is None:
            dx_TE = dsum_TE
        elif to_x or to_residual:
            dx_TE = functional.backward(dy_TE, sum_TE, rstd_T, weight_E, dsum_TE)
        if to_weight and dy_TE is not None:
            dweight_E = functional.weight_gradient(dy_TE, sum_TE, rstd_T).to(weight_E.dtype)
        return dx_TE if to_x else None, dweight_E, None, dx_TE if to_residual else None
