"""The autograd function of InfoNCE. The backward needs no second look at the losses, only their gradient."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.info_nce.engine import Pass, gradients, losses
from l2v_kernels.info_nce.settings import Labels, Settings


class InfoNce(torch.autograd.Function):
    """Losses [P, N]. Kept for the backward: the embeddings, a few numbers a row, and the dot products if they fit."""

    @staticmethod
    def forward(
        ctx,
        queries_NE: torch.Tensor,
        candidates_ME: torch.Tensor,
        all_queries_QE: torch.Tensor | None,
        scale: float | torch.Tensor,
        labels: Labels,
        settings: Settings,
    ) -> torch.Tensor:
        tensors = (queries_NE, candidates_ME, all_queries_QE)
        number = scale.detach().reshape(()) if isinstance(scale, torch.Tensor) else scale
        # Autocast would round fp32 embeddings on their way into every product.
        with torch.autocast(queries_NE.device.type, enabled=False):
            run = Pass.start(*(None if x is None else x.detach() for x in tensors), labels, number, settings)
            losses_PN = losses(run, keep=any(ctx.needs_input_grad))
        # Through save_for_backward, so that an embedding changed in place meanwhile is noticed.
        ctx.save_for_backward(*tensors)
        ctx.run, ctx.scale = run, scale
        return losses_PN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_PN: torch.Tensor):
        _ = ctx.saved_tensors
        with torch.autocast(grad_PN.device.type, enabled=False):
            *of_tensors, of_scale = gradients(ctx.run, grad_PN, ctx.needs_input_grad[:4])
        if of_scale is not None:
            of_scale = of_scale.to(ctx.scale.dtype).reshape(ctx.scale.shape)
        return *of_tensors, of_scale, None, None
