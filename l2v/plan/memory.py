"""Memory of one GPU in a stage, by purpose, and the largest micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from l2v.model.fused import Recompute
from l2v.model.memory import (
    SLACK,
    ExecutionMode,
    LayerShape,
    TailMemory,
    activation_bytes,
    choose_recompute,
    peak_parts,
)
from l2v.plan.gpus import CONTEXT_BYTES, Gpu
from l2v.recipe import Mntp, Recipe, Stage
from l2v.training.engine import deepspeed_config
from l2v.training.memory import (
    MAX_LIVE_PARAMETERS,
    bucket_in_backward,
    engine_bytes,
    execution_mode,
    tail_memory,
    update_bytes,
)

MICRO_TOKENS_STEP = 256
"""The search for the largest micro-batch uses multiples of this many tokens."""
MAX_MICRO_TOKENS = 1 << 22
RECOMPUTES: tuple[Recompute, ...] = ("none", "cheap", "layer")
MARGIN_SHARE, MARGIN_BYTES = 0.03, 1 << 30
"""A stage fits if this share of the memory, and at least so many bytes, stay free: NCCL's buffers, a display, other processes."""


@dataclass(frozen=True)
class Model:
    """The model that a stage trains: its sizes, how its layers run, and the precision of its frozen weights."""

    shape: LayerShape
    vocabulary: int
    tied: bool
    fused: bool
    unfused_reason: str | None
    base_precision: str

    @property
    def linear_parameters(self) -> int:
        """N: weights of the linear layers that each token passes through."""
        return self.shape.linear_parameters * self.shape.layers

    @property
    def trained_all(self) -> bool:
        """Whether all weights are trained, without LoRA."""
        return self.shape.trained

    @property
    def trainable(self) -> int:
        """Weights of all adapters; without LoRA those of the decoder, embedding included."""
        if not self.trained_all:
            return self.shape.lora_parameters * self.shape.layers
        ends = self.vocabulary * self.shape.hidden + self.shape.hidden
        return self.linear_parameters + self.shape.layers * self.shape.norm_parameters + ends

    @property
    def flops_of_weight(self) -> int:
        """FLOPs for each token that count as useful work (see `l2v.training.throughput`)."""
        return 6 if self.trained_all else 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. standing: allocated all the time. moving: needed by the largest micro-batch, with `recompute`."""

    tokens: int
    recompute: Recompute
    standing: dict[str, int]
    moving: dict[str, int]
    capacity: int
    margin: int = 0
    """Bytes that have to stay free for the stage to fit."""
    largest: dict[Recompute, int] = field(default_factory=dict)
    """The largest micro-batch that fits, for each kind of recompute."""

    @property
    def total(self) -> int:
        """Bytes at the peak of a step, including what the allocator may waste."""
        return sum(self.standing.values()) + sum(self.moving.values())

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the peak: `peak_memory_gib` in a run's metrics."""
        return self.total - self.standing["CUDA and NCCL"] - self.moving["allocator"]

    @property
    def fits(self) -> bool:
        """Whether the stage's micro-batch fits, with the margin."""
        return self.total + self.margin <= self.capacity


def weights(model: Model, stage: Stage, itemsize: int, world: int, sharded: bool) -> dict[str, int]:
    """Bytes of frozen weights: layers in base.base_precision, embeddings and head in the model's dtype.

    Trained ones are among `engine_bytes`; with ZeRO-3 they are gathered like the frozen ones.
    """
    shape = model.shape
    # FP8 keeps two copies, one for the forward and one for the backward; NF4 half a byte per weight and an 8-bit scale per 64.
    each = {"same": itemsize, "fp8": 2, "nf4": 0.5 + 1 / 64}[model.base_precision]
    norms = shape.layers * 2 * shape.hidden + shape.hidden
    embedding = model.vocabulary * shape.hidden * itemsize
    found = {"frozen layers": int(model.linear_parameters * each) + norms * itemsize, "embeddings": embedding}
    if model.trained_all:
        found = {}
    if isinstance(stage, Mntp) and not model.tied:
        found["head"] = embedding
    if not sharded:
        return found
    whole = sum(found.values()) + (itemsize * model.trainable if model.trained_all else 0)
    unit = max(shape.linear_parameters * itemsize, embedding)
    return {name: bytes_ // world for name, bytes_ in found.items()} | {
        "gathered weights": min(whole, MAX_LIVE_PARAMETERS * itemsize + unit)
    }


