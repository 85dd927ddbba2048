"""Before an export is written: whether plain transformers computes the same from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from l2v.batch import Segment, pack
from l2v.errors import UserError, first_line
from l2v.model.direction import TOLERANCE, alone, difference
from l2v.model.export_config import Keys, complete_config, direction_keys, window_keys
from l2v.model.packed import PackedDecoder
from l2v.model.path import set_path
from l2v.model.proof import LENGTHS, Proof, random_texts
from l2v.model.settings import drop_nothing, quiet_transformers, set_attention
from l2v.model.small import small_model

PADDED = 1e-4
"""The same for a batch padded on the right, where state-space layers sum in another order."""


def save_config(model: Any, folder: Path, keys: Keys) -> None:
    """Write the configuration alone; `save_weights` writes it again."""
    model.config.save_pretrained(folder)
    complete_config(folder, window_keys(model.config) | keys)


def save_weights(model: Any, folder: Path, keys: Keys) -> None:
    """Write weights and configuration, as plain transformers reads them; keys: for config.json."""
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"  # the saved config must not name an implementation that only l2v has
    try:
        with quiet_transformers():
            model.save_pretrained(folder)
    finally:
        model.config._attn_implementation = implementation
    complete_config(folder, window_keys(model.config) | keys)


def settle(differences: Callable[[Keys], tuple[float, float]], directions: Sequence[Keys]) -> Keys:
    """The keys with which an export gives l2v's states in plain transformers: a direction, and eager attention if need be.

    differences: measures an export with these keys. directions: in order of preference.

    Raises:
        UserError: with none of them; the end of a sentence.
    """
    seen = []
    for keys in [direction | more for more in ({}, {"_attn_implementation": "eager"}) for direction in directions]:
        try:
            single, padded = differences(keys)
        except Exception as error:
            seen.append(f"it fails there ({first_line(error)})")
            continue
        if single <= TOLERANCE and padded <= PADDED:
            return keys
        seen.append(f"its states are {single:.1g} off alone and {padded:.1g} in a padded batch")
    raise UserError(seen[0])


@torch.no_grad()
def export_differences(config: PretrainedConfig, proof: Proof, *, causal: bool, keys: Keys) -> tuple[float, float]:
    """How far the states of an export in plain transformers are from l2v's, on a small copy: alone, and padded on the right."""
    model = small_model(config)
    model.set_attn_implementation(proof.path.attention)
    set_attention(model, causal=causal)
    drop_nothing(model)
    set_path(model, proof.path)
    packed = PackedDecoder(model, causal=causal).eval()
    texts = random_texts(model)
    states = packed(pack([Segment(ids) for ids in texts]), "hidden").split(list(LENGTHS))
    with tempfile.TemporaryDirectory() as folder:
        save_weights(model, Path(folder), keys)
        plain = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    single = max(difference(alone(plain, ids), own) for ids, own in zip(texts, states, strict=True))
    return single, _padded(plain, texts, states)


def _padded(plain: PreTrainedModel, texts: list[np.ndarray], states: Any) -> float:
    pad = getattr(plain.config, "pad_token_id", None) or 0
    ids = torch.full((len(texts), max(map(len, texts))), pad)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.from_numpy(text), 1
    out = plain(input_ids=ids, attention_mask=mask)[0]
    return max(difference(out[row, : len(own)], own) for row, own in enumerate(states))


def keys_to_state(model: PackedDecoder) -> Keys:
    """`settle` for a loaded model. Where nothing could be proved of it, the direction by which it was loaded.

    Raises:
        UserError: plain transformers would give other vectors.
    """
    proof = getattr(model.decoder, "l2v_proof", None)
    config = model.decoder.config
    directions = direction_keys(config, causal=model.causal)
    if proof is None or proof.open:
        return directions[-1]
    try:
        with quiet_transformers():
            return settle(lambda keys: export_differences(config, proof, causal=model.causal, keys=keys), directions)
    except UserError as error:
        raise UserError(
            f"this encoder ({config.model_type}) cannot be exported: plain transformers would compute something else, {error}"
        ) from None
