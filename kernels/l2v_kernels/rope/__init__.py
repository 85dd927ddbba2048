"""Rotary position embedding of packed queries and keys, in place on request."""

import torch

from l2v_kernels.rope.op import Rotary

__all__ = ["rope"]


def rope(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    *,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x * cos + rotate_half(x) * sin for each head of q and k, computed in fp32 and rounded once.

    Args:
        q_THD: queries [T, H, D] of a floating dtype, D even; any strides, so slices of a qkv buffer are fine.
        k_TKD: keys [T, K, D], likewise, in the same dtype.
        cos_TD: [T, D] of a floating dtype, as transformers' rotary embeddings compute it. No gradient.
        sin_TD: likewise.
        inplace: write into q and k and return them. Autograd's rules for in-place operations apply: neither may be a
            leaf that requires grad, nor one of several views that one operation made (`split`).

    Returns:
        q and k, rotated, in their dtype; differentiable in both.

    Raises:
        ValueError: shapes, dtypes or devices are outside the above.

    Source: Su et al. 2021 (RoFormer, arXiv 2104.09864), in the half-split layout of GPT-NeoX and Llama.
    """
    tensors = (q_THD, k_TKD, cos_TD, sin_TD)
    shapes = f"q {tuple(q_THD.shape)}, k {tuple(k_TKD.shape)}, cos {tuple(cos_TD.shape)}, sin {tuple(sin_TD.shape)}"
    if q_THD.ndim != 3 or k_TKD.ndim != 3 or q_THD.shape[::2] != k_TKD.shape[::2] or q_THD.shape[2] % 2:
        raise ValueError(f"rope needs q [T, H, D] and k [T, K, D] of an even D, got {shapes}")
    if cos_TD.shape != q_THD.shape[::2] or sin_TD.shape != cos_TD.shape:
        raise ValueError(f"rope needs cos and sin [T, D], got {shapes}")
    if not all(x.is_floating_point() for x in tensors) or q_THD.dtype != k_TKD.dtype or cos_TD.dtype != sin_TD.dtype:
        dtypes = ", ".join(str(x.dtype) for x in tensors)
        raise ValueError(f"rope needs floating tensors, q like k and cos like sin, got {dtypes} for {shapes}")
    if any(x.device != q_THD.device for x in tensors):
        raise ValueError(f"q, k, cos and sin must be on one device for {shapes}")
    return Rotary.apply(q_THD, cos_TD, sin_TD, inplace), Rotary.apply(k_TKD, cos_TD, sin_TD, inplace)
