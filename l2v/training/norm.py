"""The norm of the gradients and their clipping, without waiting for the device.

DeepSpeed's own, under ZeRO 1 and 2, read the norm on the host three times a step to look for NaN and Inf. Here the ranks have
agreed that there are none before the update begins (see `l2v.training.faults`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class GradientNorm:
    """Norm and clipping of an optimizer of ZeRO 1 or 2 in device memory, in place of its own; same formulas, same bits."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._local: torch.Tensor | None = None

    @classmethod
    def install(cls, optimizer: Any) -> None:
        """Make the optimizer use it."""
        own = cls(optimizer)
        optimizer.gradient_norm = own
        optimizer.scaled_global_norm = own.total
        optimizer.unscale_and_clip_grads = own.clip

    def local(self) -> torch.Tensor | None:
        """Norm of this rank's partition, float64 [] on the device, kept for `total`; None if it holds no gradients."""
        gradients = [g for part in self.optimizer.averaged_gradients.values() for g in part or () if g is not None]
        self._local = None
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float64)
            self._local = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        return self._local

    def total(self, norm_type: float = 2) -> torch.Tensor:
        """Norm of the gradients of all ranks' partitions, float32 [] on the device. A collective call."""
        local = self._local if self._local is not None else self.local()
        self._local = None
        square = local.square().float() if local is not None else torch.zeros((), device=self.optimizer.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(square)
        return square.sqrt()

    def clip(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        """Scale the partition's fp32 gradients so that the norm over all ranks is at most the recipe's `clip`."""
        limit = self.optimizer.clip_grad
        if limit > 0:
            factor = 1.0 / ((norm + 1e-6) / limit).clamp(min=1.0)
            for gradient in gradients:
                gradient.mul_(factor)
