"""Rows of a decoder's embedding for tokens that the base does not have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from l2v.model.adapter_file import adapter_folder, read_json
from l2v.model.settings import quiet_transformers


def rows_of(model: PreTrainedModel) -> int:
    """How many tokens the model has a vector for."""
    return model.get_input_embeddings().weight.shape[0]


def rows_with(adapters: Sequence[str], rows: int) -> int:
    """Rows of an embedding of `rows` after these adapters were merged: some have trained vectors for new tokens."""
    for adapter in adapters:
        config = read_json(adapter_folder(adapter))
        ids = config.get("trainable_token_indices") or config.get("token_indices") or []
        lists = list(ids.values()) if isinstance(ids, dict) else [ids]
        found = [id for each in lists if isinstance(each, list) for id in each if isinstance(id, int)]
        rows = max([rows, *(id + 1 for id in found)])
    return rows


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
