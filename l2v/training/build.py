"""Build the model of a stage, and choose how it uses memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from l2v.batch import Segment, pack
from l2v.data.balance import Cost
from l2v.data.sampler import Sampler
from l2v.data.tokens import load_tokenizer, token_ids
from l2v.errors import UserError
from l2v.machine.gpus import too_little_memory
from l2v.model.embedded import resolve
from l2v.model.full import train_all, weights_without_gradient
from l2v.model.load import device, fingerprint, inner_model, load_model, output_head, proof_of
from l2v.model.lora import add_lora, describe_adapter, merge_adapters
from l2v.model.memory import TailMemory, activation_bytes, choose_recompute, free_bytes
from l2v.model.packed import PackedDecoder
from l2v.model.quantize import check_base_precision, check_fused, to_fp8, to_nf4
from l2v.model.vocabulary import grow_embedding, rows_of
from l2v.recipe import Base, Mntp, Recipe, Simcse, Stage
from l2v.runs.claim import merged_adapters
from l2v.training.advice import Advise, Question
from l2v.training.engine import deepspeed_config
from l2v.training.launcher import ranks_here
from l2v.training.memory import (
    bucket_in_backward,
    engine_bytes,
    execution_mode,
    layer_shape,
    not_yet_allocated,
    tail_memory,
)
from l2v.training.ranks import on_every_rank, on_first_rank

ESTIMATE = 0.9
"""Share of an estimate of memory that is certainly needed: training is refused only where that does not fit."""


def build(recipe: Recipe, name: str, *, dtype: torch.dtype, seed: int) -> tuple[PackedDecoder, dict[str, Any]]:
    """Returns the decoder of a stage (base, earlier stages merged in order, fresh LoRA or all weights trained) and its lineage.

    Raises:
        UserError: the base, or what is merged into it, cannot be used.
    """
    stage, base = recipe.stages[name], recipe.base
    check_base_precision(base, device(), dtype)
    model = load_model(
        base, head=isinstance(stage, Mntp), dtype=dtype, seed=recipe.seed,
        trust_remote_code=base.trust_remote_code,  # true only by the command line: load_recipe refuses it in a file
    )  # fmt: skip
    if proof_of(inner_model(model)).random is not None:
        raise UserError(
            f"the base '{base.model}' cannot be trained: a layer of it draws random numbers in training (mixture of experts, "
            "perhaps), which differ between a forward and its recomputation; encoding works"
        )
    merged = merged_adapters(recipe, name)
    whole = model if isinstance(stage, Mntp) else None
    inner = merge_adapters(inner_model(model), [adapter for adapter, _ in merged], whole=whole)
    tokens = _new_rows(whole or inner, recipe, stage)
    head = output_head(model) if isinstance(stage, Mntp) else None
    if base.base_precision == "nf4":
        to_nf4(inner, device(), dtype)
    decoder = (
        train_all(inner)
        if stage.lora is None
        else add_lora(inner, stage.lora, base_name=base.model, seed=seed, token_ids=tokens)
    )
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
    if stage.lora is None:
        _check_all_used(packed, stage, base)
    return packed, lineage


def _check_all_used(model: PackedDecoder, stage: Stage, base: Base) -> None:
    """Check that every trained weight gets a gradient from every text: ranks and micro-batches exchange them one for one.

    Raises:
        UserError: a weight gets none from a short text, as the experts of a mixture that it was not sent to, or the weights of
            a picture's encoder.
    """
    if base.backend == "flash_attention_2":  # it has no forward on a CPU, where the weights still are
        return
    batch = pack([Segment(np.arange(4), text_key=0)])
    unused = weights_without_gradient(model, model(batch, "vectors"))
    if unused:
        raise UserError(
            f"the base '{base.model}' cannot be trained with lora: null: {len(unused)} of its weights get no gradient from a "
            f"text, for example {unused[0]}; train it with lora"
        )


def _new_rows(model: PreTrainedModel, recipe: Recipe, stage: Stage) -> list[int]:
    """The ids of the tokens whose vectors the stage trains; those that the base does not have get a row first."""
    tokens, base = stage.lora.trainable_tokens if stage.lora else [], recipe.base
    if not tokens:
        return []
    tokenizer = load_tokenizer(
        base.tokenizer or resolve(base.model), revision=base.revision, trust_remote_code=base.trust_remote_code
    )
    rows, ids = rows_of(model), set(token_ids(tokenizer, tokens))
    if max(ids) >= rows:
        grow_embedding(model, max(ids) + 1)
        ids |= set(range(rows, max(ids)))  # a padding token in between: rows of an adapter have no gaps
    return sorted(ids)


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


@dataclass(frozen=True)
class Placed:
    """How a stage uses memory and ranks. micro_tokens, cost: for the sampler. lines: to log."""

    micro_tokens: int
    cost: Cost | None
    lines: list[str]


def place_memory(
    model: PackedDecoder, recipe: Recipe, name: str, stage: Stage, dtype: torch.dtype, examples: Any, *, micro_tokens: int,
    may_choose: bool, advise: Advise,
) -> Placed:  # fmt: skip
    """Stack or quantise the frozen weights, and choose what the backward recomputes and how large micro-batches are. Collective.

    Call it once weights are on the device. micro_tokens: the most that a forward may have. may_choose: whether fewer may be
    chosen. advise: predicts what is fastest; called on the first rank. The choice of `recompute` does not change the result by
    a single bit, so each rank may choose differently; that of `micro_tokens` changes the order of sums.

    Raises:
        UserError: not even one example fits on a GPU.
    """
    if model.fused is not None:
        if recipe.base.base_precision == "fp8":
            to_fp8(model.fused, model.decoder)
        elif (
            recipe.zero.stage < 3 and stage.lora is not None
        ):  # weights that are trained lie where the engine keeps them
            model.fused.stack_weights()
    config = model.fused.inner.config if model.fused else model.decoder.config
    where, world = device(), dist.get_world_size()
    free, end = _room(model, recipe, stage, dtype, config)
    least = torch.tensor(free, device=where)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    mode = execution_mode(stage, fused=model.fused is not None, kernels=where.type == "cuda")
    question = Question(
        recipe, name, stage, examples, config, dtype, world, max(1, ranks_here()), micro_tokens,
        may_choose and model.fused is not None, int(least), mode, end,
    )  # fmt: skip
    advice = on_first_rank(lambda: advise(question))
    sampler = Sampler(
        examples, batch=stage.batch, micro_tokens=advice.micro_tokens, seed=recipe.stage_seed(name), world=world,
        group=getattr(stage, "group", None), cost=advice.cost,
    )  # fmt: skip
    if model.fused is None:
        model.set_recompute("none" if stage.recompute == "auto" else stage.recompute)
        return Placed(advice.micro_tokens, advice.cost, advice.lines)
    tokens = sampler.largest_micro_batch(stage.steps)
    shape = layer_shape(config, stage, dtype.itemsize)
    chosen = stage.recompute
    longest = int(examples.lengths.max())
    smallest = activation_bytes(shape, "layer" if chosen == "auto" else chosen, longest, mode, end(longest))
    what = f"one example of {longest:,} tokens and its gradients"
    _refuse(where, what, ESTIMATE * smallest, free, recipe, shorter=True)
    if chosen == "auto":
        chosen = advice.recompute or choose_recompute(shape, tokens, free, mode, end(tokens))
    model.set_recompute(chosen)
    needs = activation_bytes(shape, chosen, tokens, mode, end(tokens))
    line = (
        f"fused layers, recompute {chosen}: {tokens:,} tokens need up to {needs / 2**30:.1f} GiB of "
        f"{free / 2**30:.1f} GiB free"
    )
    reserve(where, needs)
    return Placed(advice.micro_tokens, advice.cost, [line, *advice.lines])


def reserve(where: torch.device, needs: float) -> None:
    """Let CUDA's allocator take the memory of a step's activations as one block, from which it then gives every tensor.

    Without it each tensor of the first step gets a block of its own size, which a slightly longer micro-batch cannot use: the
    allocator takes as much again, up to the end of the device's memory. Where segments can grow there are no such blocks.
    """
    if where.type == "cuda" and not _segments_grow():
        with contextlib.suppress(torch.OutOfMemoryError):  # then it has to do with what there is, block by block
            torch.empty(int(needs), dtype=torch.uint8, device=where)


def _segments_grow() -> bool:
    """Whether CUDA's allocator has expandable segments; torch reads both variables, the first is the newer name."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return "expandable_segments:True" in settings.replace(" ", "")


def _room(
    model: PackedDecoder, recipe: Recipe, stage: Stage, dtype: torch.dtype, config: Any
) -> tuple[int, Callable[[int], TailMemory]]:
    """Bytes for activations on this rank, and the memory at the end of a forward by its tokens."""
    where, world = device(), dist.get_world_size()
    kernels = where.type == "cuda"
    sizes = [p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters() if p.requires_grad]
    zero = deepspeed_config(stage, recipe.zero, dtype, sum(sizes))
    engine = engine_bytes(sum(sizes), zero, dtype.itemsize, world, max(sizes), gpu=kernels)
    free = free_bytes(where, max(1, ranks_here())) - not_yet_allocated(engine, recipe.zero.stage)
    bucket = bucket_in_backward(engine, recipe.zero.stage)
    tied = model.head is not None and any(p.requires_grad for p in model.head.parameters())

    def end(tokens: int) -> TailMemory:
        vocabulary = config.get_text_config().vocab_size
        shape = layer_shape(config, stage, dtype.itemsize)
        return tail_memory(
            stage, shape, vocabulary, tokens, world, kernels=kernels, fused=model.fused is not None, bucket=bucket,
            tied=tied,
        )  # fmt: skip

    return free, end
