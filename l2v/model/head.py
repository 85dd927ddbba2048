"""The language-model head in the hands of a loss that reads its weights instead of calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], T]
"""(head, hidden_LE, labels_L) -> whatever the loss returns."""


class WithHead(nn.Module):
    """Runs a loss with the head's weights whole.

    ZeRO 3 gathers what a module owns while that module runs. The loss below does not run the head, so its parameters belong
    to this module as well: the same objects, not copies.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        for name, parameter in head.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, loss: Loss[T], hidden_LE: torch.Tensor, labels_L: torch.Tensor) -> T:
        return loss(self.head, hidden_LE, labels_L)