def memory_of(
    recipe: Recipe, stage: Stage, model: Model, gpu: Gpu, *, itemsize: int, dtype, world: int, tokens: int, length: float
) -> Memory:  # fmt: skip
    """The memory of a stage on one GPU. tokens: of the largest micro-batch. length: mean tokens per text."""
    config = deepspeed_config(stage, recipe.zero, dtype, model.trainable)
    zero = config["zero_optimization"]["stage"]
    shape, kernels = model.shape, not gpu.cpu
    largest = shape.rank * max((max(shape.inputs[x], shape.outputs[x]) for x in shape.adapted), default=0)
    if model.trained_all:
        largest = shape.hidden * max(model.vocabulary, shape.ffn, shape.queries)
    standing = weights(model, stage, itemsize, world, zero == 3)
    engine = engine_bytes(model.trainable, config, itemsize, world, largest, gpu=kernels)
    bucket = bucket_in_backward(engine, zero)
    standing |= {name: bytes_ for name, bytes_ in engine.items() if not (bucket and name == "gradient bucket")}
    standing |= {"CUDA and NCCL": CONTEXT_BYTES if kernels else 0}
    margin = margin_of(gpu.capacity(world))
    free = gpu.capacity(world) - margin - sum(standing.values())
    tied = isinstance(stage, Mntp) and model.tied and model.trained_all
    mode = execution_mode(stage, fused=model.fused, kernels=kernels)
    mode = ExecutionMode(mode.fused, mode.kernels, mode.dropout, mode.attention_dropout, int(length))

    def end(count: int):
        return tail_memory(
            stage, shape, model.vocabulary, count, world, kernels=kernels, fused=model.fused, bucket=bucket, tied=tied
        )

    recompute = stage.recompute
    if recompute == "auto":
        # Training chooses for fused layers only; plain layers keep everything unless the recipe says layer.
        recompute = choose_recompute(shape, tokens, free, mode, end(tokens)) if model.fused else "none"
    elif recompute == "cheap" and not model.fused:
        recompute = "none"
    moving = _moving(shape, recompute, tokens, mode, end(tokens))
    update = update_bytes(model.trainable, config, itemsize, world)
    if update > sum(moving.values()):  # as it is where all weights are trained and micro-batches are small
        moving = {"the update": update, "allocator": 0}
    found = largest_micro_batches(shape, free, mode, end, fused=model.fused)
    return Memory(tokens, recompute, standing, moving, gpu.capacity(world), margin, found)


def margin_of(capacity: int) -> int:
    """Bytes of a device that a plan leaves free."""
    return max(int(MARGIN_SHARE * capacity), MARGIN_BYTES)


def _moving(shape: LayerShape, how: Recompute, tokens: int, mode: ExecutionMode, end) -> dict[str, int]:
    parts = peak_parts(shape, how, tokens, mode, end)
    return parts | {"allocator": int(sum(parts.values()) * (1 / (1 - SLACK) - 1))}


def largest_micro_batches(
    shape: LayerShape, free: int, mode: ExecutionMode, end: Callable[[int], TailMemory], *, fused: bool = True
) -> dict[Recompute, int]:
    """For each kind of recompute, from the least, tokens of the largest micro-batch that fits `free` bytes; 0 if none does."""
    return {how: _largest(shape, how, free, mode, end) for how in RECOMPUTES if fused or how != "cheap"}


def _largest(shape: LayerShape, how: Recompute, free: int, mode: ExecutionMode, end) -> int:
    """The largest micro-batch that fits, by bisection in multiples of MICRO_TOKENS_STEP; 0 if none fits."""

    def fits(count: int) -> bool:
        tokens = count * MICRO_TOKENS_STEP
        return activation_bytes(shape, how, tokens, mode, end(tokens)) <= (1 - SLACK) * free

    low, high = 0, MAX_MICRO_TOKENS // MICRO_TOKENS_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * MICRO_TOKENS_STEP
