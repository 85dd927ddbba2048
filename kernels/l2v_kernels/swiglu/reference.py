"""SwiGLU and GeGLU in plain PyTorch: the definition of the op, and the path without Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715 * GELU_SCALE
BLOCK = 1 << 16
"""Elements of a half that the backward has in hand at once, 256 KiB: its temporaries stay in a core's L2 cache."""


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

    def of_rows(self, rows: slice) -> GateUpLora:
        """The share of some rows."""
        parts = (None if xa is None else xa[rows] for xa in (self.xa_gate_TR, self.xa_up_TR))
        return replace(self, **dict(zip(("xa_gate_TR", "xa_up_TR"), parts, strict=True)))

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
    if activation == "silu":
        return F.silu(gate_TF).mul_(up_TF).to(gate_up_TG.dtype)
    product_TF = _gelu_sigmoid(gate_TF, gate_TF.square())
    return product_TF.mul_(gate_TF).mul_(up_TF).to(gate_up_TG.dtype)


def backward_reference(
    dproduct_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    out_TG: torch.Tensor,
    lora: GateUpLora | None = None,
    activation: Activation = "silu",
) -> torch.Tensor:
    """dgate = dproduct * up * activation'(gate), dup = dproduct * activation(gate); into out.

    With s = sigmoid(u) and activation(gate) = gate * s: activation' = s + gate * u' * s * (1 - s). u is the gate itself for
    SiLU. In place where possible, and some rows at a time: on a CPU, memory costs more than the arithmetic.
    """
    step = max(1, BLOCK // max(1, dproduct_TF.shape[-1]))
    for begin in range(0, len(dproduct_TF), step):
        rows = slice(begin, begin + step)
        gate_tF, up_tF = _halves(gate_up_TG[rows], lora and lora.of_rows(rows))
        dgate_half, dup_half = out_TG[rows].chunk(2, -1)
        if activation == "silu":
            s_tF = torch.sigmoid(gate_tF)
            slope_tF = (1 - s_tF).mul_(gate_tF).add_(1).mul_(s_tF)
        else:
            square_tF = gate_tF.square()
            s_tF = _gelu_sigmoid(gate_tF, square_tF.clone())
            # s * (1 - s) first: it is 0 where the rest is large.
            slope_tF = square_tF.mul_(3 * GELU_CUBE).add_(GELU_SCALE).mul_(s_tF).mul_(1 - s_tF).mul_(gate_tF).add_(s_tF)
        slope_tF.mul_(up_tF).mul_(dproduct_TF[rows])
        s_tF.mul_(gate_tF).mul_(dproduct_TF[rows])
        # Both are complete before either is written: out may be gate_up.
        dgate_half.copy_(slope_tF)
        dup_half.copy_(s_tF)
    return out_TG


def _gelu_sigmoid(gate_TF: torch.Tensor, square_TF: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x) / x = (1 + tanh(u / 2)) / 2 = sigmoid(u), u = x (GELU_SCALE + GELU_CUBE x^2), over the square.

    PyTorch's own gelu takes as long on a CPU as five such passes.
    """
    return square_TF.mul_(GELU_CUBE).add_(GELU_SCALE).mul_(gate_TF).sigmoid_()


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
