"""LoRA of a stage: create it, and save it with its lineage. `l2v.model.merge` puts adapters into the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from l2v.errors import RecipeError, first_line
from l2v.files import follow_umask
from l2v.model.adapter_file import LINEAGE, WEIGHTS, adapter_folder, describe_adapter, sha256
from l2v.model.load import quiet_transformers
from l2v.model.merge import merge_adapters
from l2v.recipe import Lora

__all__ = [
    "LINEAGE", "WEIGHTS", "adapter_folder", "add_lora", "describe_adapter", "merge_adapters", "save_adapter", "sha256",
    "trainable",
]  # fmt: skip


def add_lora(inner: PreTrainedModel, lora: Lora, *, base_name: str, seed: int) -> PeftModel:
    """Add a new, trainable LoRA to the inner decoder, in the base's dtype (the optimizer keeps fp32 weights).

    Raises:
        RecipeError: lora.targets match no module.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type=None,
    )
    try:
        with quiet_transformers():
            model = get_peft_model(inner, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RecipeError(f"lora.targets {lora.targets}: {first_line(error)}") from None
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters, by the names that PEFT writes to disk."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_adapter(model: PeftModel, tensors: dict[str, torch.Tensor], folder: Path, lineage: dict[str, Any]) -> None:
    """Write a PEFT adapter folder (fp32 safetensors, PEFT's key names) with its lineage."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    follow_umask(folder / WEIGHTS)
    config = model.peft_config["default"]
    was, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = was
    lineage = lineage | {"adapter": {"sha256": sha256(folder / WEIGHTS)}}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
