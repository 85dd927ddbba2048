"""Memory on one rank, in bytes: what DeepSpeed holds besides the model, and what the end of a stage's forward needs.

Taken from the source of DeepSpeed 0.19 and checked against its engine (tests/test_plan_memory.py), in bf16 and fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from l2v.model.memory import ExecutionMode, LayerShape, TailMemory, contrastive_tail, mntp_tail, weight_gradients
from l2v.recipe import Contrastive, Mntp, Simcse, Stage, Supervised

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: gathered weights that it does not release at once."""


def engine_bytes(
    trainable: int, config: Mapping[str, Any], itemsize: int, world: int, largest: int = 0, *, gpu: bool = True
) -> dict[str, int]:
    """Bytes by purpose, including what is trained, during the backward of any micro-batch but the first.

    trainable: number of trained weights, of adapters or all; largest: weights of the largest tensor. config: from
    `deepspeed_config`. Tensors allocated after the backward are not counted: see `update_bytes`.
    """
    zero = config["zero_optimization"]
    stage, bucket = zero["stage"], int(zero.get("reduce_bucket_size", trainable))
    if not gpu:  # host memory is only used once it is written to
        bucket = min(bucket, trainable)
    share = math.ceil(trainable / world) if stage else trainable
    wide = itemsize < 4 or stage > 0  # fp32 without ZeRO updates the weights in place
    found = {
        "trained weights": itemsize * (share if stage == 3 else trainable),
        "fp32 weights": 4 * share if wide else 0,
        "Adam's moments": 8 * share,
        "gradients": itemsize * (share if stage >= 2 else trainable),
    }
    if stage == 3:
        found["gradient bucket"] = 4 * bucket  # in the communication dtype, allocated at the start
    elif stage:
        found["gradient bucket"] = itemsize * bucket
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        found |= {"fp32 weights": 0, "Adam's moments": 0, "one gradient on its way": itemsize * largest}
        if stage == 3:
            found["gradients"] = 0
    return found


def update_bytes(trainable: int, config: Mapping[str, Any], itemsize: int, world: int) -> int:
    """Temporary bytes of the optimizer's update: the gradients in fp32, and Adam's intermediate values.

    For adapters they are less than the activations, which are gone by then. trainable, config: as for `engine_bytes`.
    """
    zero = config["zero_optimization"]
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        return 0
    if not zero["stage"]:  # the gradients in the model's dtype give way to those in fp32
        return (8 - itemsize if itemsize < 4 else 4) * trainable
    return 8 * math.ceil(trainable / world)


def bucket_in_backward(found: Mapping[str, int], stage: int) -> int:
    """Bytes of the gradient bucket if it exists only in the backward, else 0; ZeRO-3 holds it all the time."""
    return found.get("gradient bucket", 0) if stage < 3 else 0


def not_yet_allocated(found: Mapping[str, int], stage: int) -> int:
    """The part of `engine_bytes` that the engine allocates in its first step and then keeps."""
    late = {0: ("gradients",), 3: ("Adam's moments",)}.get(stage, ("gradients", "Adam's moments"))
    return sum(found[name] for name in late)


def layer_shape(config: Any, stage: Stage, itemsize: int) -> LayerShape:
    """The layers of a stage and what of them it trains, from a transformers configuration of the Llama family.

    Raises:
        AttributeError: the configuration lacks a size.
    """
    if stage.lora is None:
        return LayerShape.of(config, rank=0, targets=(), itemsize=itemsize, trained=True)
    return LayerShape.of(config, rank=stage.lora.largest_rank, targets=stage.lora.linears, itemsize=itemsize)


def execution_mode(stage: Stage, *, fused: bool, kernels: bool) -> ExecutionMode:
    """How a stage's layers run, for the memory estimate."""
    dropped = isinstance(stage, Simcse) and stage.attention_dropout > 0
    noisy = stage.lora is not None and stage.lora.dropout > 0
    return ExecutionMode(fused, kernels, noisy, dropped, stage.length)


def tail_memory(
    stage: Stage, shape: LayerShape, vocabulary: int, tokens: int, world: int, *, kernels: bool = True, fused: bool = True,
    bucket: int = 0, tied: bool = False,
) -> TailMemory:  # fmt: skip
    """Memory at the end of a forward of `tokens` tokens.

    bucket: bytes of the gradient bucket, in the backward. tied: whether an MNTP head is trained with the embedding.
    """
    backward = bucket + weight_gradients(shape)
    if isinstance(stage, Mntp):
        # The number of labels is random: take more than one standard deviation above the mean.
        labels = math.ceil(tokens * stage.mask_probability + 4 * math.sqrt(tokens))
        found = mntp_tail(shape, tokens, min(labels, tokens), vocabulary, kernels=kernels, fused=fused, tied=tied)
        return replace(found, backward=found.backward + backward)
    assert isinstance(stage, Contrastive)
    columns, prefixes = columns_of(stage), len(stage.matryoshka or [0])
    local = math.ceil(stage.batch / world)
    if stage.group is None or world == 1:
        own = stage.group or local
        found = contrastive_tail(
            shape,
            tokens,
            rows=own * columns,
            candidates=own * (columns - 1),
            queries=own,
            ranks=world,
            prefixes=prefixes,
        )
        return replace(found, backward=backward)
    # A part of every group is embedded here, at most a share of the batch; its rows are gathered, and one group is compared.
    group = contrastive_tail(
        shape,
        tokens,
        rows=local * columns,
        candidates=stage.group * (columns - 1),
        queries=stage.group,
        prefixes=prefixes,
    )
    gathered = 2 * stage.batch * columns * shape.hidden * 4  # rows of all ranks and their gradient
    return replace(group, work=group.work + gathered, backward=backward)


def columns_of(stage: Stage) -> int:
    """Texts of an example with all its negatives; `max_negatives: auto` counts as none until the data has settled it."""
    if not isinstance(stage, Contrastive):
        return 1
    return 2 + (stage.max_negatives if isinstance(stage, Supervised) and stage.max_negatives != "auto" else 0)
