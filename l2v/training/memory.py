"""What DeepSpeed holds beside the model, and what stands at the end of a stage's forward, in bytes on one rank.

Read off DeepSpeed 0.19 and measured on its engine (tests/test_plan_memory.py), in bf16 and fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from l2v.model.memory import ExecutionMode, LayerShape, TailMemory, contrastive_tail, mntp_tail
from l2v.recipe import Contrastive, Mntp, Simcse, Stage, Supervised

LIVE = 1_000_000_000
"""Its default `stage3_max_live_parameters`: gathered weights that it does not give back at once."""


def engine_bytes(
    trainable: int, config: Mapping[str, Any], itemsize: int, world: int, largest: int = 0, *, gpu: bool = True
) -> dict[str, int]:
    """Bytes by what they are for, adapters themselves among them, while a micro-batch after the first is in its backward.

    trainable: number of adapter weights; largest: of the largest one. config: as `deepspeed_config` makes it. What is made
    after the backward (casts for communication, Adam's own intermediate values) is less than the activations that are gone
    by then, and does not count.
    """
    zero = config["zero_optimization"]
    stage, bucket = zero["stage"], int(zero.get("reduce_bucket_size", trainable))
    if not gpu:  # a processor's memory is taken when it is written to
        bucket = min(bucket, trainable)
    share = math.ceil(trainable / world) if stage else trainable
    wide = itemsize < 4 or stage > 0  # plain fp32 without ZeRO updates the weights themselves
    found = {
        "adapters": itemsize * (share if stage == 3 else trainable),
        "fp32 adapters": 4 * share if wide else 0,
        "Adam's moments": 8 * share,
        "gradients": itemsize * (share if stage >= 2 else trainable),
    }
    if stage == 3:
        found["gradient bucket"] = 4 * bucket  # in the dtype of communication, from the start
    elif stage:
        found["gradient bucket"] = itemsize * bucket
    if zero.get("offload_optimizer", {}).get("device") == "cpu":
        found |= {"fp32 adapters": 0, "Adam's moments": 0, "one gradient on its way": itemsize * largest}
        if stage == 3:
            found["gradients"] = 0
    return found


def bucket_in_backward(found: Mapping[str, int], stage: int) -> int:
    """The gradient bucket, where it is there in the backward only; ZeRO-3 holds it all the time."""
    return found.get("gradient bucket", 0) if stage < 3 else 0


def not_yet_allocated(found: Mapping[str, int], stage: int) -> int:
    """Of `engine_bytes`, what the engine has not allocated before its first step and then keeps."""
    late = {0: ("gradients",), 3: ("Adam's moments",)}.get(stage, ("gradients", "Adam's moments"))
    return sum(found[name] for name in late)


def largest_micro(stage: Stage, world: int, longest: int) -> int:
    """Tokens of the largest micro-batch: `micro_tokens`, or all that meets on a rank in one step where that is less.

    longest: tokens of the longest example, all its texts.
    """
    if isinstance(stage, Contrastive) and stage.group is not None:
        examples = stage.group
    else:  # shares of equal tokens: at most one example more than of equal numbers
        examples = stage.batch if world == 1 else math.ceil(stage.batch / world) + 1
    return min(stage.micro_tokens, examples * longest)


def execution_mode(stage: Stage, *, fused: bool, kernels: bool) -> ExecutionMode:
    """How a stage's layers run."""
    dropped = isinstance(stage, Simcse) and stage.attention_dropout > 0
    return ExecutionMode(fused, kernels, stage.lora.dropout > 0, dropped, stage.length)


def tail_memory(
    stage: Stage, shape: LayerShape, vocabulary: int, tokens: int, world: int, *, kernels: bool = True, bucket: int = 0
) -> TailMemory:
    """What stands at the end of a forward of `tokens` tokens. bucket: of gradients, in the backward."""
    if isinstance(stage, Mntp):
        # One standard deviation and more above the mean: labels are drawn.
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
    """Segments of a full example."""
    return 2 + (stage.max_negatives if isinstance(stage, Supervised) else 0) if isinstance(stage, Contrastive) else 1
