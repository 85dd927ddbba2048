"""The norms of a decoder: parameters in modules of transformers, arithmetic of l2v_kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from l2v_kernels.rms_norm import op as rms_norm

OFFSETS = {"Gemma2RMSNorm": 1.0, "Gemma3RMSNorm": 1.0}
"""Classes whose weight is stored less 1."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm. Its weight is read at every call, since ZeRO-3 gathers it for each; `offset` is added to it."""

    module: Any
    eps: float
    offset: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Read a module of transformers."""
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return cls(module, eps, OFFSETS.get(type(module).__name__, 0.0))

    @property
    def weight(self) -> torch.Tensor:
        """[E], without the offset."""
        return self.module.weight

    def forward(
        self, x_TE: torch.Tensor, delta_TE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum [T, E], y [T, E], rstd [T]), see `rms_norm.op.forward`."""
        return rms_norm.forward(x_TE, self.weight, self.eps, delta_TE, self.offset)

    def normalize(self, sum_TE: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
        """The y of `forward` recomputed, bit for bit."""
        return rms_norm.normalize(sum_TE, rstd_T, self.weight, self.offset)

    def backward(
        self,
        dy_TE: torch.Tensor,
        sum_TE: torch.Tensor,
        rstd_T: torch.Tensor,
        dsum_TE: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dx [T, E], see `rms_norm.op.backward`."""
        return rms_norm.backward(dy_TE, sum_TE, rstd_T, self.weight, dsum_TE, out, self.offset)
