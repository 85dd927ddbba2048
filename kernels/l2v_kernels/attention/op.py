"""The autograd function of packed attention on the Triton kernels. Autograd differentiates the reference by itself."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.attention.settings import Settings
from l2v_kernels.attention.tables import TokenTables


class FusedAttention(torch.autograd.Function):
    """o [T, H, D] and lse fp32 [H, T]. Kept for the backward: q, k, v, o and lse, so memory is linear in tokens."""

    @staticmethod
    def forward(
        ctx,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        tables: TokenTables,
        seeds_S: torch.Tensor | None,
        settings: Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Imported here: the package works without Triton.
        from l2v_kernels.attention import launch

        o_THD, lse_HT = launch.forward(q_THD, k_TKD, v_TKD, tables, seeds_S, settings)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, o_THD, lse_HT, seeds_S)
        ctx.tables, ctx.settings = tables, settings
        ctx.mark_non_differentiable(lse_HT)
        ctx.set_materialize_grads(False)  # else every backward fills [H, T] zeros for lse
        return o_THD, lse_HT

    @staticmethod
    @once_differentiable
    def backward(ctx, do_THD: torch.Tensor | None, _):
        if do_THD is None:
            return None, None, None, None, None, None
        from l2v_kernels.attention import launch

        q_THD, k_TKD, v_TKD, o_THD, lse_HT, seeds_S = ctx.saved_tensors
        gradients = launch.backward(do_THD, q_THD, k_TKD, v_TKD, o_THD, lse_HT, ctx.tables, seeds_S, ctx.settings)
        return *gradients, None, None, None
