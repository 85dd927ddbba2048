"""The autograd function: rows of logits at a time, and the gradient made while they are there."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.info_nce.products import dots
from l2v_kernels.linear_cross_entropy import reference

TILE = 128
"""Rows of a library product's tile: chunks are whole ones where more than one fits."""


class LinearCrossEntropy(torch.autograd.Function):
    """(sum of the losses, number of hits). Kept for the backward: the gradient of hidden [L, E], and nothing else."""

    @staticmethod
    def forward(ctx, hidden_LE, weight_VE, bias_V, labels_L, workspace):
        losses_L, hits_L, gradient_LE = in_chunks(hidden_LE, weight_VE, bias_V, labels_L, workspace, gradient=True)
        ctx.save_for_backward(gradient_LE)
        hits = hits_L.sum()
        ctx.mark_non_differentiable(hits)
        return losses_L.sum(), hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (gradient_LE,) = ctx.saved_tensors
        return gradient_LE * grad, None, None, None, None


@torch.no_grad()
def in_chunks(
    hidden_LE: torch.Tensor,
    weight_VE: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_L: torch.Tensor,
    workspace: int,
    *,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses [L], hits bool [L], and with `gradient` that of the losses' sum [L, E] in hidden's dtype."""
    (L, E), V = hidden_LE.shape, len(weight_VE)
    dtype = hidden_LE.dtype
    wide, triton = torch.promote_types(dtype, torch.float32), takes_triton(hidden_LE)
    losses_L = hidden_LE.new_empty(L, dtype=wide)
    hits_L = hidden_LE.new_empty(L, dtype=torch.bool)
    gradient_LE = hidden_LE.new_empty(L, E) if gradient else None
    # The kernel writes softmax - onehot over the logits where both are fp32. It needs no second buffer to read logits from.
    apart = wide != dtype and (gradient or not triton)
    rows = rows_of_a_chunk(L, V * (wide.itemsize + (dtype.itemsize if apart else 0)), workspace)
    logits_RV = hidden_LE.new_empty(rows, V, dtype=wide)
    narrow_RV = hidden_LE.new_empty(rows, V) if apart else logits_RV
    if triton:
        from l2v_kernels.linear_cross_entropy.kernel import launch
    # Autocast would round fp32 hidden states on their way into the products.
    with torch.autocast(hidden_LE.device.type, enabled=False):
        for begin in range(0, L, rows):
            at = slice(begin, min(begin + rows, L))
            logits, narrow = logits_RV[: at.stop - begin], narrow_RV[: at.stop - begin]
            narrow = narrow if apart else logits
            if triton:
                dots(hidden_LE[at], weight_VE, logits)
                launch(logits, bias_V, labels_L[at], losses_L[at], hits_L[at], narrow if gradient else None)
            else:
                reference.make_logits(hidden_LE[at], weight_VE, bias_V, logits, narrow)
                reference.look(logits, labels_L[at], losses_L[at], hits_L[at], narrow, gradient)
            if gradient:
                torch.mm(narrow, weight_VE, out=gradient_LE[at])
    return losses_L, hits_L, gradient_LE


def rows_of_a_chunk(L: int, bytes_a_row: int, workspace: int) -> int:
    """How many rows to take at a time: as many as fit, in chunks of one size, of whole tiles where those fit."""
    most = max(1, workspace // bytes_a_row)
    tile = TILE if most >= TILE else 1
    most -= most % tile
    chunks = max(1, -(-L // most))
    even = -(-L // chunks)
    return max(1, min(L, -(-even // tile) * tile))
