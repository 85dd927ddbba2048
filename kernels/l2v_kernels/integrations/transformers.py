"""Packed attention inside transformers models: `attn_implementation="l2v"`.

register()
model = AutoModel.from_pretrained(name, attn_implementation="l2v")
packed = PackedAttention(cu_seqlens, plan=AttentionPlan.from_lengths(lengths))
model(input_ids=ids[None], position_ids=positions[None], packed=packed, use_cache=False)
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2v_kernels.attention import AttentionPlan, attention

NAME = "l2v"
CHANGES_SCORES = {"s_aux": "attention sinks", "sinks": "attention sinks", "position_bias": "a bias by position"}
"""Keywords of transformers' attention functions that this one does not know and must not drop."""


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
    slots: torch.Tensor | None = None
    """int64, if the model runs a row a text: the places of the segments' tokens in the flattened rows; all others are padding"""


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
        query: [1, H, T, D]; with `packed.slots` [n, H, t, D], a row a text.
        key: as query with K heads, a divisor of H.
        value: as key; its width may differ (multi-head latent attention).
        attention_mask: must be None.
        scaling: of the scores; default D ** -0.5.
        dropout: not used: probability and seeds come with `packed`, and apply while `module.training`.
        sliding_window: window of the layer, counted as transformers does.
        softcap: as in `l2v_kernels.attention`.
        packed: the segments.
        kwargs: not used; those in CHANGES_SCORES must be None.

    Returns:
        ([1, T, H, D of value], None); with `packed.slots` [n, t, H, D of value], zeros in padding.

    Raises:
        ValueError: without `packed`, for more than one sequence, with a mask, or with something that changes the scores and that
            this attention does not compute.
    """
    _check(module, query, key, attention_mask, packed, kwargs)
    assert packed is not None
    n, _, t, width = query.shape
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    if packed.slots is not None:
        rows = [x.index_select(0, packed.slots) for x in rows]
    widest = max(width, value.shape[-1])
    q_THD, k_TKD, v_TKD = (pad(x, (0, widest - x.shape[-1])) for x in rows)
    o_THD = attention(
        q_THD,
        k_TKD,
        v_TKD,
        packed.cu_seqlens,
        scale=width**-0.5 if scaling is None else scaling,
        dropout_p=packed.dropout_p if module.training else 0.0,
        seeds_S=packed.seeds_S,
        stream=getattr(module, "layer_idx", None) or 0,
        causal=packed.causal,
        window=window_of(module, sliding_window, packed.causal),
        softcap=softcap,
        plan=packed.plan,
    )[..., : value.shape[-1]]
    if packed.slots is None:
        return o_THD[None], None
    return o_THD.new_zeros(n * t, *o_THD.shape[1:]).index_copy(0, packed.slots, o_THD).unflatten(0, (n, t)), None


def _check(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed: PackedAttention | None,
    others: dict,
) -> None:
    if packed is None:
        raise ValueError(
            f'attn_implementation="{NAME}" needs the segments: call the model with packed=PackedAttention('
            "cu_seqlens, ...) and one packed sequence, input_ids [1, T] and position_ids [1, T] that restart "
            "at 0 in each segment."
        )
    if (query.shape[0] != 1 and packed.slots is None) or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"packed attention takes one sequence and no cache, got query {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    if attention_mask is not None:
        raise ValueError(f"packed attention takes no mask, got one of shape {tuple(attention_mask.shape)}")
    if found := [name for name in CHANGES_SCORES if others.get(name) is not None]:
        raise ValueError(f"packed attention does not compute {CHANGES_SCORES[found[0]]} ({found[0]})")
    if packed.dropout_p and module.training and getattr(module, "layer_idx", None) is None:
        raise ValueError(f"attention dropout needs the layer's number, and {type(module).__name__} has no layer_idx")


def window_of(module: torch.nn.Module, sliding_window: int | None, causal: bool) -> int | None:
    """A window of transformers as `attention` counts it: |i - j| < window.

    Args:
        module: the attention layer; its configuration says how transformers counts.
        sliding_window: of the layer, as transformers passes it on; None without a window.
        causal: whether attention is causal.
    """
    if sliding_window is None or causal:
        return sliding_window
    config = getattr(module, "config", None)
    by_flag = getattr(config, "use_bidirectional_attention", None) is True and getattr(config, "is_causal", True)
    if by_flag and getattr(config, "model_type", None) == "gemma3_text":
        return sliding_window  # Gemma 3's own flag: its configuration has halved the window and counts exclusively
    # Without causality transformers counts to both sides and inclusively: |i - j| <= config.sliding_window (masking_utils,
    # sliding_window_bidirectional_overlay). Layers pass on that number, those of encoders one more (ModernBERT).
    stated = getattr(config, "sliding_window", None)
    return sliding_window if sliding_window - 1 == stated else sliding_window + 1
