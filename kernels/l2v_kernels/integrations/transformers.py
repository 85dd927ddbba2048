"""Packed attention inside transformers models: `attn_implementation="l2v"`.

register()
model = AutoModel.from_pretrained(name, attn_implementation="l2v")
packed = PackedAttention(cu_seqlens, plan=AttentionPlan.from_lengths(lengths))
model(input_ids=ids[None], position_ids=positions[None], packed=packed, use_cache=False)
"""

from dataclasses import dataclass

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2v_kernels.attention import AttentionPlan, attention

NAME = "l2v"


@dataclass(frozen=True)
class PackedAttention:
    """The segments of one packed sequence, passed to a model's forward as the keyword `packed`."""

    cu_seqlens: torch.Tensor
    """int32 [S + 1]"""
    seeds_S: torch.Tensor | None = None
    """int64 [S], needed in training mode with dropout_p > 0"""
    plan: AttentionPlan | None = None
    causal: bool = False
    dropout_p: float = 0.0


def register() -> None:
    """Adds "l2v" to transformers' attention functions; calling it again changes nothing.

    It registers no mask function: transformers then builds no mask (masking_utils, `_preprocess_mask_arguments`), and does
    not search position_ids for segments.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention_forward)


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedAttention | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Called by transformers in every layer.

    Args:
        module: the attention layer; its `layer_idx` is the dropout stream.
        query: [1, H, T, D].
        key: [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: must be None.
        scaling: of the scores; default D ** -0.5.
        dropout: not used: probability and seeds come with `packed`, and apply while `module.training`.
        sliding_window: window of the layer, counted as transformers does.
        softcap: as in `l2v_kernels.attention`.
        packed: the segments.
        kwargs: not used.

    Returns:
        ([1, T, H, D], None).

    Raises:
        ValueError: without `packed`, for more than one sequence, or with a mask.
    """
    if packed is None:
        raise ValueError(
            f'attn_implementation="{NAME}" needs the segments: call the model with packed=PackedAttention('
            "cu_seqlens, ...) and one packed sequence, input_ids [1, T] and position_ids [1, T] that restart "
            "at 0 in each segment."
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"packed attention takes one sequence and no cache, got query {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    if attention_mask is not None:
        raise ValueError(f"packed attention takes no mask, got one of shape {tuple(attention_mask.shape)}")
    o_THD = attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packed.cu_seqlens,
        scale=scaling,
        dropout_p=packed.dropout_p if module.training else 0.0,
        seeds_S=packed.seeds_S,
        stream=module.layer_idx,
        causal=packed.causal,
        window=_window(sliding_window, packed.causal),
        softcap=softcap,
        plan=packed.plan,
    )
    return o_THD[None], None


def _window(sliding_window: int | None, causal: bool) -> int | None:
    """A window of transformers as `attention` counts it."""
    if sliding_window is None or causal:
        return sliding_window
    # Without causality transformers counts to both sides and inclusively: |i - j| <= sliding_window (masking_utils,
    # sliding_window_bidirectional_overlay).
    return sliding_window + 1
