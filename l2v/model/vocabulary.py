"""Rows of a decoder's embedding for tokens that the base does not have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from l2v.errors import UserError
from l2v.model.adapter_file import adapter_folder, holds_weights, read_json
from l2v.model.settings import quiet_transformers


def rows_of(model: PreTrainedModel) -> int:
    """How many tokens the model has a vector for."""
    return model.get_input_embeddings().weight.shape[0]


def rows_with(adapters: Sequence[str], rows: int) -> int:
    """Rows of an embedding of `rows` after these adapters were merged: some have trained vectors for new tokens."""
    for adapter in adapters:
        if holds_weights(adapter):
            rows = max(rows, rows_in(adapter))
            continue
        config = read_json(adapter_folder(adapter))
        ids = config.get("trainable_token_indices") or config.get("token_indices") or []
        lists = list(ids.values()) if isinstance(ids, dict) else [ids]
        found = [id for each in lists if isinstance(each, list) for id in each if isinstance(id, int)]
        rows = max([rows, *(id + 1 for id in found)])
    return rows


def rows_in(folder: str | Path) -> int:
    """Rows of the embedding that a stage without LoRA has left.

    Raises:
        UserError: its config.json is damaged.
    """
    file = Path(folder) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = found.get("text_config", found)["vocab_size"]
        if isinstance(rows, int):
            return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{file}: damaged; train the stage again with --fresh")


@torch.no_grad()
def grow_embedding(model: PreTrainedModel, rows: int) -> None:
    """Give embedding and head (if the model has one) `rows` rows; new ones are the mean of the old, computed in float32.

    The mean is a vector like any other, so that a new token starts neither loud nor at zero, on every rank alike.
    """
    before = rows_of(model)
    with quiet_transformers():
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in [model.get_input_embeddings(), *([head] if head is not None else [])]:
        weight = module.weight
        weight[before:] = weight[:before].float().mean(0).to(weight.dtype)
        weight.requires_grad_(False)
