"""Packed attention for callers that hold padded batches."""

import torch

from l2v_kernels.attention.plan import AttentionPlan
from l2v_kernels.attention.reference import Permute


def attention_padded(
    q_BHtD: torch.Tensor,
    k_BKtD: torch.Tensor,
    v_BKtD: torch.Tensor,
    attention_mask_Bt: torch.Tensor,
    *,
    seeds_B: torch.Tensor | None = None,
    **settings,
) -> torch.Tensor:
    """`attention` on the tokens of a padded batch.

    The batch is packed, so padding costs memory traffic but no attention, and the host syncs with nothing. A caller with
    many layers should pack once itself and call `attention`.

    Args:
        q_BHtD: queries [B, H, t, D] as transformers has them, t the padded length.
        k_BKtD: keys [B, K, t, D].
        v_BKtD: values [B, K, t, D].
        attention_mask_Bt: bool or integer [B, t], nonzero at tokens; padding may be left, right, or anywhere between.
            Causality, window and dropout count a row's tokens, without its padding.
        seeds_B: int64 [B], one seed a row, needed with dropout.
        settings: scale, dropout_p, stream, causal, window and softcap of `attention`.

    Returns:
        o [B, H, t, D] in q's dtype, 0 at padding.

    Raises:
        ValueError: as `attention`, and for a mask or seeds of another shape or dtype.
        NotImplementedError: as `attention`.
    """
    from l2v_kernels.attention import attention

    shapes = f"q {tuple(q_BHtD.shape)}, k {tuple(k_BKtD.shape)}, v {tuple(v_BKtD.shape)}"
    if any(x.ndim != 4 for x in (q_BHtD, k_BKtD, v_BKtD)) or q_BHtD.shape[::2] != k_BKtD.shape[::2]:
        raise ValueError(f"attention_padded needs q [B, H, t, D] and k, v [B, K, t, D], got {shapes}")
    B, _, length, _ = q_BHtD.shape
    mask = attention_mask_Bt
    if mask.shape != (B, length) or mask.is_floating_point() or mask.device != q_BHtD.device:
        raise ValueError(
            f"attention_mask must be bool or integer [{B}, {length}] on {q_BHtD.device}, got {mask.dtype} "
            f"{tuple(mask.shape)} on {mask.device} for {shapes}"
        )
    if seeds_B is not None and seeds_B.shape != (B,):
        raise ValueError(f"seeds_B must be int64 [{B}], got {seeds_B.dtype} {tuple(seeds_B.shape)} for {shapes}")
    n, device = B * length, mask.device
    real_Bt = mask != 0
    order_T, inverse_T, cu_seqlens = _packing(real_Bt)
    if seeds_B is not None:
        seeds_B = torch.cat([seeds_B, seeds_B.new_zeros(n)])
    if device.type == "cpu":
        plan = AttentionPlan.from_cu_seqlens(cu_seqlens)
    else:
        plan = AttentionPlan.on_device(cu_seqlens, n)

    def pack(x_BHtD):
        # Padding may hold anything, and 0 * inf is not 0.
        clean = x_BHtD.masked_fill(~real_Bt[:, None, :, None], 0.0)
        return Permute.apply(clean.transpose(1, 2).reshape(n, *clean.shape[1::2]), order_T, inverse_T)

    o_THD = attention(*map(pack, (q_BHtD, k_BKtD, v_BKtD)), cu_seqlens, seeds_S=seeds_B, plan=plan, **settings)
    o_BHtD = Permute.apply(o_THD, inverse_T, order_T).view(B, length, *o_THD.shape[1:]).transpose(1, 2)
    return o_BHtD.masked_fill(~real_Bt[:, None, :, None], 0.0)


def _packing(real_Bt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order [T], its inverse [T], cu_seqlens [S + 1]) of a pack with all B * t places of a batch.

    Tokens come first, row by row, then the padding, each place a segment of one token. Only the device knows how many there
    are of either, so the sizes of all tensors depend on B and t alone.
    """
    n, device = real_Bt.numel(), real_Bt.device
    order_T = torch.argsort((~real_Bt).flatten().to(torch.uint8), stable=True)
    inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(n, device=device))
    ends_B = real_Bt.sum(1).cumsum(0)
    pad_ends = (real_Bt.sum() + torch.arange(1, n + 1, device=device)).clamp(max=n)
    return order_T, inverse_T, torch.cat([ends_B.new_zeros(1), ends_B, pad_ends])
