"""Rotary position embedding in plain PyTorch: the definition of the op, and the path without Triton."""

import torch


def rope_reference(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, inverse: bool) -> torch.Tensor:
    """x [T, H, D] rotated, in its dtype; with `inverse` the transposed map, which the gradient needs. cos and sin: [T, D]."""
    dtype = torch.promote_types(x_THD.dtype, torch.float32)
    x, cos, sin = x_THD.to(dtype), cos_TD.to(dtype)[:, None], sin_TD.to(dtype)[:, None]
    if inverse:
        # rotate_half is (x1, x2) -> (-x2, x1); its transpose is (x1, x2) -> (x2, -x1).
        left, right = (x * sin).chunk(2, -1)
        turned = torch.cat([right, -left], -1)
    else:
        left, right = x.chunk(2, -1)
        turned = torch.cat([-right, left], -1) * sin
    return torch.addcmul(turned, x, cos).to(x_THD.dtype)
