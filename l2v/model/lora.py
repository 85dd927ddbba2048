"""LoRA of a stage: create it, and save it with its lineage. `l2v.model.merge` puts adapters into the weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from l2v.errors import RecipeError, first_line
from l2v.files import follow_umask
from l2v.model.adapter_file import LINEAGE, WEIGHTS, adapter_folder, describe_adapter, sha256
from l2v.model.merge import merge_adapters
from l2v.model.settings import quiet_transformers
from l2v.model.targets import check_patterns, resolve_targets
from l2v.recipe import Lora

__all__ = [
    "LINEAGE", "WEIGHTS", "adapter_folder", "add_lora", "describe_adapter", "merge_adapters", "save_adapter", "sha256",
    "trainable",
]  # fmt: skip


STARTS: dict[str, Any] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
"""lora.init, and PEFT's init_lora_weights. None changes the base's weights: a stage's adapter alone says what it trained."""


def add_lora(
    inner: PreTrainedModel, lora: Lora, *, base_name: str, seed: int, token_ids: Sequence[int] = ()
) -> PeftModel:
    """Add a new, trainable LoRA to the inner decoder, in the base's dtype (the optimizer keeps fp32 weights).

    token_ids: tokens whose rows of the embedding are trained as well.

    Raises:
        RecipeError: lora.targets or a pattern matches no linear layer.
    """
    targets = resolve_targets(inner, lora)
    check_patterns(inner, lora, targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type=None,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        init_lora_weights=STARTS[lora.init],
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        trainable_token_indices={_embedding_name(inner): sorted(token_ids)} if token_ids else None,
    )
    torch.manual_seed(seed)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # that PEFT reads GPT-2's Conv1D the other way round, as it should
            model = get_peft_model(inner, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RecipeError(f"lora.targets {lora.targets}: {first_line(error)}") from None
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


def _embedding_name(inner: PreTrainedModel) -> str:
    embedding = inner.get_input_embeddings()
    return next(name for name, module in inner.named_modules() if module is embedding)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters, by the names that PEFT writes to disk."""
    return {_saved_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _saved_name(name: str) -> str:
    """Without the adapter's name, and without the module that holds DoRA's magnitudes."""
    name = name.replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


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
