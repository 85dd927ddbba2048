"""The language-model head for a loss that reads its weights instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], T]
"""(head, hidden_LE, labels_L) -> the loss's result."""


class WithHead(nn.Module):
    """Runs a loss with the head's weights gathered.

    ZeRO-3 gathers the parameters of a module while that module runs. The loss reads the head's weights without running the
    head, so this module owns the same parameters too (the same objects, not copies).
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        for name, parameter in head.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, loss: Loss[T], hidden_LE: torch.Tensor, labels_L: torch.Tensor) -> T:
        return loss(self.head, hidden_LE, labels_L)
