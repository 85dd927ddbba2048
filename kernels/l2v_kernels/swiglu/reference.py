"""SwiGLU in plain PyTorch: the definition of the op, and the path taken where Triton is not."""

import torch


def forward_reference(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in fp32 (fp64 for fp64), rounded once."""
    gate_TF, up_TF = _halves(gate_up_TG)
    return torch.nn.functional.silu(gate_TF).mul_(up_TF).to(gate_up_TG.dtype)


def backward_reference(dproduct_TF: torch.Tensor, gate_up_TG: torch.Tensor, out_TG: torch.Tensor) -> torch.Tensor:
    """With s = sigmoid(gate): dgate = dproduct * s * up * (1 + gate * (1 - s)), dup = dproduct * s * gate; into out.

    In place where it can be: on a CPU, fresh memory costs more than the arithmetic.
    """
    gate_TF, up_TF = _halves(gate_up_TG)
    s_TF = torch.sigmoid(gate_TF)
    dgate_TF = (1 - s_TF).mul_(gate_TF).add_(1).mul_(up_TF)
    s_TF.mul_(dproduct_TF)
    dgate_TF.mul_(s_TF)
    # Both are complete before either is written: out may be gate_up.
    dup_TF = s_TF.mul_(gate_TF)
    for half_TF, found_TF in zip(out_TG.chunk(2, -1), (dgate_TF, dup_TF), strict=True):
        half_TF.copy_(found_TF)
    return out_TG


def _halves(gate_up_TG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gate_up_TG.to(torch.promote_types(gate_up_TG.dtype, torch.float32)).chunk(2, -1)
