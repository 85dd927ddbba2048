"""The order in which ZeRO 2 reduces gradients: one and the same on all ranks.

DeepSpeed puts gradients into its bucket as the backward yields them, and adds the buckets of all ranks place by place. Autograd
gives no order to gradients that one op yields together, as a fused layer's are, so a rank with another graph (the filler of an
empty micro-batch) may have two of them the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class GradientOrder:
    """Hands gradients to DeepSpeed from the last parameter to the first; one that comes too early waits."""

    def __init__(self, parameters: Sequence[nn.Parameter], reduce: Callable[[nn.Parameter, int], None]) -> None:
        """parameters: all that get a gradient in every backward, in the order of the forward."""
        self.expected = [id(parameter) for parameter in reversed(parameters)]
        self.reduce = reduce
        self.waiting: dict[int, tuple[nn.Parameter, int]] = {}
        self.at = 0

    @classmethod
    def install(cls, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        """Make an optimizer of ZeRO 2 use it; others reduce in an order of their own."""
        if len(parameters) > 1 and getattr(optimizer, "partition_gradients", False):
            own = cls(parameters, optimizer.reduce_independent_p_g_buckets_and_remove_grads)
            optimizer.gradient_order = own
            optimizer.reduce_independent_p_g_buckets_and_remove_grads = own.add

    def add(self, parameter: nn.Parameter, group: int) -> None:
        """Take a gradient that has just been computed, and hand over all whose turn it is."""
        self.waiting[id(parameter)] = parameter, group
        while self.at < len(self.expected) and self.expected[self.at] in self.waiting:
            self.reduce(*self.waiting.pop(self.expected[self.at]))
            self.at += 1
        if self.at == len(self.expected):
            self.at = 0

    def clear(self) -> None:
        """Forget an unfinished backward."""
        self.waiting.clear()
        self.at = 0
