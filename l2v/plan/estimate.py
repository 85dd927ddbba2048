"""The plan of a stage: memory of one GPU, the choice of recompute, and the speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from l2v.data.open import settled
from l2v.errors import RecipeError
from l2v.model.fused import Recompute
from l2v.model.fused.spec import FAMILIES
from l2v.model.memory import LayerShape
from l2v.plan import roofline, wire
from l2v.plan.gpus import Gpu
from l2v.plan.measured import factors
from l2v.plan.memory import Memory, Model, memory_of
from l2v.plan.shapes import LLAMA3_8B, shape_of
from l2v.plan.work import Lengths, Share, lengths_of, shares, steps_per_epoch
from l2v.recipe import LLAMA_LINEARS, Base, Contrastive, Mntp, Recipe, Stage
from l2v.training.engine import deepspeed_config

SEGMENTS = {"mntp": 512, "simcse": 30, "supervised": 140}
"""Mean tokens per text in the workloads of benchmarks/train_step/work.py."""


@dataclass(frozen=True)
class Speed:
    """A predicted speed: seconds of a step by kind of work, and its tokens over all ranks."""

    seconds: dict[str, float]
    step_seconds: float
    step_tokens: float
    micros: int
    factor: float | None = None
    """Measured over predicted speed on this GPU, already applied; None without a measurement."""
    idle: int = 0
    """Ranks without work."""

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.step_tokens / self.step_seconds


@dataclass(frozen=True)
class Scaled:
    """Predicted efficiency on a number of GPUs: tokens per second and GPU, as a share of those of a single GPU.

    grown: the batch grows with the GPUs, and each keeps its share of the plan (weak scaling). fixed: the recipe's batch is
    divided among all GPUs (strong scaling).
    """

    gpus: int
    grown: float
    fixed: float
    grown_batch: int


@dataclass(frozen=True)
class StagePlan:
    """The result of `l2v plan` for a stage."""

    name: str
    stage: Stage
    world: int
    model: Model
    lengths: Lengths
    memory: Memory
    speed: Speed
    others: dict[Recompute, tuple[int, Speed]] = field(default_factory=dict)
    """For each kind of recompute: the largest useful micro-batch that fits, and the speed with it."""
    gemm: float = 0.0
    exchanged: list[wire.Transfer] = field(default_factory=list)
    """Collectives of a step."""
    scaling: list[Scaled] = field(default_factory=list)
    steps_per_epoch: int | None = None
    """None if the data was not read."""

    @property
    def epochs(self) -> float | None:
        """How often the stage sees its data; None if the data was not read."""
        return self.stage.steps / self.steps_per_epoch if self.steps_per_epoch else None

    @property
    def hours(self) -> float:
        return self.speed.step_seconds * self.stage.steps / 3600

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: 4N FLOPs per token, as a share of the rate of large matmuls."""
        return 4 * self.model.linear_parameters * self.speed.tokens_per_second / (self.world * self.gemm)


def model_of(base: Base, config: Any, stage: Stage, itemsize: int) -> Model:
    """The model that a stage trains, from the base's configuration.

    Raises:
        RecipeError: the configuration lacks the sizes of a Llama-like layer.
    """
    try:
        text = config.get_text_config()
        shape = LayerShape.of(config, rank=stage.lora.r, targets=tuple(stage.lora.targets), itemsize=itemsize)
        vocabulary = text.vocab_size
    except AttributeError as error:
        raise RecipeError(
            f"l2v plan supports layers with the sizes of a Llama layer; the configuration of '{base.model}' "
            f"({config.model_type}) lacks one: {error}"
        ) from None
    because = None
    if base.layers == "plain":
        because = "base.layers: plain"
    elif base.base_precision == "nf4":
        because = "base.base_precision: nf4"
    elif base.backend != "l2v":
        because = f"base.backend: {base.backend}"
    elif text.model_type not in FAMILIES.values():
        because = f"the fused layer supports {', '.join(FAMILIES.values())}, and this is {text.model_type}"
    return Model(shape, vocabulary, bool(text.tie_word_embeddings), because is None, because, base.base_precision)


