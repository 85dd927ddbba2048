"""SwiGLU in plain PyTorch: the definition of the op, and the path taken where Triton is not."""

from __future__ import annotations

import torch

from l2v_kernels.swiglu.lora import GateUpLora


def forward_reference(gate_up_TG: torch.Tensor, lora: GateUpLora | None = None) -> torch.Tensor:
    """silu(gate) * up, in fp32 (fp64 for fp64), rounded once. LoRA's share is added to gate and up first."""
    gate_TF, up_TF = _halves(gate_up_TG, lora)
    return torch.nn.functional.silu(gate_TF).mul_(up_TF).to(gate_up_TG.dtype)


def backward_reference(
    dproduct_TF: torch.Tensor, gate_up_TG: torch.Tensor, out_TG: torch.Tensor, lora: GateUpLora | None = None
) -> torch.Tensor:
    """With s = sigmoid(gate): dgate = dproduct * s * up * (1 + gate * (1 - s)), dup = dproduct * s * gate; into out.

    In place where it can be: on a CPU, fresh memory costs more than the arithmetic.
    """
    gate_TF, up_TF = _halves(gate_up_TG, lora)
    s_TF = torch.sigmoid(gate_TF)
    dgate_TF = (1 - s_TF).mul_(gate_TF).add_(1).mul_(up_TF)
    s_TF.mul_(dproduct_TF)
    dgate_TF.mul_(s_TF)
    # Both are complete before either is written: out may be gate_up.
    dup_TF = s_TF.mul_(gate_TF)
    for half_TF, found_TF in zip(out_TG.chunk(2, -1), (dgate_TF, dup_TF), strict=True):
        half_TF.copy_(found_TF)
    return out_TG


def _halves(gate_up_TG: torch.Tensor, lora: GateUpLora | None) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(gate_up_TG.dtype, torch.float32)
    halves = gate_up_TG.to(wide).chunk(2, -1)
    if lora is None:
        return halves
    shares = [pair and pair[0].to(wide) @ pair[1].to(wide).t() for pair in (lora.gate, lora.up)]
    return tuple(half if share is None else share.add_(half) for half, share in zip(halves, shares, strict=True))
