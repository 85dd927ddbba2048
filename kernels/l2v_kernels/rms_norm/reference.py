"""RMSNorm in plain PyTorch: the definition of the op, and the path without Triton."""

import torch


def forward_reference(
    x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, delta_TE: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum [T, E], y [T, E], rstd [T]), see `op.forward`."""
    sum_TE = x_TE if delta_TE is None else x_TE + delta_TE
    rstd_T = torch.rsqrt(wide(sum_TE).square().mean(-1) + eps)
    return sum_TE, normalize_reference(sum_TE, rstd_T, weight_E), rstd_T


def normalize_reference(sum_TE: torch.Tensor, rstd_T: torch.Tensor, weight_E: torch.Tensor) -> torch.Tensor:
    """y [T, E] = sum * rstd * weight, in this order, which gives the same bits each time."""
    return (wide(sum_TE) * rstd_T.unsqueeze(-1)).mul_(weight_E).to(sum_TE.dtype)


def backward_reference(
    dy_TE: torch.Tensor,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_E: torch.Tensor,
    dsum_TE: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx [T, E] = rstd * (g - unit * mean(g * unit)) + dsum, with g = dy * weight and unit = sum * rstd."""
    g_TE, unit_TE = wide(dy_TE) * weight_E.to(rstd_T.dtype), wide(sum_TE) * rstd_T.unsqueeze(-1)
    dx_TE = g_TE.addcmul_(unit_TE, (g_TE * unit_TE).mean(-1, keepdim=True), value=-1).mul_(rstd_T.unsqueeze(-1))
    return (dx_TE if dsum_TE is None else dx_TE.add_(dsum_TE)).to(sum_TE.dtype)


def weight_gradient_reference(dy_TE: torch.Tensor, sum_TE: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """[E] in rstd's dtype: the sum over rows of dy * sum * rstd."""
    return (wide(sum_TE) * rstd_T.unsqueeze(-1)).mul_(dy_TE).flatten(0, -2).sum(0)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
