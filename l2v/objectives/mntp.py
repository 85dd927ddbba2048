"""Masked next-token prediction (BehnamGhader et al. 2024, arXiv 2404.05961)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def mntp_loss(logits_LV: torch.Tensor, labels_L: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    """Cross-entropy of the labelled positions, summed and divided by `count`.

    logits_LV: any float dtype, from the hidden state before each label; labels_L: int64; count: labels of the whole step
    over all ranks and micro-batches, so that the sum over those is the mean over labels. Zero labels give a zero that is
    still part of the graph. Returns float32, a scalar.
    """
    return F.cross_entropy(logits_LV.float(), labels_L, reduction="sum") / count
