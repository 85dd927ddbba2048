"""Rotary position embedding in plain PyTorch: the definition of the op, and the path without Triton."""

import torch


def rope_reference(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, inverse: bool) -> torch.Tensor:
    """x [T, H, D] rotated, in its dtype; with `inverse` the transposed map, which the gradient needs. cos and sin: [T, D]."""
    dtype = torch.promote_types(x_THD.dtype, torch.float32)
    x, cos, sin = x_THD.to(dtype), cos_TD.to(dtype)[:, None], sin_TD.to(dtype)[:, None]
    (x1, x2), (cos1, cos2), (sin1, sin2) = (part.chunk(2, -1) for part in (x, cos, sin))
    # rotate_half is (x1, x2) -> (-x2, x1), then times sin; its transpose is sin first, then (x1, x2) -> (x2, -x1).
    of_x2, of_x1 = (sin2, -sin1) if inverse else (-sin1, sin2)
    if torch.is_grad_enabled() and x.requires_grad:
        y = torch.cat([torch.addcmul(x2 * of_x2, x1, cos1), torch.addcmul(x1 * of_x1, x2, cos2)], -1)
        return y.to(x_THD.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y1, y2 = y.chunk(2, -1)
    torch.mul(x2, of_x2, out=y1).addcmul_(x1, cos1)
    torch.mul(x1, of_x1, out=y2).addcmul_(x2, cos2)
    return y.to(x_THD.dtype)


def add_and_rotate_reference(
    qkv_TN: torch.Tensor,
    xa_TR: torch.Tensor,
    b_NR: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    heads: tuple[int, int],
) -> None:
    """As `op.add_and_rotate`: qkv [T, N] += xa B^T of each adapter, then queries and keys rotated; rounded once."""
    dtype = torch.promote_types(qkv_TN.dtype, torch.float32)
    D, R = cos_TD.shape[1], b_NR.shape[1]
    sizes = [D * n for n in (heads[0], heads[1], heads[1])]
    shares = zip(xa_TR.to(dtype).split(R, 1), b_NR.to(dtype).split(sizes), strict=True)
    x_THD = (qkv_TN.to(dtype) + torch.cat([xa @ b.t() for xa, b in shares], 1)).unflatten(1, (-1, D))
    rotated = sum(heads)
    x_THD[:, :rotated] = rope_reference(x_THD[:, :rotated], cos_TD, sin_TD, inverse=False)
    qkv_TN.copy_(x_THD.flatten(1))
