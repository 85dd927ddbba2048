"""The autograd function of InfoNCE: of all losses, or of their weighted sum, whose gradient can share the forward's pass."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.info_nce.engine import Pass, losses
from l2v_kernels.info_nce.gradient import Wanted, gradients, losses_and_gradients
from l2v_kernels.info_nce.settings import Labels, Settings


class InfoNce(torch.autograd.Function):
    """Losses [P, N], or with weights [P, N] the scalar sum(weights * losses).

    Kept for the backward: the embeddings, a few numbers a row, and the dot products if they fit the workspace. If they do
    not, the gradients of the sum may be computed in the forward, tile by tile, and the backward multiplies them by the
    incoming one.
    """

    @staticmethod
    def forward(
        ctx,
        queries_NE: torch.Tensor,
        candidates_ME: torch.Tensor,
        all_queries_QE: torch.Tensor | None,
        scale: float | torch.Tensor,
        weights_PN: torch.Tensor | None,
        labels: Labels,
        settings: Settings,
    ) -> torch.Tensor:
        tensors = (queries_NE, candidates_ME, all_queries_QE)
        number = scale.detach().reshape(()) if isinstance(scale, torch.Tensor) else scale
        wanted, ready = Wanted(*ctx.needs_input_grad[:4]), None
        # Autocast would round fp32 embeddings on their way into every matmul.
        with torch.autocast(queries_NE.device.type, enabled=False):
            everyone = None if all_queries_QE is None else all_queries_QE.detach()
            run = Pass.start(queries_NE.detach(), candidates_ME.detach(), everyone, labels, number, settings)
            if weights_PN is not None and any(wanted) and run.one_pass_rows():
                losses_PN, ready = losses_and_gradients(run, weights_PN, wanted)
            else:
                losses_PN = losses(run, keep=any(wanted))
        # Through save_for_backward, so that autograd notices an embedding that is changed in place meanwhile.
        ctx.save_for_backward(*tensors)
        ctx.run, ctx.scale, ctx.weights_PN, ctx.ready = run, scale, weights_PN, ready
        return losses_PN if weights_PN is None else (weights_PN * losses_PN).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        _ = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.ready is not None:
                # Scaled in place, so they serve one backward; a second one recomputes them.
                found = tuple(x if x is None else x.mul_(grad) for x in ctx.ready)
                ctx.ready = None
            else:
                grad_PN = grad if ctx.weights_PN is None else grad * ctx.weights_PN
                found = gradients(ctx.run, grad_PN, Wanted(*ctx.needs_input_grad[:4]))
        *of_tensors, of_scale = found
        if of_scale is not None:
            of_scale = of_scale.to(ctx.scale.dtype).reshape(ctx.scale.shape)
        return *of_tensors, of_scale, None, None, None
