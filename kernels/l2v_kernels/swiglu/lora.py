"""LoRA's share of gate and up, before it is added."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_RANK = 64
"""Up to it the kernels are built without spills on every architecture, and xa and B are read in one piece."""


@dataclass(frozen=True)
class GateUpLora:
    """gate += xa_gate B_gate^T and up += xa_up B_up^T, in gate_up's dtype; factors and dropout are inside xa already.

    xa_gate_TR, xa_up_TR: [T, R], rows may lie apart; b_gate_FR, b_up_FR: [F, R]; ranks may differ. A pair of None: not
    adapted.
    """

    xa_gate_TR: torch.Tensor | None = None
    b_gate_FR: torch.Tensor | None = None
    xa_up_TR: torch.Tensor | None = None
    b_up_FR: torch.Tensor | None = None

    @property
    def gate(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """xa and B of gate."""
        return None if self.xa_gate_TR is None else (self.xa_gate_TR, self.b_gate_FR)

    @property
    def up(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """xa and B of up."""
        return None if self.xa_up_TR is None else (self.xa_up_TR, self.b_up_FR)
