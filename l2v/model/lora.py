"""LoRA adapters: create, save with lineage, load published LLM2Vec adapters, and merge in float32."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from l2v.errors import RecipeError, UserError, first_line
from l2v.files import follow_umask
from l2v.model.hub import is_repository_name, why_missing
from l2v.model.settings import quiet_transformers
from l2v.recipe import Lora

WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"


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


def merge_adapters(inner: PreTrainedModel, adapters: list[str]) -> PreTrainedModel:
    """Add the adapters to the weights: all deltas are summed in float32 and rounded to the weight's dtype once.

    Merging one after another in bf16 would round each time (about 9% of the weights then depend on the order).

    Raises:
        UserError: an adapter cannot be found or read, does not fit the base, or uses DoRA.
    """
    if not adapters:
        return inner
    dtypes = {name: parameter.dtype for name, parameter in inner.named_parameters()}
    model: PeftModel | None = None
    for index, adapter in enumerate(adapters):
        folder = adapter_folder(adapter)
        config = _read_config(folder)
        if config.use_dora:
            raise UserError(f"{adapter}: DoRA adapters cannot be summed; merge it with PEFT and use the result as base")
        _check_keys(folder, adapter, inner)
        try:
            with quiet_transformers():
                if model is None:
                    model = PeftModel.from_pretrained(inner, folder, adapter_name="a0", autocast_adapter_dtype=True)
                else:
                    model.load_adapter(folder, adapter_name=f"a{index}", autocast_adapter_dtype=True)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{adapter}: does not fit this base: {first_line(error)}") from None
    assert model is not None
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                total = weight.float()
                for name in module.lora_A:
                    total = total + module.get_delta_weight(name).float()
                weight.copy_(total)
    merged = model.unload()
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])
    return merged


def adapter_folder(adapter: str) -> str:
    """A local folder as it is, or the downloaded folder of a hub name.

    Raises:
        UserError: it is neither, or the folder holds no adapter.
    """
    if Path(adapter).is_dir():
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: no adapter_config.json in that folder; give the folder of a PEFT adapter")
        return adapter
    why = why_missing(adapter, "adapter_config.json") if is_repository_name(adapter) else "no such folder"
    if why:
        raise UserError(f"the adapter '{adapter}' is neither a folder nor on the hub: {why}")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(adapter, allow_patterns=["adapter_config.json", WEIGHTS])
    except Exception as error:
        raise UserError(f"the adapter '{adapter}' is neither a folder nor on the hub: {first_line(error)}") from None


def describe_adapter(adapter: str, **facts: Any) -> dict[str, Any]:
    """A lineage entry: which adapter, with the hash of its weights."""
    return {"adapter": adapter, "sha256": sha256(Path(adapter_folder(adapter)) / WEIGHTS), **facts}


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_config(folder: str) -> LoraConfig:
    try:
        config = LoraConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: adapter_config.json is not a readable LoRA configuration: {first_line(error)}"
        ) from None
    if not (Path(folder) / WEIGHTS).is_file():
        raise UserError(f"{folder}: no {WEIGHTS} in that folder; l2v does not load pickled adapters")
    return config


def _check_keys(folder: str, adapter: str, inner: PreTrainedModel) -> None:
    """Raise if a key of the adapter matches no module; PEFT would only warn."""
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{adapter}: {WEIGHTS} is damaged: {first_line(error)}") from None
    modules = {name for name, _ in inner.named_modules()}
    strange = [k for k in keys if k.removeprefix("base_model.model.").split(".lora_")[0] not in modules]
    if strange:
        raise UserError(
            f"{adapter}: {len(strange)} of its {len(keys)} tensors belong to no module of this base, for example {strange[0]}"
        )
