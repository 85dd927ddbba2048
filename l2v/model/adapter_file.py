"""PEFT adapter folders: where they are, what their configuration asks for, and their tensors, read and checked.

A stage without LoRA leaves a folder with all weights in an adapter's place (`l2v.model.full`); what identifies it is here too.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file

from l2v.errors import UserError, first_line
from l2v.model.hub import is_repository_name, why_missing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
PREFIX = "base_model.model."
"""What PEFT writes before the name of a module."""

KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "OFT", "TRAINABLE_TOKENS")
"""What is merged: PEFT puts it into the weights exactly, and a test compares the vectors (tests/model/test_adapters.py)."""

PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Starts of LoRA that leave the base's weights alone."""

OTHER_STARTS = ("pissa", "olora")
"""Starts that PEFT computes from the base's weights, and takes out of them, whenever it loads the adapter."""

UNMERGED = {
    "alora_invocation_tokens": "is an activated LoRA, which applies only behind certain tokens",
    "arrow_config": "is an Arrow router, which chooses between adapters for each token",
    "use_qalora": "is a QALoRA adapter, which needs the quantised base that it was trained on",
    "kasa_config": "is a KaSA adapter, which changes the base's weights when it starts",
    "velora_config": "is a VeLoRA adapter",
    "monteclora_config": "is a MonteCLoRA adapter, which samples weights",
    "use_bdlora": "has block-diagonal matrices (use_bdlora)",
    "layer_replication": "repeats layers of the base (layer_replication)",
    "megatron_config": "belongs to Megatron's layers (megatron_config)",
    "target_parameters": "is on bare parameters (target_parameters)",
}
"""Keys of a LoRA configuration that are refused where they are set."""

WITH_PEFT = "merge it with PEFT, if PEFT can, and use the result as base"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it was written.

    name: as the user gave it. tensors: float32, by the names in the file.
    """

    name: str
    config: Any
    tensors: dict[str, torch.Tensor]

    @property
    def changes_base(self) -> bool:
        """Whether PEFT changes the base's weights as soon as the adapter is attached."""
        return getattr(self.config, "init_lora_weights", None) in OTHER_STARTS

    @property
    def alone(self) -> bool:
        """Whether it must be merged before the next is attached: it is more than matrices on single layers."""
        config = self.config
        return (
            config.peft_type != PeftType.LORA
            or self.changes_base
            or config.bias != "none"
            or bool(config.modules_to_save)
            or bool(config.trainable_token_indices)
        )


def holds_weights(folder: str | Path) -> bool:
    """Whether a folder holds all weights of a stage without LoRA (`l2v.model.full.save_weights`)."""
    folder = Path(folder)
    return (folder / LINEAGE).is_file() and (folder / "config.json").is_file() and bool(weights_files(folder))


