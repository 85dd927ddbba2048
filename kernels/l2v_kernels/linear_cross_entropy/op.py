"""The autograd function: a chunk of logits at a time, and the gradient computed while the chunk exists."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.linear_cross_entropy import reference
from l2v_kernels.matmul import matmul_nt

TILE_ROWS = 128
"""Rows of a GEMM library's tile: chunks are whole tiles where at least one fits."""


class LinearCrossEntropy(torch.autograd.Function):
    """(sum of the losses, number of hits). Kept for the backward: only the gradient of hidden [L, E]."""

    @staticmethod
    def forward(ctx, hidden_LE, weight_VE, bias_V, labels_L, workspace):
        losses_L, hits_L, gradient_LE = in_chunks(hidden_LE, weight_VE, bias_V, labels_L, workspace, gradient=True)
        ctx.save_for_backward(gradient_LE)
        hits = hits_L.sum()
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return losses_L.sum(), hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (gradient_LE,) = ctx.saved_tensors
        return None if grad is None else gradient_LE * grad, None, None, None, None


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
    """(losses [L], hits bool [L], gradient of the losses' sum [L, E] in hidden's dtype, or None without `gradient`)."""
    (L, E), V = hidden_LE.shape, len(weight_VE)
    dtype = hidden_LE.dtype
    wide, triton = torch.promote_types(dtype, torch.float32), takes_triton(hidden_LE)
    losses_L = hidden_LE.new_empty(L, dtype=wide)
    hits_L = hidden_LE.new_empty(L, dtype=torch.bool)
    gradient_LE = hidden_LE.new_empty(L, E) if gradient else None
    # Where both are fp32, softmax - onehot overwrites the logits, and one buffer is enough.
    apart = wide != dtype and (gradient or not triton)
    rows = rows_per_chunk(L, V * (wide.itemsize + (dtype.itemsize if apart else 0)), workspace)
    logits_rV = hidden_LE.new_empty(rows, V, dtype=wide)
    narrow_rV = hidden_LE.new_empty(rows, V) if apart else logits_rV
    if triton:
        from l2v_kernels.linear_cross_entropy.kernel import launch
    # Autocast would round fp32 hidden states on their way into the matmuls.
    with torch.autocast(hidden_LE.device.type, enabled=False):
        for begin in range(0, L, rows):
            at = slice(begin, min(begin + rows, L))
            logits, narrow = logits_rV[: at.stop - begin], narrow_rV[: at.stop - begin]
            narrow = narrow if apart else logits
            if triton:
                matmul_nt(hidden_LE[at], weight_VE, logits)
                launch(logits, bias_V, labels_L[at], losses_L[at], hits_L[at], narrow if gradient else None)
            else:
                reference.write_logits(hidden_LE[at], weight_VE, bias_V, logits, narrow)
                reference.softmax_stats(logits, labels_L[at], losses_L[at], hits_L[at], narrow, gradient)
            if gradient_LE is not None:
                torch.mm(narrow, weight_VE, out=gradient_LE[at])
    return losses_L, hits_L, gradient_LE


def rows_per_chunk(L: int, row_bytes: int, workspace: int) -> int:
    """Rows a chunk of L: as many as fit the workspace, in chunks of one size, of whole tiles where those fit."""
    most = max(1, workspace // row_bytes)
    tile = TILE_ROWS if most >= TILE_ROWS else 1
    most -= most % tile
    chunks = max(1, -(-L // most))
    even = -(-L // chunks)
    return max(1, min(L, -(-even // tile) * tile))
