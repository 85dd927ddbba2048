"""Counter-based (Philox) LoRA dropout, keyed by text, layer and position: the mask depends on nothing else."""

from __future__ import annotations

import re

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from l2v.recipe import LLAMA_LINEARS
from l2v_kernels import dropout

MODULES_PER_LAYER = 64


class DropoutKeys:
    """The dropout keys of the tokens in the current forward: segment seeds and rows, int64 [T]."""

    def __init__(self) -> None:
        self.seeds_T: torch.Tensor | None = None
        self.rows_T: torch.Tensor | None = None


class KeyedDropout(nn.Module):
    """Replaces nn.Dropout inside a PEFT LoRA layer. x: [..., T, E] with one batch row, as packed batches have."""

    def __init__(self, p: float, stream: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.stream, self.keys = p, stream, keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if self.keys.seeds_T is None or self.keys.rows_T is None:
            raise RuntimeError(
                "LoRA dropout needs the seeds and rows of the batch: call the model through PackedDecoder"
            )
        flat = x.reshape(-1, x.shape[-1])
        return dropout(flat, self.p, self.keys.seeds_T, self.keys.rows_T, self.stream).view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream}"


def install_keyed_dropout(model: nn.Module) -> DropoutKeys:
    """Replace the dropout of every LoRA layer; returns the keys that `PackedDecoder` sets before each forward."""
    keys = DropoutKeys()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            stream = _stream(name)
            for adapter, old in module.lora_dropout.items():
                module.lora_dropout[adapter] = KeyedDropout(getattr(old, "p", 0.0), stream, keys)
    return keys


def _stream(name: str) -> int:
    """Layer and module as one number, derived from the module's name, so that it is the same in every process and run."""
    numbers = re.findall(r"\.(\d+)\.", name)
    layer = int(numbers[0]) if numbers else 0
    leaf = name.rsplit(".", 1)[-1]
    if leaf in LLAMA_LINEARS:
        module = LLAMA_LINEARS.index(leaf)
    else:  # linear layers of other architectures: a stable number after the known ones
        module = len(LLAMA_LINEARS) + sum(leaf.encode()) % (MODULES_PER_LAYER - len(LLAMA_LINEARS))
    return layer * MODULES_PER_LAYER + module
