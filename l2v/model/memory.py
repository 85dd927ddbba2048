"""Memory of a training step, by tensor, and the choice of `recompute` that fits free memory.

It counts what layers keep for their backward, their temporary memory, and that of the end of the forward. All of it is
arithmetic on shapes. tests/test_plan_memory.py checks it against saved-tensor hooks (exactly, for what a layer keeps) and
against whole steps on fake tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from l2v.model.fused import Recompute
from l2v_kernels.linear_cross_entropy.op import rows_per_chunk

SLACK = 0.05  # share of free memory reserved for the allocator, which rounds block sizes up and fragments memory
LOGITS = {True: 768 << 20, False: 128 << 20}
"""Workspace of `linear_cross_entropy`, with Triton and without."""
SCORES = 512 << 20
"""Workspace of `info_nce`."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer and its LoRA."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    head_norms: bool = False
    """Whether queries and keys are normalised per head, as in Qwen3 and Gemma 3."""
    norms_after: bool = False
    """Whether what attention and the MLP return is normalised too, as in Gemma 2 and 3."""
    rank: int = 16
    targets: tuple[str, ...] = ()
    itemsize: int = 2
    trained: bool = False
    """Whether the layer's own weights are trained, instead of LoRA."""

    @classmethod
    def of(
        cls, config: Any, *, rank: int, targets: tuple[str, ...], itemsize: int, trained: bool = False
    ) -> LayerShape:
        """From a transformers configuration of the Llama or Gemma family."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
            head_norms=config.model_type in ("qwen3", "gemma3_text"),
            norms_after=config.model_type in ("gemma2", "gemma3_text"),
            rank=rank,
            targets=tuple(targets),
            itemsize=itemsize,
            trained=trained,
        )

    @property
    def inputs(self) -> dict[str, int]:
        """Width of the input of each linear."""
        wide = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), self.hidden)
        return wide | {"o_proj": self.queries, "down_proj": self.ffn}

    @property
    def outputs(self) -> dict[str, int]:
        """Width of the output of each linear."""
        narrow = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys, "o_proj": self.hidden}
        return narrow | {"down_proj": self.hidden, "gate_proj": self.ffn, "up_proj": self.ffn}

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def adapted(self) -> tuple[str, ...]:
        """Linears with LoRA."""
        return tuple(name for name in self.targets if name in self.inputs)

    @property
    def linear_parameters(self) -> int:
        """Weights of one layer's linears."""
        return sum(self.inputs[name] * self.outputs[name] for name in self.inputs)

    @property
    def norm_parameters(self) -> int:
        """Weights of one layer's norms."""
        return (4 if self.norms_after else 2) * self.hidden + (2 * self.head_dim if self.head_norms else 0)

    @property
    def lora_parameters(self) -> int:
        """Weights of one layer's adapters."""
        return self.rank * sum(self.inputs[name] + self.outputs[name] for name in self.adapted)


@dataclass(frozen=True)
class ExecutionMode:
    """How layers run, as far as memory depends on it: fused or not, with Triton kernels or the PyTorch references on a CPU.

    dropout: LoRA dropout; the references keep its masks. attention_dropout: with it the references keep the attention
    weights, `length` of them (tokens of a segment) for every token and head.
    """

    fused: bool = True
    kernels: bool = True
    dropout: bool = True
    attention_dropout: bool = False
    length: int = 0


FUSED = ExecutionMode()


@dataclass(frozen=True)
class TailMemory:
    """Bytes at the end of a forward.

    kept: for the backward of the loss. work: temporary, while the loss and its backward run. backward: what the engine
    allocates during the backward of the layers. unread: tokens that the last fused layer leaves out after its attention.
    """

    kept: int = 0
    work: int = 0
    backward: int = 0
    unread: int = 0


