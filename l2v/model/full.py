"""All weights of a stage without LoRA: made trainable, written as a transformers checkpoint, and read again.

Such a stage starts from the base with everything before it merged, and what it writes stands alone: later stages and encoders
replace the base's weights by it. The language-model head is not part of it; it stays that of the base, or, where it is tied to
the embeddings, follows them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from l2v.errors import UserError, first_line
from l2v.files import follow_umask
from l2v.model.lora import LINEAGE, sha256


def train_all(inner: PreTrainedModel) -> PreTrainedModel:
    """The same decoder with every weight trainable."""
    return inner.requires_grad_(True)


def holds_weights(folder: str | Path) -> bool:
    """Whether a folder is what `save_weights` wrote."""
    folder = Path(folder)
    return (folder / LINEAGE).is_file() and (folder / "config.json").is_file() and bool(weights_files(folder))


def weights_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint's weights, in order."""
    return sorted(Path(folder).glob("model*.safetensors"))


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a checkpoint's weights, in hex: that of its file, or of the hashes of its files."""
    hashes = [sha256(file) for file in weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


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


def load_weights(inner: PreTrainedModel, folder: str | Path) -> None:
    """Replace all weights of a decoder by those that `save_weights` wrote, rounded to its dtype.

    Raises:
        UserError: a file is damaged, or the weights are not those of this decoder.
    """
    own = dict(inner.named_parameters())
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
