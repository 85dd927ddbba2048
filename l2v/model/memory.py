"""What a decoder layer keeps for its backward, by tensor, and which `recompute` fits the memory that is free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from l2v.model.fused import Recompute


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer, and of LoRA on it."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    head_norms: bool = False
    """Qwen3's norms of queries and keys."""
    rank: int = 16
    targets: tuple[str, ...] = ()
    itemsize: int = 2

    @classmethod
    def of(cls, config: Any, *, rank: int, targets: tuple[str, ...], itemsize: int) -> LayerShape:
        """From a transformers configuration of the Llama family."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
            head_norms=config.model_type == "qwen3",
            rank=rank,
            targets=tuple(targets),
            itemsize=itemsize,
        )

    @property
    def inputs(self) -> dict[str, int]:
        """Width of the input of each linear."""
        attended = self.heads * self.head_dim
        wide = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), self.hidden)
        return wide | {"o_proj": attended, "down_proj": self.ffn}

    @property
    def outputs(self) -> dict[str, int]:
        """Width of the output of each linear."""
        attended, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        narrow = {"q_proj": attended, "k_proj": keys, "v_proj": keys, "o_proj": self.hidden, "down_proj": self.hidden}
        return narrow | {"gate_proj": self.ffn, "up_proj": self.ffn}

    @property
    def linear_parameters(self) -> int:
        """Weights of one layer's linears."""
        return sum(self.inputs[name] * self.outputs[name] for name in self.inputs)


def kept_for_backward(shape: LayerShape, recompute: Recompute, *, masks: bool = False) -> dict[str, int]:
    """Bytes a token that one fused layer keeps, by tensor.

    masks: LoRA dropout keeps its masks, 1 byte an input, as the path without Triton does. Attention's logarithm of the
    denominator is fp32; the CPU's attention also keeps copies in another layout, which are not counted.
    """
    b, E, F = shape.itemsize, shape.hidden, shape.ffn
    if recompute == "layer":
        return {"layer input": E * b}
    adapted = [name for name in shape.targets if name in shape.inputs]
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = {
        "residual sums": 2 * E * b,
        "norm statistics": 2 * 4,
        "q, k, v": (q + 2 * kv) * b,
        "attention output": q * b,
        "attention statistics": shape.heads * 4,
        "gate and up": 2 * F * b,
        "LoRA, x A": len(adapted) * shape.rank * b,
    }
    if shape.head_norms:
        kept["rotated q, k"] = (q + kv) * b
        kept["head norm statistics"] = (shape.heads + shape.kv_heads) * 4
    if recompute == "none":
        kept |= {"norm outputs": 2 * E * b, "SwiGLU product": F * b}
    if masks:
        kept["LoRA, masks"] = sum(shape.inputs[name] for name in adapted)
    return kept


def activation_bytes(shape: LayerShape, recompute: Recompute, tokens: int, *, masks: bool = False) -> int:
    """Bytes that all layers keep for the backward of `tokens` tokens, and the most that one layer needs beside at work."""
    kept = sum(kept_for_backward(shape, recompute, masks=masks).values()) * shape.layers
    return tokens * (kept + transient_bytes(shape, recompute, masks=masks))


def transient_bytes(shape: LayerShape, recompute: Recompute, *, masks: bool = False) -> int:
    """Bytes a token at the widest point of a layer's backward: the MLP's product, its gradient, gate's and up's, and the
    residual's; with recompute: layer also what the layer keeps while it runs again."""
    b = shape.itemsize
    work = (4 * shape.ffn + 3 * shape.hidden) * b
    if recompute == "layer":
        work += sum(kept_for_backward(shape, "cheap", masks=masks).values())
    return work


def choose_recompute(shape: LayerShape, tokens: int, free: int, *, masks: bool = False) -> Recompute:
    """The least recomputing that fits `free` bytes with a twentieth to spare; `layer` where nothing does."""
    for how in ("none", "cheap"):
        if activation_bytes(shape, how, tokens, masks=masks) <= 0.95 * free:
            return how
    return "layer"


def free_bytes(device: torch.device, ranks_here: int = 1) -> int:
    """Memory that a process may still take: of the GPU, or its share of what the machine has left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return math.floor(psutil.virtual_memory().available / ranks_here)
