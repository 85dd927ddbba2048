"""RMSNorm in plain PyTorch: the definition of the op, and the path without Triton."""

import torch

BLOCK = 1 << 16
"""Elements that the backward has in hand at once, 256 KiB in fp32: its temporaries stay in a core's L2 cache."""


def forward_reference(
    x_TE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float,
    delta_TE: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum [T, E], y [T, E], rstd [T]), see `op.forward`."""
    sum_TE = x_TE if delta_TE is None else x_TE + delta_TE
    rstd_T = rstd_reference(sum_TE, eps)
    return sum_TE, normalize_reference(sum_TE, rstd_T, weight_E, offset), rstd_T


def rstd_reference(sum_TE: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(sum ** 2) + eps) of each row, fp32 (fp64 for fp64)."""
    return torch.rsqrt(wide(sum_TE).square().mean(-1) + eps)


def normalize_reference(
    sum_TE: torch.Tensor, rstd_T: torch.Tensor, weight_E: torch.Tensor, offset: float = 0.0
) -> torch.Tensor:
    """y [T, E] = sum * rstd * (offset + weight), in this order, which gives the same bits each time."""
    return scaled(sum_TE, rstd_T, weight_E, offset).to(sum_TE.dtype)


def scaled(sum_TE: torch.Tensor, rstd_T: torch.Tensor, weight_E: torch.Tensor, offset: float) -> torch.Tensor:
    """The y of `normalize_reference` before it is rounded."""
    return (wide(sum_TE) * rstd_T.unsqueeze(-1)).mul_(factor(weight_E, offset))


def factor(weight_E: torch.Tensor, offset: float) -> torch.Tensor:
    """offset + weight, added in fp32 as Gemma does; the weight itself without an offset."""
    return wide(weight_E) + offset if offset else weight_E


def backward_reference(
    dy_TE: torch.Tensor,
    sum_TE: torch.Tensor,
    rstd_T: torch.Tensor,
    weight_E: torch.Tensor,
    dsum_TE: torch.Tensor | None = None,
    offset: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx [T, E] = rstd * (g - unit * mean(g * unit)) + dsum, with g = dy * (offset + weight) and unit = sum * rstd.

    Some rows at a time: on a CPU the passes over memory cost more than the arithmetic.
    """
    factor_E = factor(weight_E, offset).to(rstd_T.dtype)
    dx_TE = torch.empty_like(sum_TE, memory_format=torch.contiguous_format) if out is None else out
    step = max(1, BLOCK * len(sum_TE) // max(1, sum_TE.numel()))
    for begin in range(0, len(sum_TE), step):
        rows = slice(begin, begin + step)
        rstd_t1 = rstd_T[rows].unsqueeze(-1)
        g_tE, unit_tE = wide(dy_TE[rows]) * factor_E, wide(sum_TE[rows]) * rstd_t1
        g_tE.addcmul_(unit_tE, (g_tE * unit_tE).mean(-1, keepdim=True), value=-1).mul_(rstd_t1)
        dx_TE[rows].copy_(g_tE if dsum_TE is None else g_tE.add_(dsum_TE[rows]))
    return dx_TE


def weight_gradient_reference(dy_TE: torch.Tensor, sum_TE: torch.Tensor, rstd_T: torch.Tensor) -> torch.Tensor:
    """[E] in rstd's dtype: the sum over rows of dy * sum * rstd."""
    return (wide(sum_TE) * rstd_T.unsqueeze(-1)).mul_(dy_TE).flatten(0, -2).sum(0)


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