def weights_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint's weights, in order."""
    return sorted(Path(folder).glob("model*.safetensors"))


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a checkpoint's weights, in hex: that of its file, or of the hashes of its files."""
    hashes = [sha256(file) for file in weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def adapter_folder(adapter: str) -> str:
    """A local folder as it is, or the downloaded folder of a hub name.

    Raises:
        UserError: it is neither, or the folder holds no adapter.
    """
    if Path(adapter).is_dir():
        if not (Path(adapter) / CONFIG).is_file():
            raise UserError(f"{adapter}: no {CONFIG} in that folder; give the folder of a PEFT adapter")
        return adapter
    why = why_missing(adapter, CONFIG) if is_repository_name(adapter) else "no such folder"
    if why:
        raise UserError(f"the adapter '{adapter}' is neither a folder nor on the hub: {why}")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(adapter, allow_patterns=[CONFIG, WEIGHTS])
    except Exception as error:
        raise UserError(f"the adapter '{adapter}' is neither a folder nor on the hub: {first_line(error)}") from None


def describe_adapter(adapter: str, **facts: Any) -> dict[str, Any]:
    """A lineage entry: which adapter, or which stage without LoRA, with the hash of its weights.

    Raises:
        UserError: it cannot be found, or has no weights.
    """
    if holds_weights(adapter):
        return {"adapter": adapter, "sha256": weights_sha256(adapter), **facts}
    return {"adapter": adapter, "sha256": sha256(_weights(adapter, adapter_folder(adapter))), **facts}


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(folder: str) -> dict[str, Any]:
    """An adapter's configuration as it stands in its file.

    Raises:
        UserError: the file is no JSON mapping.
    """
    file = Path(folder) / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable adapter configuration: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a readable adapter configuration: it holds no mapping of keys")
    return found


def read_adapter(adapter: str) -> AdapterFile:
    """Read an adapter's configuration and tensors.

    Raises:
        UserError: it cannot be found or read, is of a kind that is not merged, or its tensors are missing, empty, NaN or Inf.
    """
    folder = adapter_folder(adapter)
    config = _read_config(folder, adapter)
    weights = _weights(adapter, folder)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{adapter}: {WEIGHTS} is damaged: {first_line(error)}") from None
    tensors = _checked(tensors, adapter)
    _check_ranks(config, tensors, adapter)
    return AdapterFile(adapter, config, tensors)


def _weights(adapter: str, folder: str) -> Path:
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise UserError(f"{adapter}: no {WEIGHTS} in that folder; l2v does not load pickled adapters")
    return file


def _read_config(folder: str, adapter: str) -> Any:
    found = read_json(folder)
    kind = found.get("peft_type")
    if kind not in KINDS:
        kinds = ", ".join(KINDS)
        what = "names no peft_type" if kind is None else f"is of the kind {kind!r} (peft_type)"
        raise UserError(f"{adapter}: its {CONFIG} {what}, and l2v merges {kinds}; {WITH_PEFT}")
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])} | {"runtime_config"}
    strange = sorted(key for key, value in found.items() if key not in known and value not in (None, False, [], {}, ""))
    if strange:
        from peft import __version__

        raise UserError(
            f"{adapter}: its {CONFIG} sets {', '.join(strange)}, which PEFT {__version__} does not know and would ignore; "
            "install the version of PEFT that wrote it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # whatever a configuration's own checks raise
        raise UserError(f"{adapter}: its {CONFIG} is not readable for PEFT: {first_line(error)}") from None
    _check_types(config, adapter)
    config.inference_mode = True
    config.task_type = None  # a task wraps the model in methods that a decoder without its head does not have
    if kind == "LORA":
        _check_lora(config, adapter)
    return config


def _check_types(config: Any, adapter: str) -> None:
    """Raise for keys of another kind than PEFT writes; PEFT itself reads them without a check."""

    def is_list(value: Any, of: type) -> bool:
        return isinstance(value, list) and all(isinstance(item, of) and not isinstance(item, bool) for item in value)

    def is_dict(value: Any) -> bool:
        return isinstance(value, dict)

    def are_tokens(value: Any) -> bool:
        return is_list(value, int) or (is_dict(value) and all(is_list(ids, int) for ids in value.values()))

    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "rank_pattern": (is_dict, "a mapping"),
        "alpha_pattern": (is_dict, "a mapping"),
        "modules_to_save": (lambda value: is_list(value, str), "a list of names"),
        "trainable_token_indices": (are_tokens, "a list of token ids"),
        "token_indices": (are_tokens, "a list of token ids"),
        "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    }
    for key, (fits, kind) in kinds.items():
        value = getattr(config, key, None)
        if value is not None and not fits(value):
            raise UserError(f"{adapter}: the {key} in its {CONFIG} is not {kind}: {first_line(ValueError(value))[:80]}")


def _check_lora(config: Any, adapter: str) -> None:
    """Raise for a form of LoRA that is not merged, or for numbers that are none."""
    for key, what in UNMERGED.items():
        if getattr(config, key, None):
            raise UserError(f"{adapter}: it {what}, and l2v does not merge that; {WITH_PEFT}")
    start = config.init_lora_weights
    if start not in (*PLAIN_STARTS, *OTHER_STARTS):
        raise UserError(
            f"{adapter}: it starts from init_lora_weights '{start}', which changes the base's weights in a way that the adapter "
            "alone does not say; convert it to plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    if start in PLAIN_STARTS:
        config.init_lora_weights = True  # all leave the base alone, and the tensors are in the file
    alphas = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
    if not all(isinstance(alpha, int | float) and abs(alpha) < float("inf") for alpha in alphas):
        raise UserError(f"{adapter}: its {CONFIG} has a lora_alpha that is no number: {alphas}")


def _check_ranks(config: Any, tensors: dict[str, torch.Tensor], adapter: str) -> None:
    """Raise for a rank that no tensor can have: PEFT would fill memory with matrices of that size first."""
    ranks = [getattr(config, key) for key in ("r", "init_r") if getattr(config, key, None) is not None]
    patterns = getattr(config, "rank_pattern", None) or {}
    if config.peft_type != PeftType.ADALORA:  # whose pattern lists which ranks are left
        ranks += patterns.values() if isinstance(patterns, dict) else [patterns]
    widest = max(max(tensor.shape, default=1) for tensor in tensors.values())
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not (rank >= 1 or config.peft_type == PeftType.OFT):
            raise UserError(f"{adapter}: its {CONFIG} has a rank that is no whole number from 1: {rank!r}")
        if rank > widest:
            raise UserError(
                f"{adapter}: its {CONFIG} asks for a rank of {rank}, and no tensor has a side of more than {widest}"
            )


def _checked(tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
    """The tensors in float32.

    Raises:
        UserError: there are none, or some are empty, no floating point numbers, NaN or Inf.
    """
    if not tensors:
        raise UserError(f"{adapter}: {WEIGHTS} holds no tensors; save the adapter again (under ZeRO-3 gather it first)")

    def refuse(bad: list[str], what: str) -> None:
        if bad:
            raise UserError(f"{adapter}: {len(bad)} of its {len(tensors)} tensors {what}, for example {bad[0]}")

    refuse(
        [name for name, tensor in tensors.items() if not tensor.numel()],
        "are empty (size 0), as ZeRO-3 leaves them where they were saved without being gathered",
    )
    refuse([name for name, tensor in tensors.items() if not tensor.is_floating_point()], "are not floating point")
    out = {name: tensor.float() for name, tensor in tensors.items()}
    refuse([name for name, tensor in out.items() if not tensor.isfinite().all()], "hold NaN or Inf")
    return out
