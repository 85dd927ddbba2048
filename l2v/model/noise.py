"""LoRA dropout with an address: what is dropped depends on the text's seed, the module and the place, on nothing else."""

from __future__ import annotations

import re

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from l2v.recipe import LLAMA_LINEARS
from l2v_kernels import dropout

MODULES_PER_LAYER = 64


class NoiseState:
    """The addresses of the tokens that are going through the model now: segment seeds and rows, int64 [T]."""

    def __init__(self) -> None:
        self.seeds_T: torch.Tensor | None = None
        self.rows_T: torch.Tensor | None = None


class AddressedDropout(nn.Module):
    """Takes the place of nn.Dropout inside a PEFT LoRA layer. x: [..., T, E] with one batch row, as packs have."""

    def __init__(self, p: float, stream: int, state: NoiseState) -> None:
        super().__init__()
        self.p, self.stream, self.state = p, stream, state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if self.state.seeds_T is None or self.state.rows_T is None:
            raise RuntimeError("LoRA dropout needs the pack's addresses: call the model through PackedDecoder")
        flat = x.reshape(-1, x.shape[-1])
        return dropout(flat, self.p, self.state.seeds_T, self.state.rows_T, self.stream).view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream}"


def address_dropout(model: nn.Module) -> NoiseState:
    """Replace the dropout of every LoRA layer; returns the state that `PackedDecoder` fills before each forward."""
    state = NoiseState()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            stream = _stream(name)
            for adapter, old in module.lora_dropout.items():
                module.lora_dropout[adapter] = AddressedDropout(getattr(old, "p", 0.0), stream, state)
    return state


def _stream(name: str) -> int:
    """Layer and module as one number, read from the module's name, so that it is the same in every process and run."""
    numbers = re.findall(r"\.(\d+)\.", name)
    layer = int(numbers[0]) if numbers else 0
    leaf = name.rsplit(".", 1)[-1]
    if leaf in LLAMA_LINEARS:
        module = LLAMA_LINEARS.index(leaf)
    else:  # other architectures' linears: a stable place after the known ones
        module = len(LLAMA_LINEARS) + sum(leaf.encode()) % (MODULES_PER_LAYER - len(LLAMA_LINEARS))
    return layer * MODULES_PER_LAYER + module