def kept_for_backward(shape: LayerShape, recompute: Recompute, mode: ExecutionMode = FUSED) -> dict[str, int]:
    """Bytes per token that one layer keeps for its backward, by tensor, without what all layers share (RoPE tables, seeds).

    Plain layers do not support `cheap`: they keep everything, or only their input.
    """
    b, E, F = shape.itemsize, shape.hidden, shape.ffn
    if recompute == "layer":
        return {"layer input": E * b}
    kept = {"residual sums": 2 * E * b} if mode.fused else {"norm inputs, fp32": 2 * E * 4}
    kept |= {"norm statistics": 2 * 4} | _attention(shape, mode)
    if shape.norms_after:
        kept["norm statistics"] *= 2
        kept |= {"block outputs": 2 * E * b} if mode.fused else {"block outputs, fp32": 2 * E * 4}
    kept |= {"gate and up": 2 * F * b} if mode.fused else {"gate, SiLU, up": 3 * F * b}
    if shape.adapted:
        kept["LoRA, x A"] = len(shape.adapted) * shape.rank * b
    if mode.fused and recompute == "none":
        kept |= {"norm outputs": 2 * E * b, "SwiGLU product": F * b}
    inputs = sum(shape.inputs[name] for name in shape.adapted)
    if not mode.fused:
        kept["LoRA, inputs"] = inputs * b  # one copy per adapter, after its dropout
    if mode.dropout and not mode.kernels and inputs:
        kept["LoRA, masks"] = inputs
    if shape.trained and not mode.fused:  # outputs of both norms, before and after their weights, and SwiGLU's output
        heads = shape.queries + shape.keys if shape.head_norms else 0
        kept["inputs of trained weights"] = (4 * E + F + heads) * b
    return kept


def _attention(shape: LayerShape, mode: ExecutionMode) -> dict[str, int]:
    b, q, kv = shape.itemsize, shape.queries, shape.keys
    kept = {"q, k, v": (q + 2 * kv) * b, "attention output": q * b, "attention statistics": shape.heads * 4}
    if shape.head_norms:
        kept["rotated q, k" if mode.fused else "head norm inputs, fp32"] = (q + kv) * (b if mode.fused else 4)
        kept["head norm statistics"] = (shape.heads + shape.kv_heads) * 4
    if mode.kernels:
        return kept
    # The output in token order is kept by the linear layer that reads it, if that layer keeps its input unchanged.
    output = q * b if mode.fused else 0
    if mode.attention_dropout:  # in batched matmuls: the weights before dropout in fp32, and the mask
        del kept["attention statistics"]
        return kept | {"attention output": output, "attention weights": shape.heads * mode.length * (4 + 1)}
    # PyTorch's flash kernel runs in fp32, whatever the dtype.
    return kept | {"q, k, v": (q + 2 * kv) * 4, "attention output": q * 4 + output}


def unread_bytes(shape: LayerShape, recompute: Recompute, mode: ExecutionMode = FUSED) -> int:
    """Bytes that the last layer does not keep for a token which nobody reads: what follows attention."""
    if recompute == "layer" or not mode.fused:
        return 0
    b, E, F = shape.itemsize, shape.hidden, shape.ffn
    after = [name for name in shape.adapted if name not in ("q_proj", "k_proj", "v_proj")]
    found = (E + 2 * F + 2 * E * shape.norms_after) * b + len(after) * shape.rank * b
    if recompute == "none":
        found += (E + F) * b
    if mode.dropout and not mode.kernels:
        found += sum(shape.inputs[name] for name in after)
    return found


def work_bytes(shape: LayerShape, recompute: Recompute, mode: ExecutionMode = FUSED) -> int:
    """Temporary bytes per token at the peak of one layer's backward, in addition to what all layers keep.

    The peak is in the MLP: the gradients of SwiGLU's output, of gate and up, and of the layer's output; with recompute:
    layer also what the layer keeps while it runs again.
    """
    b, E, F = shape.itemsize, shape.hidden, shape.ffn
    work = (3 * F + E + E * shape.norms_after) * b
    if mode.fused and not mode.kernels:
        # LoRA's dropout has two buffers besides SwiGLU's output and its gradient. In half precision the references recompute that
        # output in fp32, in two buffers, with LoRA's part already added; the gradient of gate and up does not exist yet.
        summed = not {"gate_proj", "up_proj"}.isdisjoint(shape.adapted)
        work += F * b if b >= 4 else 2 * F * 4 + (2 * F * 4 if summed else 0) - 2 * F * b
    elif not mode.fused:  # here the peak may be in an fp32 norm instead
        work = max(work, 5 * E * 4 + E * b)
    if recompute == "layer":
        work += sum(kept_for_backward(shape, "cheap", mode).values()) - (E * b if mode.fused else 0)
    return work


def weight_gradients(shape: LayerShape) -> int:
    """Bytes of the largest weight gradient of a layer that exists before the engine takes it: that of gate and up, in one."""
    return 2 * shape.ffn * shape.hidden * shape.itemsize if shape.trained else 0


