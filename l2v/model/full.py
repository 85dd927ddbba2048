"""All weights of a stage without LoRA: made trainable, written as a transformers checkpoint, and read again.

Such a stage starts from the base with everything before it merged, and what it writes stands alone: later stages and encoders
replace the base's weights by it. The language-model head is not part of it; it stays that of the base, or, where it is tied to
the embeddings, follows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from l2v.errors import UserError, first_line
from l2v.files import follow_umask
from l2v.model.adapter_file import LINEAGE, weights_files, weights_sha256
from l2v.model.vocabulary import grow_embedding, rows_in, rows_of


def train_all(inner: PreTrainedModel) -> PreTrainedModel:
    """The same decoder with every weight trainable that hidden states depend on."""
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_(not is_unused(name))
    return inner


def is_unused(name: str) -> bool:
    """Whether no hidden state depends on a weight: BERT's pooler, which transformers puts behind the last layer."""
    return name.startswith("pooler.")


def weights_without_gradient(model: nn.Module, output: torch.Tensor) -> list[str]:
    """Names of trained weights that an output does not depend on, read off its graph: no gradient is computed."""
    reached, seen, ahead = set(), set(), [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        ahead += [following for following, _ in node.next_functions]
    return [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in reached]


def save_weights(
    inner: PreTrainedModel, tensors: Mapping[str, torch.Tensor], folder: Path, lineage: dict[str, Any]
) -> None:
    """Write a checkpoint of the decoder without head, in the decoder's dtype, with its lineage.

    tensors: fp32, by the names of the decoder's parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", inner.dtype).contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(state, folder, max_shard_size="5GB")
    implementation = inner.config._attn_implementation
    inner.config._attn_implementation = "sdpa"  # the file must not name an implementation that only l2v has
    try:
        inner.config.save_pretrained(folder)
    finally:
        inner.config._attn_implementation = implementation
    follow_umask(folder)
    lineage = lineage | {"adapter": {"sha256": weights_sha256(folder), "weights": "all"}}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_weights(inner: PreTrainedModel, folder: str | Path, *, whole: PreTrainedModel | None = None) -> None:
    """Replace all weights of a decoder by those that `save_weights` wrote, rounded to its dtype.

    whole: the language model around the decoder, where its head is used as well (MNTP): if the stage had more tokens than the
    base, both get the rows.

    Raises:
        UserError: a file is damaged, or the weights are not those of this decoder.
    """
    rows = rows_in(folder)
    if rows > rows_of(inner):
        grow_embedding(whole or inner, rows)
    own = {name: each for name, each in inner.named_parameters() if not is_unused(name)}
    missing = set(own)
    for file in weights_files(folder):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: damaged: {first_line(error)}; train the stage again with --fresh") from None
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(f"{file}: its tensor {name} {list(tensor.shape)} does not fit this base")
            with torch.no_grad():
                own[name].copy_(tensor)
        missing -= tensors.keys()
    if missing:
        raise UserError(
            f"{folder}: its weights lack {len(missing)} of {len(own)} tensors, for example {sorted(missing)[0]}; train the "
            "stage again with --fresh"
        )
