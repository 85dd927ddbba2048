"""Build the model of a stage, and choose how it uses memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from l2v.errors import UserError
from l2v.machine.gpus import too_little_memory
from l2v.model.load import device, fingerprint, inner_model, load_model, output_head
from l2v.model.lora import add_lora, describe_adapter, merge_adapters
from l2v.model.memory import LayerShape, activation_bytes, choose_recompute, free_bytes
from l2v.model.packed import PackedDecoder
from l2v.model.quantize import check_base_precision, check_fused, to_fp8, to_nf4
from l2v.recipe import Mntp, Recipe, Simcse, Stage
from l2v.runs.claim import merged_adapters
from l2v.training.engine import deepspeed_config
from l2v.training.memory import (
    bucket_in_backward,
    engine_bytes,
    execution_mode,
    largest_micro,
    not_yet_allocated,
    tail_memory,
)
from l2v.training.ranks import on_every_rank, ranks_here

ESTIMATE = 0.9
"""Share of an estimate of memory that is certainly needed: training is refused only where that does not fit."""


def build(recipe: Recipe, name: str, *, dtype: torch.dtype, seed: int) -> tuple[PackedDecoder, dict[str, Any]]:
    """Returns the decoder of a stage (base, earlier adapters merged in order, fresh LoRA) and its lineage."""
    stage, base = recipe.stages[name], recipe.base
    check_base_precision(base, device(), dtype)
    model = load_model(
        base, head=isinstance(stage, Mntp), dtype=dtype, seed=recipe.seed,
        trust_remote_code=base.trust_remote_code,  # true only by the command line: load_recipe refuses it in a file
    )  # fmt: skip
    merged = merged_adapters(recipe, name)
    inner = merge_adapters(inner_model(model), [adapter for adapter, _ in merged])
    head = output_head(model) if isinstance(stage, Mntp) else None
    if base.base_precision == "nf4":
        to_nf4(inner, device(), dtype)
    decoder = add_lora(inner, stage.lora, base_name=base.model, seed=seed)
    lineage = {
        "base": {"model": base.model, "revision": base.revision, "sha256": fingerprint(base)},
        "merged": [describe_adapter(adapter, **facts) for adapter, facts in merged],
        "stage": name,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if base.base_precision != "same":
        lineage["base_precision"] = base.base_precision
    packed = PackedDecoder(
        decoder,
        head=head,
        causal=base.attention == "causal",
        backend=base.backend,
        pooling=base.pooling,
        attention_dropout=stage.attention_dropout if isinstance(stage, Simcse) else 0.0,
        layers=base.layers,
    )
    check_fused(base, packed)
    return packed, lineage


def check_weights(model: PackedDecoder, recipe: Recipe, name: str) -> None:
    """Before the weights move to a GPU: whether they fit. A collective call on GPUs, and nothing on a CPU.

    Raises:
        UserError: they do not, on any rank.
    """
    where = device()
    waiting = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_cuda)
    shards = dist.get_world_size() if recipe.zero.stage == 3 else 1
    _refuse(where, f"stage '{name}': the base's weights", waiting / shards, free_bytes(where), recipe)


def _refuse(where: torch.device, what: str, needs: float, free: int, recipe: Recipe, shorter: bool = False) -> None:
    """Raises UserError on all ranks if something does not fit on a GPU of any."""
    zero, precision = recipe.zero.stage, recipe.base.base_precision

    def check() -> None:
        if said := too_little_memory(what, needs, free, zero=zero, precision=precision, shorter=shorter):
            raise UserError(said)

    if where.type == "cuda":
        on_every_rank(check)


def place_memory(model: PackedDecoder, recipe: Recipe, stage: Stage, dtype: torch.dtype, longest: int) -> str | None:
    """Stack or quantise the frozen weights and choose what the backward recomputes; call it once weights are on the device.

    longest: tokens of the longest example.
    Returns a line for the log. The choice does not change the result by a single bit, so each rank may choose differently.

    Raises:
        UserError: not even one example fits on a GPU.
    """
    if model.fused is None:
        model.set_recompute("none" if stage.recompute == "auto" else stage.recompute)
        return None
    if recipe.base.base_precision == "fp8":
        to_fp8(model.fused, model.decoder)
    elif recipe.zero.stage < 3:
        model.fused.stack_weights()
    where = device()
    shape = LayerShape.of(
        model.fused.inner.config, rank=stage.lora.r, targets=tuple(stage.lora.targets), itemsize=dtype.itemsize
    )
    world, kernels = dist.get_world_size(), where.type == "cuda"
    sizes = [p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters() if p.requires_grad]
    config = deepspeed_config(stage, recipe.zero, dtype, sum(sizes))
    engine = engine_bytes(sum(sizes), config, dtype.itemsize, world, max(sizes), gpu=kernels)
    free = free_bytes(where, max(1, ranks_here())) - not_yet_allocated(engine, recipe.zero.stage)
    tokens, mode = largest_micro(stage, world, longest), execution_mode(stage, fused=True, kernels=kernels)
    vocabulary = model.fused.inner.config.get_text_config().vocab_size
    bucket = bucket_in_backward(engine, recipe.zero.stage)
    end = tail_memory(stage, shape, vocabulary, tokens, world, kernels=kernels, bucket=bucket)
    chosen = stage.recompute
    smallest = tail_memory(stage, shape, vocabulary, longest, world, kernels=kernels, bucket=bucket)
    least = activation_bytes(shape, "layer" if chosen == "auto" else chosen, longest, mode, smallest)
    _refuse(where, f"one example of {longest:,} tokens and its gradients", ESTIMATE * least, free, recipe, shorter=True)
    if chosen == "auto":
        chosen = choose_recompute(shape, tokens, free, mode, end)
    model.set_recompute(chosen)
    needs = activation_bytes(shape, chosen, tokens, mode, end)
    return (
        f"fused layers, recompute {chosen}: {tokens:,} tokens need up to {needs / 2**30:.1f} GiB of "
        f"{free / 2**30:.1f} GiB free"
    )
