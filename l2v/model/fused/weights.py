"""Gradients of a fused layer's own weights, where a stage trains all weights instead of adapters."""

from __future__ import annotations

from typing import Any

import torch

from l2v.model.fused.spec import Group, base_of
from l2v_kernels.rms_norm import op as rms_norm
from l2v_kernels.spans import span


def trained_norms(*norms: Any) -> list[torch.Tensor]:
    """Weights of the norms that are trained."""
    return [norm.weight for norm in norms if norm.weight.requires_grad]


def of_linears(group: Group, dy_TN: torch.Tensor, x_TE: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of `group.trained()`, in that order, in dy's dtype.

    dy [T, N]: of the group's outputs side by side; x [T, E]: their input. dW = dy^T x; one matmul if all weights are trained.
    """
    bases = [base_of(module) for module in group.modules]
    parts = dy_TN.split([base.weight.shape[0] for base in bases], 1)
    found: list[torch.Tensor] = []
    with span("gemm"):
        if all(base.weight.requires_grad for base in bases):
            weights = iter((dy_TN.t() @ x_TE).split([base.weight.shape[0] for base in bases]))
        else:
            weights = (dy.t() @ x_TE for dy, base in zip(parts, bases, strict=True) if base.weight.requires_grad)
        for dy_TO, base in zip(parts, bases, strict=True):
            if base.weight.requires_grad:
                found.append(next(weights))
            if base.bias is not None and base.bias.requires_grad:
                found.append(dy_TO.sum(0))
    return found


def of_norm(norm: Any, dy_TE: torch.Tensor, x_TE: torch.Tensor, rstd_T: torch.Tensor) -> list[torch.Tensor]:
    """Gradient of a norm's weight, if it is trained. dy: of its output; x: its input; rstd: 1 / root mean square of x."""
    if not norm.weight.requires_grad:
        return []
    found = rms_norm.weight_gradient(dy_TE, x_TE, rstd_T)
    return [found.to(norm.weight.dtype)]
