"""The autograd function: a chunk of logits at a time, and the gradient computed while the chunk exists."""

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.linear_cross_entropy import reference
from l2v_kernels.matmul import matmul_nt

TILE_ROWS = 128
"""Rows of a GEMM library's tile: chunks are whole tiles where at least one fits."""


class LinearCrossEntropy(torch.autograd.Function):
    """(sum of the losses, number of hits). Kept for the backward: only the gradient of hidden [L, E], and that of the weight
    [V, E] where it is trained."""

    @staticmethod
    def forward(ctx, hidden_LE, weight_VE, bias_V, labels_L, workspace):
        gradient_VE = WeightGradient(weight_VE) if ctx.needs_input_grad[1] else None
        losses_L, hits_L, gradient_LE = in_chunks(
            hidden_LE, weight_VE, bias_V, labels_L, workspace, gradient=True, of_weight=gradient_VE
        )
        ctx.save_for_backward(gradient_LE, None if gradient_VE is None else gradient_VE.total())
        hits = hits_L.sum()
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return losses_L.sum(), hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        gradient_LE, gradient_VE = ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None
        return gradient_LE * grad, None if gradient_VE is None else gradient_VE * grad, None, None, None


class WeightGradient:
    """The gradient of a head's weight [V, E] over chunks: of each a matmul in the weight's dtype, summed in at least fp32."""

    def __init__(self, weight_VE: torch.Tensor) -> None:
        self.weight_VE = weight_VE
        self.sum_VE: torch.Tensor | None = None
        self.wide = False

    def add(self, dlogits_rV: torch.Tensor, hidden_rE: torch.Tensor) -> None:
        """Add a chunk: dlogits^T hidden."""
        found_VE = dlogits_rV.t() @ hidden_rE
        if self.sum_VE is None:
            self.sum_VE = found_VE
            return
        if not self.wide:  # a second chunk
            self.wide = True
            self.sum_VE = self.sum_VE.to(torch.promote_types(found_VE.dtype, torch.float32))
        self.sum_VE += found_VE

    def total(self) -> torch.Tensor:
        """The sum, in the weight's dtype; zeros if there was no chunk."""
        return torch.zeros_like(self.weight_VE) if self.sum_VE is None else self.sum_VE.to(self.weight_VE.dtype)


@torch.no_grad()
def in_chunks(
    hidden_LE: torch.Tensor,
    weight_VE: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_L: torch.Tensor,
    workspace: int,
    *,
    gradient: bool,
    of_weight: WeightGradient | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(losses [L], hits bool [L], gradient of the losses' sum [L, E] in hidden's dtype, or None without `gradient`).

    of_weight: where the gradient of the weight is added up, if it is wanted as well.
    """
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
            if of_weight is not None:
                of_weight.add(narrow, hidden_LE[at])
    return losses_L, hits_L, gradient_LE


def rows_per_chunk(L: int, row_bytes: int, workspace: int) -> int:
    """Rows a chunk of L: as many as fit the workspace, in chunks of one size, of whole tiles where those fit."""
    most = max(1, workspace // row_bytes)
    tile = TILE_ROWS if most >= TILE_ROWS else 1
    most -= most % tile
    chunks = max(1, -(-L // most))
    even = -(-L // chunks)
    return max(1, min(L, -(-even // tile) * tile))
