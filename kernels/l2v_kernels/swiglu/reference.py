"""SwiGLU and GeGLU in plain PyTorch: the definition of the op, and the path without Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True)
class GateUpLora:
    """gate += xa_gate B_gate^T and up += xa_up B_up^T, in gate_up's dtype; factors and dropout are inside xa already.

    xa_gate_TR, xa_up_TR: [T, R], rows may lie apart in memory; b_gate_FR, b_up_FR: [F, R]; ranks may differ. A pair of
    None: not adapted.
    """

    xa_gate_TR: torch.Tensor | None = None
    b_gate_FR: torch.Tensor | None = None
    xa_up_TR: torch.Tensor | None = None
    b_up_FR: torch.Tensor | None = None

    @property
    def gate(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """xa [T, R] and B [F, R] of gate."""
        return _pair(self.xa_gate_TR, self.b_gate_FR)

    @property
    def up(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """xa [T, R] and B [F, R] of up."""
        return _pair(self.xa_up_TR, self.b_up_FR)


def forward_reference(
    gate_up_TG: torch.Tensor, lora: GateUpLora | None = None, activation: Activation = "silu"
) -> torch.Tensor:
    """[T, F]: activation(gate) * up, in fp32 (fp64 for fp64), rounded once. The adapters' share is added to gate and up first."""
    gate_TF, up_TF = _halves(gate_up_TG, lora)
    return _activated(gate_TF, activation).mul_(up_TF).to(gate_up_TG.dtype)


def backward_reference(
    dproduct_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    out_TG: torch.Tensor,
    lora: GateUpLora | None = None,
    activation: Activation = "silu",
) -> torch.Tensor:
    """dgate = dproduct * up * activation'(gate), dup = dproduct * activation(gate); into out.

    Of SiLU, with s = sigmoid(gate): activation' = s * (1 + gate * (1 - s)). In place where possible: on a CPU, fresh memory
    costs more than the arithmetic.
    """
    gate_TF, up_TF = _halves(gate_up_TG, lora)
    if activation == "gelu_tanh":
        dup_TF = F.gelu(gate_TF, approximate="tanh").mul_(dproduct_TF)
        dgate_TF = torch.ops.aten.gelu_backward(up_TF * dproduct_TF, gate_TF, approximate="tanh")
        return _write(out_TG, dgate_TF, dup_TF)
    s_TF = torch.sigmoid(gate_TF)
    dgate_TF = (1 - s_TF).mul_(gate_TF).add_(1).mul_(up_TF)
    s_TF.mul_(dproduct_TF)
    dgate_TF.mul_(s_TF)
    return _write(out_TG, dgate_TF, s_TF.mul_(gate_TF))


def _activated(gate_TF: torch.Tensor, activation: Activation) -> torch.Tensor:
    return F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate="tanh")


def _write(out_TG: torch.Tensor, dgate_TF: torch.Tensor, dup_TF: torch.Tensor) -> torch.Tensor:
    """Both are complete before either is written: out may be gate_up."""
    for half_TF, found_TF in zip(out_TG.chunk(2, -1), (dgate_TF, dup_TF), strict=True):
        half_TF.copy_(found_TF)
    return out_TG


def _pair(xa_TR, b_FR):
    return None if xa_TR is None else (xa_TR, b_FR)


def _halves(gate_up_TG: torch.Tensor, lora: GateUpLora | None) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(gate_up_TG.dtype, torch.float32)
    gate_TF, up_TF = gate_up_TG.to(wide).chunk(2, -1)
    if lora is not None:
        gate_TF, up_TF = _plus_share(gate_TF, lora.gate), _plus_share(up_TF, lora.up)
    return gate_TF, up_TF


def _plus_share(half_TF: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    if pair is None:
        return half_TF
    xa_TR, b_FR = pair
    return (xa_TR.to(half_TF.dtype) @ b_FR.to(half_TF.dtype).t()).add_(half_TF)