def mntp_tail(
    shape: LayerShape, tokens: int, labels: int, vocabulary: int, *, kernels: bool = True, fused: bool = True,
    tied: bool = False,
) -> TailMemory:  # fmt: skip
    """Memory of MNTP's loss: the last residual sum and its norm, the labelled rows and their gradient, and a chunk of logits.

    tied: whether the head is trained with the embedding: its gradient exists until that of the embedding joins it, and its
    chunks are summed in fp32.
    """
    b, E = shape.itemsize, shape.hidden
    apart = b if b < 4 else 0
    rows = rows_per_chunk(max(labels, 1), vocabulary * (4 + apart), LOGITS[kernels])
    chunk = rows * vocabulary * (4 + apart)
    head = vocabulary * E * b if tied else 0
    if tied and labels > rows:
        chunk += vocabulary * E * (4 + b)
    if fused:  # the last layer computes the labelled rows alone, from copies of them
        copies = labels * (shape.queries + E) * b
        return TailMemory(labels * E * b + copies + head, 2 * labels * E * b + chunk, head, tokens - labels)
    return TailMemory(tokens * E * b + head, tokens * E * b + 2 * labels * E * b + chunk, head)


def contrastive_tail(
    shape: LayerShape, tokens: int, *, rows: int, candidates: int, queries: int, ranks: int = 1, prefixes: int = 1
) -> TailMemory:
    """Memory of the contrastive loss: the last residual sum, the fp32 embeddings of a unit's `rows` texts and their
    gradient, and the loss.

    candidates, queries: of this rank's unit. ranks: ranks whose candidates are gathered (1 with `negatives: micro`).
    """
    b, E = shape.itemsize, shape.hidden
    everyone = candidates * ranks
    cache = 2 * rows * E * 4
    scores = min(SCORES, queries * everyone * (4 + 4) * prefixes)
    # Rows copied out of the cache, the rows of other ranks, and the gradients of all of them, which need a copy to be summed.
    sides = (queries + candidates + (everyone if ranks > 1 else 0)) * E * 4
    loss = sides + 2 * (queries + everyone) * E * 4 + scores
    return TailMemory(kept=tokens * E * b, work=cache + loss)


def activation_bytes(
    shape: LayerShape, recompute: Recompute, tokens: int, mode: ExecutionMode = FUSED, end: TailMemory | None = None
) -> int:
    """Peak bytes of forward and backward of `tokens` tokens, without weights and optimizer."""
    return sum(peak_parts(shape, recompute, tokens, mode, end).values())


def peak_parts(
    shape: LayerShape, recompute: Recompute, tokens: int, mode: ExecutionMode = FUSED, end: TailMemory | None = None
) -> dict[str, int]:
    """The parts of `activation_bytes`, by what they are for.

    The peak is at the end of the forward; or in the backward of the last layer, when all others still keep everything; or, if
    the last layer computes fewer tokens, in that of the layer before.
    """
    end = end or TailMemory(kept=tokens * shape.hidden * shape.itemsize)
    layer, work = sum(kept_for_backward(shape, recompute, mode).values()), work_bytes(shape, recompute, mode)
    left_out = unread_bytes(shape, recompute, mode) * end.unread
    before, last = tokens * (shape.layers - 1) * layer, tokens * layer - left_out
    own = (tokens - end.unread if left_out else tokens) * work
    moments = [
        {"kept for the backward": before + last, "the end of the forward": end.kept + end.work},
        {"kept for the backward": before + last, "a layer's backward": own, "gradient bucket": end.backward},
    ]
    if left_out and shape.layers > 1:
        earlier = {
            "kept for the backward": before,
            "a layer's backward": tokens * work,
            "gradient bucket": end.backward,
        }
        moments.append(earlier)
    return max(moments, key=lambda parts: sum(parts.values()))


def choose_recompute(
    shape: LayerShape, tokens: int, free: int, mode: ExecutionMode = FUSED, end: TailMemory | None = None
) -> Recompute:
    """The least recomputation that fits in `free` bytes, with `SLACK` to spare; `layer` if nothing fits."""
    for how in ("none", "cheap"):
        if activation_bytes(shape, how, tokens, mode, end) <= (1 - SLACK) * free:
            return how
    return "layer"


def free_bytes(device: torch.device, ranks_here: int = 1) -> int:
    """Bytes that a process may still allocate: on the GPU, or its share of the machine's free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return math.floor(psutil.virtual_memory().available / ranks_here)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a failed allocation, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "allocate memory" in text)
