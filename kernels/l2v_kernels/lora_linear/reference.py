"""LoRA on a group of linears in plain PyTorch: the definition of the op, and the adapters' path where Triton is not."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from l2v_kernels.dropout.reference import dropout_reference, dropped
from l2v_kernels.lora_linear.settings import Adapter, Noise, rank_slices


def lora_linear_reference(
    x_TE: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    adapters: tuple[Adapter, ...],
    noise: Noise,
) -> torch.Tensor:
    """See `l2v_kernels.lora_linear`; arguments are checked there."""
    parts = [F.linear(x_TE, w, b) for w, b in zip(weights, biases, strict=True)]
    for adapter in adapters:
        x = x_TE
        if noise.active:
            x = dropout_reference(x_TE, noise.p, noise.seeds_T, noise.rows_T, adapter.stream)
        xa_TR = F.linear(x, adapter.a_RE)
        parts[adapter.part] = parts[adapter.part] + F.linear(xa_TR, adapter.b_NR) * adapter.scaling
    return torch.cat(parts, 1)


def down(
    x_TE: torch.Tensor, adapters: tuple[Adapter, ...], noise: Noise
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """xa [T, sum of ranks], each adapter's scaling * dropout(x) A^T; and the masks, bool [T, E], true where dropped.

    A mask costs more to make again than to keep, on a CPU.
    """
    xa_TR = x_TE.new_empty((x_TE.shape[0], sum(a.rank for a in adapters)))
    masks: list[torch.Tensor | None] = []
    for adapter, columns in zip(adapters, rank_slices(adapters), strict=True):
        mask_TE = dropped(x_TE.shape[1], noise.p, noise.seeds_T, noise.rows_T, adapter.stream) if noise.active else None
        masks.append(mask_TE)
        kept_TE = x_TE if mask_TE is None else x_TE.masked_fill(mask_TE, 0.0)
        torch.mul(kept_TE @ adapter.a_RE.t(), adapter.scaling * noise.scale, out=xa_TR[:, columns])
    return xa_TR, masks


def up_backward(
    dy_TN: torch.Tensor, xa_TR: torch.Tensor, b_NR: torch.Tensor, factor: float, dxa_TR: torch.Tensor
) -> torch.Tensor:
    """Gradients of xa B^T: dB [N, R], and factor * dy B into dxa, with which it becomes what `down_backward` takes."""
    # Outputs of 16 columns are made apart: a library that cannot write into a slice would copy it twice.
    dxa_TR.copy_((dy_TN @ b_NR).mul_(factor))
    return dy_TN.t() @ xa_TR


def down_backward(
    x_TE: torch.Tensor,
    dxa_TR: torch.Tensor,
    adapters: tuple[Adapter, ...],
    masks: list[torch.Tensor | None],
    dx_TE: torch.Tensor | None = None,
    *,
    want_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Gradients of `down`: dx [T, E] (None unless wanted), added to the one given, and dA [R, E] of each adapter.

    dxa_TR: the gradient of what `down` scaled and masked, so with scaling and the dropout's scale already inside.
    """
    gradients = []
    for adapter, columns, mask_TE in zip(adapters, rank_slices(adapters), masks, strict=True):
        dxa = dxa_TR[:, columns]
        kept_TE = x_TE if mask_TE is None else x_TE.masked_fill(mask_TE, 0.0)
        gradients.append(dxa.t() @ kept_TE)
        if want_dx:
            part_TE = dxa @ adapter.a_RE
            if mask_TE is not None:
                part_TE.masked_fill_(mask_TE, 0.0)
            dx_TE = part_TE if dx_TE is None else dx_TE.add_(part_TE)
    return dx_TE, gradients