def plan_stage(recipe: Recipe, name: str, gpu: Gpu, dtype: torch.dtype, world: int, per_node: int) -> StagePlan:
    """Plan a stage on `world` GPUs.

    Raises:
        UserError: the base's shape is unknown, or the data or the recipe cannot be used.
    """
    stage = recipe.stages[name]
    config, _ = shape_of(recipe.base)
    model = model_of(recipe.base, config, stage, dtype.itemsize)
    here = gpu.shared(min(world, per_node))
    lengths = lengths_of(recipe, name)
    if lengths.real:
        stage = settled(stage, lengths.segments)
    context = _Context(recipe, stage, model, here, dtype, world, per_node, lengths, recipe.stage_seed(name))
    work = context.shares(stage.micro_tokens)
    memory = memory_of(
        recipe, stage, model, gpu, itemsize=dtype.itemsize, dtype=dtype, world=world,
        tokens=max(share.largest for _, share in work), length=lengths.text,
    )  # fmt: skip
    measured = _factors(gpu, dtype, recipe.base.base_precision)
    factor = measured.get(stage.objective)
    others = {}
    whole = int(lengths.lengths.max()) * (getattr(stage, "group", None) or stage.batch)
    for how, largest in memory.largest.items():
        micro = min(largest, max(whole, stage.micro_tokens))
        if micro >= int(lengths.lengths.max()):
            found = context.shares(micro)
            others[how] = (max(share.largest for _, share in found), context.speed(found, how, factor))
    return StagePlan(
        name, stage, world, model, lengths, memory, context.speed(work, memory.recompute, factor), others,
        here.flops[dtype], context.exchanged(work[0][1], world),
        [] if gpu.cpu or world == 1 else context.scaling(memory.recompute),
        steps_per_epoch(lengths, stage) if lengths.real else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Context:
    """Everything about a plan that does not depend on the micro-batch."""

    recipe: Recipe
    stage: Stage
    model: Model
    gpu: Gpu
    dtype: torch.dtype
    world: int
    per_node: int
    lengths: Lengths
    seed: int

    def shares(self, micro_tokens: int) -> list[tuple[int, Share]]:
        return shares(self.lengths, self.stage, self.world, self.seed, micro_tokens)

    def speed(self, work: list[tuple[int, Share]], how: Recompute, factor: float | None) -> Speed:
        """The mean speed over the planned steps."""
        found = [self.step(share, how, self.world) for _, share in work]
        seconds: dict[str, float] = {}
        for clock in found:
            for kind, value in clock.seconds.items():
                seconds[kind] = seconds.get(kind, 0.0) + value / len(found)
        total = sum(clock.total() for clock in found) / len(found)
        tokens = sum(count for count, _ in work) / len(work)
        micros = max(share.micros for _, share in work)
        idle = min(share.idle for _, share in work)
        return Speed(seconds, total / (factor or 1.0), tokens, micros, factor, idle)

    def exchanged(self, share: Share, world: int) -> list[wire.Transfer]:
        """Collectives of a step."""
        zero = deepspeed_config(self.stage, self.recipe.zero, self.dtype, self.model.trainable)["zero_optimization"]
        return wire.transfers(self.model, self.stage, zero, self.dtype.itemsize, world, share)

    def step(self, share: Share, how: Recompute, world: int) -> roofline.Clock:
        """The time of one step on `world` ranks."""
        stage, model, text = self.stage, self.model, self.lengths.text
        clock = roofline.Clock(self.gpu, self.dtype, model.base_precision == "fp8")
        dropped = stage.lora.dropout > 0
        for at, unit in enumerate(share.units):
            for i, tokens in enumerate(unit):
                roofline.forward(clock, model, tokens, text, dropped=dropped)
                if isinstance(stage, Contrastive) and i < len(unit) - 1:  # the gradient cache encodes these twice
                    roofline.forward(clock, model, tokens, text, dropped=dropped)
                roofline.backward(clock, model, tokens, text, how, dropped=dropped)
                roofline.ends(clock, model, stage, tokens)
            if isinstance(stage, Contrastive):
                roofline.contrastive(clock, model, stage, share.queries[at], share.candidates[at])
        found = self.exchanged(share, world)
        took = wire.all_seconds(found, world, self.per_node, self.gpu)
        roofline.once_a_step(clock, model, self.recipe.zero.stage, world, took, sum(each.times for each in found))
        return clock

    def scaling(self, how: Recompute) -> list[Scaled]:
        """Efficiency on 1 to 1,024 GPUs, and on the number of GPUs of the plan."""
        stage, group = self.stage, getattr(self.stage, "group", None) or 1
        own = max(group, stage.batch // self.world // group * group)
        if isinstance(stage, Contrastive):
            own = max(own, 2)
        tokens, share = self._once(replace(stage, batch=own), 1)
        alone = tokens / self.step(share, how, 1).total()
        whole, everything = self._once(stage, 1)
        at_once = whole / self.step(everything, how, 1).total()
        found = []
        for gpus in sorted({2**i for i in range(11)} | {self.world}):
            # Each GPU has the same work, but with negatives: global each query is compared with the candidates of all.
            shared = isinstance(stage, Contrastive) and stage.negatives == "global"
            grown = replace(share, candidates=[c * gpus for c in share.candidates]) if shared else share
            rate = tokens / self.step(grown, how, gpus).total()
            _, part = self._once(stage, gpus)
            fixed = whole / gpus / self.step(part, how, gpus).total()
            found.append(Scaled(gpus, rate / alone, fixed / at_once, own * gpus))
        return found

    def _once(self, stage: Stage, world: int) -> tuple[int, Share]:
        return shares(self.lengths, stage, world, self.seed, stage.micro_tokens, steps=1)[0]


def _factors(gpu: Gpu, dtype: torch.dtype, base_precision: str) -> Mapping[str, float]:
    """Measured over predicted speed by objective, from measurements of Llama-3-8B in bf16."""
    if gpu.cpu or dtype != torch.bfloat16 or base_precision != "same":
        return {}
    layers = LayerShape(
        hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, layers=32, targets=LLAMA_LINEARS
    )  # fmt: skip
    model = Model(layers, LLAMA3_8B["vocab_size"], False, True, None, "same")

    def predict(row: dict[str, Any]) -> float | None:
        length = SEGMENTS.get(row["objective"])
        if length is None:
            return None
        clock, tokens = roofline.Clock(gpu, dtype), int(row["tokens"])
        roofline.forward(clock, model, tokens, length, dropped=True)
        roofline.backward(clock, model, tokens, length, row["recompute"] or "cheap", dropped=True)
        stage = Mntp(data=[], batch=1, steps=1, lr=1.0)
        roofline.ends(clock, model, stage, tokens if row["objective"] == "mntp" else 0)
        roofline.once_a_step(clock, model, 1, 1, 0.0, 0)
        return tokens / clock.total()

    return factors(gpu.key, predict)
