"""Packed attention for callers that hold padded batches."""

import torch

from l2v_kernels.attention.plan import AttentionPlan
from l2v_kernels.attention.reference import Permute


def attention_padded(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    attention_mask_BS: torch.Tensor,
    *,
    seeds_B: torch.Tensor | None = None,
    **settings,
) -> torch.Tensor:
    """`attention` on the tokens of a padded batch; returns o_BHSD in q's dtype, 0 at padding.

    The batch is packed, so padding costs memory traffic but no attention, and nothing waits for the device. A caller
    with many layers packs once itself and calls `attention`.

    Args:
        q_BHSD, k_BKSD, v_BKSD: [B, H, S, D] and twice [B, K, S, D], as transformers has them.
        attention_mask_BS: bool or integer [B, S], nonzero at tokens; padding may be left, right, or anywhere between.
            Tokens close up: causality, window and dropout count a row's tokens, not its places.
        seeds_B: int64 [B], one seed a row, needed with dropout.
        settings: scale, dropout_p, stream, causal, window and softcap of `attention`.
    Errors: as `attention`, and ValueError for a mask of another shape or dtype.
    """
    from l2v_kernels.attention import attention

    shapes = f"q {tuple(q_BHSD.shape)}, k {tuple(k_BKSD.shape)}, v {tuple(v_BKSD.shape)}"
    if any(x.ndim != 4 for x in (q_BHSD, k_BKSD, v_BKSD)) or q_BHSD.shape[::2] != k_BKSD.shape[::2]:
        raise ValueError(f"attention_padded needs q [B, H, S, D] and k, v [B, K, S, D], got {shapes}")
    B, _, S, _ = q_BHSD.shape
    mask = attention_mask_BS
    if mask.shape != (B, S) or mask.is_floating_point() or mask.device != q_BHSD.device:
        raise ValueError(
            f"attention_mask must be bool or integer [{B}, {S}] on {q_BHSD.device}, got {mask.dtype} "
            f"{tuple(mask.shape)} on {mask.device} for {shapes}"
        )
    if seeds_B is not None and seeds_B.shape != (B,):
        raise ValueError(f"seeds_B must be int64 [{B}], got {seeds_B.dtype} {tuple(seeds_B.shape)} for {shapes}")
    n, device = B * S, mask.device
    real_BS = mask != 0
    # Tokens first, row by row, then the padding, each place a segment of one token: how many there are of either is
    # for the device to know, and the sizes of all tensors depend on B and S alone.
    order_T = torch.argsort((~real_BS).flatten().to(torch.uint8), stable=True)
    inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(n, device=device))
    ends_B = real_BS.sum(1).cumsum(0)
    pad_ends = (real_BS.sum() + torch.arange(1, n + 1, device=device)).clamp(max=n)
    cu_seqlens = torch.cat([ends_B.new_zeros(1), ends_B, pad_ends])
    if seeds_B is not None:
        seeds_B = torch.cat([seeds_B, seeds_B.new_zeros(n)])
    if device.type == "cpu":
        plan = AttentionPlan.from_cu_seqlens(cu_seqlens)
    else:
        plan = AttentionPlan.on_device(cu_seqlens, n)

    def pack(x_BHSD):
        # Padding may hold anything, and 0 * inf is not 0.
        clean = x_BHSD.masked_fill(~real_BS[:, None, :, None], 0.0)
        return Permute.apply(clean.transpose(1, 2).reshape(n, *clean.shape[1::2]), order_T, inverse_T)

    o_THD = attention(*map(pack, (q_BHSD, k_BKSD, v_BKSD)), cu_seqlens, seeds_S=seeds_B, plan=plan, **settings)
    o_BHSD = Permute.apply(o_THD, inverse_T, order_T).view(B, S, *o_THD.shape[1:]).transpose(1, 2)
    return o_BHSD.masked_fill(~real_BS[:, None, :, None], 0.0)
