"""The module that becomes an ONNX graph: token ids to states and vectors, attention, pooling and norm inside."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel

from l2v.errors import UserError
from l2v.formats.facts import Export
from l2v.model.settings import quiet_transformers


class Band(NamedTuple):
    """Which tokens a token sees: at most so many to its left and right, None for all."""

    left: int | None
    right: int | None


class Graph(nn.Module):
    """forward(input_ids [B, T], attention_mask [B, T], pool_start [1]) -> (states [B, T, E], vectors [B, E]), float32.

    A plain transformers model whose attention modules get masks that are written out here, so that the graph has the
    direction and the windows of the export whatever a runtime believes. Padding may stand on either side.
    pool_start: how many tokens at the start of each text are not pooled.
    """

    def __init__(self, export: Export, *, half: bool = False) -> None:
        """half: computes in float16.

        Raises:
            UserError: its attention cannot be written as a mask around each token.
        """
        super().__init__()
        self.how, self.normalize = export.found.base.pooling, export.found.normalize
        with quiet_transformers():
            self.decoder: Any = AutoModel.from_pretrained(export.folder, dtype=torch.float32, trust_remote_code=False)
        self.decoder.eval()
        self.decoder.config.use_cache = False
        bands = bands_of(self.decoder, export.tokenizer.length)
        if half:
            self.decoder.half()
        self.bands = tuple(dict.fromkeys(bands.values()))
        self.masks = _Masks()
        for name, band in bands.items():
            self.decoder.get_submodule(name).register_forward_pre_hook(self.masks.hook(band), with_kwargs=True)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        real_BT = attention_mask.bool()
        place_BT = real_BT.long().cumsum(1) - 1
        mask = self._masks(real_BT)
        hidden_BTE = self.decoder(
            input_ids=input_ids, attention_mask=mask, position_ids=place_BT.clamp(min=0), use_cache=False
        )[0].float()
        pooled_BT = real_BT & (place_BT >= pool_start)
        rank_BT = pooled_BT.long().cumsum(1) * pooled_BT
        weights_BT = {
            "mean": pooled_BT,
            "weighted_mean": rank_BT,
            "first": rank_BT == 1,
            "last": pooled_BT & (rank_BT == rank_BT.amax(1, keepdim=True)),
        }[self.how].float()
        # Selected, not multiplied by 0: the states of padding may be anything.
        states_BTE = torch.where(pooled_BT.unsqueeze(2), hidden_BTE, 0.0)
        sums_BE = (states_BTE * weights_BT.unsqueeze(2)).sum(1)
        vectors_BE = sums_BE / weights_BT.sum(1, keepdim=True).clamp(min=1)
        if self.normalize:
            vectors_BE = nn.functional.normalize(vectors_BE, dim=-1)
        return hidden_BTE, vectors_BE

    def _masks(self, real_BT: torch.Tensor) -> torch.Tensor:
        """Fills `masks` with an additive mask [B, 1, T, T] for every band; the first one is returned."""
        place_T = torch.arange(real_BT.shape[1], device=real_BT.device)
        offset_TT = place_T.unsqueeze(0) - place_T.unsqueeze(1)
        # Far enough for a weight of 0, and finite after a score is added: a row of padding must not become NaN.
        hidden = -3e4 if self.decoder.dtype == torch.float16 else -1e30
        for band in self.bands:
            seen = real_BT[:, None, None, :]
            if band.left is not None:
                seen = seen & (offset_TT >= -band.left)
            if band.right is not None:
                seen = seen & (offset_TT <= band.right)
            seen = seen.expand(-1, 1, offset_TT.shape[0], -1)
            self.masks.of[band] = torch.where(seen, 0.0, hidden).to(self.decoder.dtype)
        return self.masks.of[self.bands[0]]


class _Masks:
    """The masks of the forward at hand. An object, because the exporter replaces dictionaries that a module holds by copies."""

    def __init__(self) -> None:
        self.of: dict[Band, torch.Tensor] = {}

    def hook(self, band: Band) -> Any:
        """For an attention module: it gets the mask of its band."""

        def replaced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"attention_mask": self.of[band]}

        return replaced


@torch.no_grad()
def bands_of(decoder: Any, length: int) -> dict[str, Band]:
    """The band of every attention module by its name, read off the masks that transformers gives them for one text.

    length: tokens of the longest text.
    """
    config = decoder.config.get_text_config()
    windows = [v for k, v in vars(config).items() if re.search("window|chunk", k) and type(v) is int and v > 0]
    tokens = min(length, max([14, *windows]) + 2)
    names = {name: module for name, module in decoder.named_modules() if hasattr(module, "is_causal")}
    found: dict[str, Band] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if "attention_mask" in kwargs:
                found[name] = _band(kwargs["attention_mask"], tokens)

        return hook

    hooks = [module.register_forward_pre_hook(look(name), with_kwargs=True) for name, module in names.items()]
    used = decoder.config._attn_implementation
    try:
        decoder.set_attn_implementation("eager")  # sdpa gets no mask where a flag of its own says as much
        ids = torch.arange(tokens).unsqueeze(0) % min(100, config.vocab_size)
        decoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        decoder.set_attn_implementation(used)
        for each in hooks:
            each.remove()
    if not found:
        raise UserError(
            f"this export ({config.model_type}) cannot be written in another format: none of its layers takes a mask"
        )
    return found


def _band(mask: torch.Tensor | None, tokens: int) -> Band:
    offset_TT = torch.arange(tokens).unsqueeze(0) - torch.arange(tokens).unsqueeze(1)
    if mask is None:
        return Band(None, None)
    mask_TT = mask.reshape(-1, *mask.shape[-2:])[0, :tokens, :tokens]
    seen_TT = mask_TT if mask_TT.dtype == torch.bool else mask_TT == 0
    left, right = int((-offset_TT[seen_TT]).max()), int(offset_TT[seen_TT].max())
    if not torch.equal(seen_TT, (offset_TT >= -left) & (offset_TT <= right)):
        raise UserError(
            "this export cannot be written in another format: its attention is not a window around each token"
        )
    return Band(None if left == tokens - 1 else left, None if right == tokens - 1 else right)
