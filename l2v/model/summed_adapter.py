"""LoRA adapters of several stages as one adapter of the summed rank, which adds exactly what they add together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from l2v.errors import UserError
from l2v.files import follow_umask
from l2v.model.adapter_file import PREFIX, WEIGHTS, AdapterFile, read_adapter
from l2v.model.merge import for_decoder

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes: an adapter of another rank needs the next of them."""

A, B = ".lora_A.weight", ".lora_B.weight"
USE_MERGED = "export it merged, without --adapter-only"


@dataclass(frozen=True)
class SummedAdapter:
    """rank: of every module. tensors: float32, by the names of PEFT for the language model around the decoder."""

    rank: int
    targets: list[str]
    tensors: dict[str, torch.Tensor]

    @property
    def config(self) -> LoraConfig:
        """alpha equals the rank, so that PEFT and vLLM scale by 1."""
        return LoraConfig(
            r=self.rank, lora_alpha=self.rank, lora_dropout=0.0, bias="none", target_modules=self.targets,
            inference_mode=True, task_type=None,
        )  # fmt: skip

    def save(self, folder: Path, base_name: str) -> None:
        """Write it as PEFT does."""
        config = self.config
        config.base_model_name_or_path = base_name
        config.target_modules = sorted(self.targets)
        config.save_pretrained(folder)
        save_file(self.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        follow_umask(folder / WEIGHTS)


def sum_adapters(adapters: Sequence[str], inner: PreTrainedModel) -> SummedAdapter:
    """One adapter that adds to the decoder what `adapters` add one after the other.

    A stage adds scaling * B @ A to a weight; the sum over stages is [s1 B1, s2 B2, ...] @ [A1; A2; ...]. A stage without a
    module, and the rank up to the next of `RANKS`, are rows and columns of zeros.

    Raises:
        UserError: an adapter is more than plain LoRA on linear layers, or does not fit the decoder.
    """
    changes = [_changes(for_decoder(read_adapter(name), inner, None)) for name in adapters]
    modules = list(dict.fromkeys(module for change in changes for module in change))
    total = max(sum(change[module][0].shape[0] for change in changes if module in change) for module in modules)
    rank = next((each for each in RANKS if each >= total), total)
    tensors: dict[str, torch.Tensor] = {}
    before = f"{PREFIX}{inner.base_model_prefix}."
    for module in modules:
        found = [change[module] for change in changes if module in change]
        a_RN, b_MR = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], dim=1)
        missing = rank - len(a_RN)
        tensors[before + module + A] = nn.functional.pad(a_RN, (0, 0, 0, missing)).contiguous()
        tensors[before + module + B] = nn.functional.pad(b_MR, (0, missing)).contiguous()
    return SummedAdapter(rank, _targets(modules, inner), tensors)


def _targets(modules: list[str], inner: PreTrainedModel) -> list[str]:
    """The names of the layers, without their place where every layer of that name is adapted."""
    short = {module.rsplit(".", 1)[-1] for module in modules}
    every = {name for name, _ in inner.named_modules() if name.rsplit(".", 1)[-1] in short}
    return sorted(short) if every == set(modules) else [f"{inner.base_model_prefix}.{module}" for module in modules]


def _changes(found: tuple[AdapterFile, str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and scaled B [out, r] of each module of the decoder."""
    adapter, attribute = found
    _refuse_others(adapter)
    config, before = adapter.config, f"{PREFIX}{attribute}." if attribute else PREFIX
    out = {}
    for key, a_RN in adapter.tensors.items():
        if not key.endswith(A):
            continue
        b_MR = adapter.tensors.get(key.removesuffix(A) + B)
        if b_MR is None or a_RN.ndim != 2 or b_MR.ndim != 2 or b_MR.shape[1] != a_RN.shape[0]:
            raise UserError(f"{adapter.name}: {key} and its lora_B are no matrices of one rank; save the adapter again")
        name = key.removeprefix(PREFIX).removesuffix(A)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        rank = len(a_RN)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        out[key.removeprefix(before).removesuffix(A)] = a_RN, b_MR * scaling
    return out


def _refuse_others(adapter: AdapterFile) -> None:
    """Raise for what is no sum of products of two matrices on linear layers."""
    config = adapter.config
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.peft_type != PeftType.LORA:
        why = f"is of the kind {kind}"
    elif config.use_dora:
        why = "is DoRA, which scales the base's weights too"
    elif adapter.changes_base:
        why = f"starts from {config.init_lora_weights}, which changes the base's weights"
    elif config.trainable_token_indices:
        why = "has trained tokens (trainable_token_indices)"
    elif config.modules_to_save:
        why = f"has trained modules as a whole (modules_to_save: {', '.join(config.modules_to_save)})"
    elif config.bias != "none" or config.lora_bias:
        why = "has trained biases"
    elif strange := [key for key in adapter.tensors if not key.endswith((A, B))]:
        why = f"holds more than LoRA's matrices of linear layers, for example {strange[0]}"
    else:
        return
    raise UserError(
        f"{adapter.name}: it {why}, and cannot be one LoRA adapter with those of other stages; {USE_MERGED}"
    )
