"""Memory of one GPU in a stage, by what it is for, and the largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2v.model.fused import Recompute
from l2v.model.memory import (
    SLACK,
    ExecutionMode,
    LayerShape,
    activation_bytes,
    choose_recompute,
    kept_for_backward,
    work_bytes,
)
from l2v.plan.gpus import CONTEXT, Gpu
from l2v.recipe import Mntp, Recipe, Stage
from l2v.training.engine import deepspeed_config
from l2v.training.memory import LIVE, bucket_in_backward, engine_bytes, execution_mode, tail_memory

STEP = 256
"""Micro-batches are looked for in multiples of so many tokens."""
MOST = 1 << 22
HOW: tuple[Recompute, ...] = ("none", "cheap", "layer")


@dataclass(frozen=True)
class Model:
    """What a stage trains: sizes of a layer and of the rest, how its layers run, and in which precision."""

    shape: LayerShape
    vocabulary: int
    tied: bool
    fused: bool
    unfused_reason: str | None
    base_precision: str

    @property
    def linear_parameters(self) -> int:
        """N: weights of the linear layers that each token goes through."""
        return self.shape.linear_parameters * self.shape.layers

    @property
    def trainable(self) -> int:
        """Weights of all adapters."""
        return self.shape.lora_parameters * self.shape.layers


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. standing: there all the time. moving: those of the largest micro-batch, and `recompute` is how."""

    tokens: int
    recompute: Recompute
    standing: dict[str, int]
    moving: dict[str, int]
    capacity: int
    largest: dict[Recompute, int] = field(default_factory=dict)
    """The largest micro-batch that fits, for each way to recompute."""

    @property
    def total(self) -> int:
        """At the peak of a step, with what the allocator may waste."""
        return sum(self.standing.values()) + sum(self.moving.values())

    @property
    def tensors(self) -> int:
        """What tensors hold at the peak: the `peak_memory_gib` of a run's log."""
        return self.total - self.standing["CUDA and NCCL"] - self.moving["allocator"]

    @property
    def fits(self) -> bool:
        """Whether the largest micro-batch does."""
        return self.total <= self.capacity


def weights(model: Model, stage: Stage, itemsize: int, world: int, sharded: bool) -> dict[str, int]:
    """Frozen weights: those of layers in the base's own precision, embeddings and head as they are."""
    shape = model.shape
    # FP8 keeps two copies, one for either direction of products; NF4 half a byte, and its scales in 8 bits for 64 weights.
    each = {"same": itemsize, "fp8": 2, "nf4": 0.5 + 1 / 64}[model.base_precision]
    norms = shape.layers * 2 * shape.hidden + shape.hidden
    embedding = model.vocabulary * shape.hidden * itemsize
    found = {"frozen layers": int(model.linear_parameters * each) + norms * itemsize, "embeddings": embedding}
    if isinstance(stage, Mntp) and not model.tied:
        found["head"] = embedding
    if not sharded:
        return found
    whole = sum(found.values())
    unit = max(shape.linear_parameters * itemsize, embedding)
    return {name: bytes_ // world for name, bytes_ in found.items()} | {
        "gathered weights": min(whole, LIVE * itemsize + unit)
    }


def memory_of(
    recipe: Recipe, stage: Stage, model: Model, gpu: Gpu, *, itemsize: int, dtype, world: int, tokens: int, length: float
) -> Memory:  # fmt: skip
    """tokens: of the largest micro-batch. length: mean tokens of a text."""
    config = deepspeed_config(stage, recipe.zero, dtype, model.trainable)
    zero = config["zero_optimization"]["stage"]
    shape, kernels = model.shape, not gpu.cpu
    largest = shape.rank * max((max(shape.inputs[x], shape.outputs[x]) for x in shape.adapted), default=0)
    standing = weights(model, stage, itemsize, world, zero == 3)
    engine = engine_bytes(model.trainable, config, itemsize, world, largest, gpu=kernels)
    bucket = bucket_in_backward(engine, zero)
    standing |= {name: bytes_ for name, bytes_ in engine.items() if not (bucket and name == "gradient bucket")}
    standing |= {"CUDA and NCCL": CONTEXT if kernels else 0}
    free = gpu.capacity(world) - sum(standing.values())
    mode = execution_mode(stage, fused=model.fused, kernels=kernels)
    mode = ExecutionMode(mode.fused, mode.kernels, mode.dropout, mode.attention_dropout, int(length))

    def end(count: int):
        return tail_memory(stage, shape, model.vocabulary, count, world, kernels=kernels, bucket=bucket)

    asked = stage.recompute
    if asked == "auto":
        # Plain layers are not looked at when a run starts: they keep everything unless they are told otherwise.
        asked = choose_recompute(shape, tokens, free, mode, end(tokens)) if model.fused else "none"
    elif asked == "cheap" and not model.fused:
        asked = "none"
    moving = _moving(shape, asked, tokens, mode, end(tokens))
    found = {how: _largest(shape, how, free, mode, end) for how in HOW if model.fused or how != "cheap"}
    return Memory(tokens, asked, standing, moving, gpu.capacity(world), found)


def _moving(shape: LayerShape, how: Recompute, tokens: int, mode: ExecutionMode, end) -> dict[str, int]:
    kept = tokens * shape.layers * sum(kept_for_backward(shape, how, mode).values())
    total = activation_bytes(shape, how, tokens, mode, end)
    inner = tokens * work_bytes(shape, how, mode)
    if inner + end.backward >= end.kept + end.work:
        peak = {"a layer's backward": inner, "gradient bucket": end.backward}
    else:
        peak = {"the end of the forward": end.kept + end.work}
    return {"kept for the backward": kept} | peak | {"allocator": int(total * (1 / (1 - SLACK) - 1))}


def _largest(shape: LayerShape, how: Recompute, free: int, mode: ExecutionMode, end) -> int:
    """By bisection, in multiples of STEP; 0 if not even one fits."""

    def fits(count: int) -> bool:
        return activation_bytes(shape, how, count * STEP, mode, end(count * STEP)) <= (1 - SLACK) * free

    low, high = 0, MOST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * STEP
