"""Masked next-token prediction (BehnamGhader et al. 2024, arXiv 2404.05961)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from l2v_kernels import linear_cross_entropy


def mntp_loss(logits_LV: torch.Tensor, labels_L: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """Cross-entropy of the labelled positions, summed and divided by `count`; a float32 scalar.

    logits_LV: any float dtype, from the hidden state before each label. labels_L: int64. count: labels of the whole step
    over all ranks and micro-batches, so that the sum over these is the mean over labels. With no labels the loss is a zero
    that is still part of the graph.
    """
    return F.cross_entropy(logits_LV.float(), labels_L, reduction="sum") / count


def mntp_loss_of_hidden(
    head: nn.Module, hidden_LE: torch.Tensor, labels_L: torch.Tensor, count: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mntp_loss` of the head's logits, and the number of correctly predicted labels (int64 scalar, no gradient).

    With an nn.Linear as head the logits are never in memory as a whole, also where its weight is trained because the embedding
    that it is tied to is; any other head, or one with a trained bias, is called normally.
    """
    if type(head) is nn.Linear and (head.bias is None or not head.bias.requires_grad):
        return linear_cross_entropy(hidden_LE, head.weight, labels_L, bias_V=head.bias, count=count)
    logits_LV = head(hidden_LE)
    return mntp_loss(logits_LV, labels_L, count), (logits_LV.detach().argmax(-1) == labels_L).sum()
