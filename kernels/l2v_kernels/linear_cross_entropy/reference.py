"""Cross-entropy of a linear head in plain PyTorch: the definition of the op, and one chunk of the path without Triton."""

import torch
import torch.nn.functional as F


def linear_cross_entropy_reference(
    hidden_LE: torch.Tensor, weight_VE: torch.Tensor, labels_L: torch.Tensor, bias_V: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses [L], fp32 or fp64, hits bool [L]) with all logits in memory. See `l2v_kernels.linear_cross_entropy`."""
    logits_LV = F.linear(hidden_LE, weight_VE, bias_V)
    losses_L = F.cross_entropy(
        logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32)), labels_L, reduction="none"
    )
    return losses_L, logits_LV.argmax(-1) == labels_L


def write_logits(hidden_rE, weight_VE, bias_V, logits_rV, narrow_rV) -> None:
    """logits [r, V] = hidden weight^T + bias. narrow: a buffer of hidden's dtype where logits have another; else logits.

    On a CPU torch has no matmul of half precision with a wider result, so logits are rounded, as the definition's are.
    """
    if bias_V is None:
        torch.mm(hidden_rE, weight_VE.T, out=narrow_rV)
    else:
        torch.addmm(bias_V, hidden_rE, weight_VE.T, out=narrow_rV)
    if narrow_rV is not logits_rV:
        logits_rV.copy_(narrow_rV)


def softmax_stats(logits_rV, labels_r, losses_r, hits_r, narrow_rV, gradient: bool) -> None:
    """Writes losses [r] and hits [r], and with `gradient` softmax - onehot [r, V] into narrow. Overwrites logits."""
    labels_r1 = labels_r.unsqueeze(1)
    valid_r1 = (labels_r1 >= 0) & (labels_r1 < logits_rV.shape[1])
    at_r1 = labels_r1.where(valid_r1, 0)
    picked_r1 = logits_rV.gather(1, at_r1)
    top_r1, best_r1 = logits_rV.max(1, keepdim=True)
    hits_r.copy_((best_r1 == labels_r1).squeeze(1))
    shares_rV = logits_rV.sub_(top_r1).exp_()
    total_r1 = shares_rV.sum(1, keepdim=True).where(valid_r1, torch.nan)
    losses_r.copy_((total_r1.log() - (picked_r1 - top_r1)).squeeze(1))
    if gradient:
        shares_rV.div_(total_r1)
        # Before rounding to half precision: after it, only the rounding error of a share near 1 would be left.
        shares_rV.scatter_add_(1, at_r1, torch.full_like(picked_r1, -1))
        if narrow_rV is not shares_rV:
            narrow_rV.copy_(shares_rV)
