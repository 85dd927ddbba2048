"""Cross-entropy of a linear head in plain PyTorch: the definition of the op, and a chunk of the path where Triton is not."""

import torch
import torch.nn.functional as F


def linear_cross_entropy_reference(
    hidden_LE: torch.Tensor, weight_VE: torch.Tensor, labels_L: torch.Tensor, bias_V: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [L], fp32 at least, and hits bool [L], with all logits in memory. See `l2v_kernels.linear_cross_entropy`."""
    logits_LV = F.linear(hidden_LE, weight_VE, bias_V)
    losses_L = F.cross_entropy(
        logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32)), labels_L, reduction="none"
    )
    return losses_L, logits_LV.argmax(-1) == labels_L


def make_logits(hidden_RE, weight_VE, bias_V, logits_RV, narrow_RV) -> None:
    """logits = hidden weight^T + bias. narrow: the same in hidden's dtype, where that is another one; else logits itself.

    A CPU has no product of half precision with a wide result, so there the logits are rounded, as the definition's are.
    """
    if bias_V is None:
        torch.mm(hidden_RE, weight_VE.T, out=narrow_RV)
    else:
        torch.addmm(bias_V, hidden_RE, weight_VE.T, out=narrow_RV)
    if narrow_RV is not logits_RV:
        logits_RV.copy_(narrow_RV)


def look(logits_RV, labels_R, losses_R, hits_R, narrow_RV, gradient: bool) -> None:
    """Writes losses and hits, and with `gradient` softmax - onehot into narrow; logits are used up."""
    labels_R1 = labels_R.unsqueeze(1)
    valid_R1 = (labels_R1 >= 0) & (labels_R1 < logits_RV.shape[1])
    at_R1 = labels_R1.where(valid_R1, 0)
    picked_R1 = logits_RV.gather(1, at_R1)
    top_R1, best_R1 = logits_RV.max(1, keepdim=True)
    hits_R.copy_((best_R1 == labels_R1).squeeze(1))
    shares_RV = logits_RV.sub_(top_R1).exp_()
    total_R1 = shares_RV.sum(1, keepdim=True).where(valid_R1, torch.nan)
    losses_R.copy_((total_R1.log() - (picked_R1 - top_R1)).squeeze(1))
    if gradient:
        shares_RV.div_(total_R1)
        # Before the rounding to half precision: after it, the rounding of a share near 1 would be what is left of it.
        shares_RV.scatter_add_(1, at_R1, torch.full_like(picked_R1, -1))
        if narrow_RV is not shares_RV:
            narrow_RV.copy_(shares_RV)
