"""Memory on one rank, in bytes: what DeepSpeed holds besides the model, and what the end of a stage's forward needs.

Taken from the source of DeepSpeed 0.19 and checked against its engine (tests/test_plan_memory.py), in bf16 and fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from l2v.model.memory import ExecutionMode, LayerShape, TailMemory, contrastive_tail, mntp_tail
from l2v.recipe import Contrastive, Mntp, Simcse, Stage, Supervised

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: gathered weights that it does not release at once."""


def engine_bytes(
    trainable: int, config: Mapping[str, Any], itemsize: int, world: int, largest: int = 0, *, gpu: bool = True
) -> dict[str, int]:
    """Bytes by purpose, including the adapters, during the backward of any micro-batch but the first.

    trainable: number of adapter weights; largest: weights of the largest adapter tensor. config: from `deepspeed_config`.
    Tensors allocated after the backward (casts for communication, Adam's intermediate values) are not counted: they need
    less than the activations that were freed by then.
    """
    zero = config["zero_optimization"]
    stage, bucket = zero["stage"], int(zero.get("reduce_bucket_size", trainable))
    if not gpu:  # host memory is only used once it is written to
        bucket = min(bucket, trainable)
    share = math.ceil(trainable / world) if stage else trainable
    wide = itemsize < 4 or stage > 0  # fp32 without ZeRO updates the weights in place
    found = {
        "adapters": itemsize * (share if stage == 3 else trainable),
        "fp32 adapters": 4 * share if wide else 0,
        "Adam's moments": 8 * share,
        "gradients": itemsize * (share if stage >= 2 else trainable),
    }
    if stage == 3:
        found["gradient bucket"] = 4 * bucket  # in the communication dtype, allocated at the start
    elif stage:
        found["gradient bucket"] = itemsize * bucket
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        found |= {"fp32 adapters": 0, "Adam's moments": 0, "one gradient on its way": itemsize * largest}
        if stage == 3:
            found["gradients"] = 0
    return found


def bucket_in_backward(found: Mapping[str, int], stage: int) -> int:
    """Bytes of the gradient bucket if it exists only in the backward, else 0; ZeRO-3 holds it all the time."""
    return found.get("gradient bucket", 0) if stage < 3 else 0


def not_yet_allocated(found: Mapping[str, int], stage: int) -> int:
    """The part of `engine_bytes` that the engine allocates in its first step and then keeps."""
    late = {0: ("gradients",), 3: ("Adam's moments",)}.get(stage, ("gradients", "Adam's moments"))
    return sum(found[name] for name in late)


def largest_micro(stage: Stage, world: int, longest: int) -> int:
    """Tokens of the largest micro-batch: `micro_tokens`, or everything that a rank has in one step if that is less.

    longest: tokens of the longest example, all its texts.
    """
    if isinstance(stage, Contrastive) and stage.group is not None:
        examples = stage.group
    else:  # ranks get equal tokens: at most one example more than with equal numbers of examples
        examples = stage.batch if world == 1 else math.ceil(stage.batch / world) + 1
    return min(stage.micro_tokens, examples * longest)


def execution_mode(stage: Stage, *, fused: bool, kernels: bool) -> ExecutionMode:
    """How a stage's layers run, for the memory estimate."""
    dropped = isinstance(stage, Simcse) and stage.attention_dropout > 0
    return ExecutionMode(fused, kernels, stage.lora.dropout > 0, dropped, stage.length)


def tail_memory(
    stage: Stage, shape: LayerShape, vocabulary: int, tokens: int, world: int, *, kernels: bool = True, bucket: int = 0
) -> TailMemory:
    """Memory at the end of a forward of `tokens` tokens. bucket: bytes of the gradient bucket, in the backward."""
    if isinstance(stage, Mntp):
        # The number of labels is random: take more than one standard deviation above the mean.
        labels = math.ceil(tokens * stage.mask_probability + 4 * math.sqrt(tokens))
        return replace(mntp_tail(shape, tokens, min(labels, tokens), vocabulary, kernels=kernels), backward=bucket)
    assert isinstance(stage, Contrastive)
    columns = columns_of(stage)
    local = stage.group if stage.group is not None else math.ceil(stage.batch / world)
    everyone = 1 if stage.negatives == "micro" else world
    found = contrastive_tail(
        shape, tokens, rows=local * columns, candidates=local * (columns - 1), queries=local, ranks=everyone,
        prefixes=len(stage.matryoshka or [0]),
    )  # fmt: skip
    return replace(found, backward=bucket)


def columns_of(stage: Stage) -> int:
    """Texts of an example with all its negatives; `max_negatives: auto` counts as none until the data has settled it."""
    if not isinstance(stage, Contrastive):
        return 1
    return 2 + (stage.max_negatives if isinstance(stage, Supervised) and stage.max_negatives != "auto" else 0)
