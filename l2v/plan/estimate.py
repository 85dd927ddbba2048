"""The plan of a stage: memory of one GPU, the choice of recompute, and the speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from l2v.data.open import settled
from l2v.errors import RecipeError
from l2v.model.cost import StepCost
from l2v.model.fused import Recompute
from l2v.model.fused.spec import FAMILIES
from l2v.model.memory import LayerShape
from l2v.plan import roofline, wire
from l2v.plan.gpus import Gpu
from l2v.plan.measured import factors
from l2v.plan.memory import Memory, Model, memory_of
from l2v.plan.shapes import LLAMA3_8B, shape_of
from l2v.plan.work import (
    PLANNED_STEPS,
    Lengths,
    Share,
    Work,
    lengths_of,
    sampler_of,
    steps_per_epoch,
    work_of,
)
from l2v.recipe import LLAMA_LINEARS, Base, Contrastive, Mntp, Recipe, Stage
from l2v.training.engine import deepspeed_config
from l2v.training.memory import layer_shape

SEGMENTS = {"mntp": 512, "simcse": 30, "supervised": 140}
"""Mean tokens per text in the workloads of benchmarks/train_step/work.py."""
AS_FAST = 0.02
"""Times that differ by less are as fast as each other."""
MAX_GROWTH = 8
"""The largest batch that is named, as a multiple of the recipe's."""


@dataclass(frozen=True)
class Speed:
    """A predicted speed: seconds of a step on its slowest rank by kind of work, and its tokens over all ranks."""

    seconds: dict[str, float]
    step_seconds: float
    step_tokens: float
    micros: int
    factor: float | None = None
    """Measured over predicted speed on this GPU, already applied; None without a measurement."""
    idle: int = 0
    """Ranks without work."""
    balance: float = 1.0
    """Mean over largest time of the ranks' devices."""
    device: float = 0.0
    """Seconds of the slowest rank's device in a step."""
    host: float = 0.0
    """Seconds that the host of that rank needs to start the work of a step; 0 on a CPU."""

    @property
    def device_share(self) -> float:
        """Time of the device over the larger of device and host time: 1 if the device is the limit."""
        return self.device / max(self.device, self.host)

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
class Relief:
    """Where the host is the limit: the fewest GPUs that would be as fast, and the largest batch that takes no longer a step."""

    gpus: int | None
    batch: int | None


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
    micro_tokens: int = 0
    """Those of the recipe, or fewer if `recompute: auto` is faster with them."""
    relief: Relief | None = None
    """What would be as fast; None if the device is the limit."""

    @property
    def epochs(self) -> float | None:
        """How often the stage sees its data; None if the data was not read."""
        return self.stage.steps / self.steps_per_epoch if self.steps_per_epoch else None

    @property
    def hours(self) -> float:
        return self.speed.step_seconds * self.stage.steps / 3600

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: 4N FLOPs per token, 6N without LoRA, as a share of the rate of large matmuls."""
        return (
            self.model.flops_of_weight
            * self.model.linear_parameters
            * self.speed.tokens_per_second
            / (self.world * self.gemm)
        )


def model_of(base: Base, config: Any, stage: Stage, itemsize: int) -> Model:
    """The model that a stage trains, from the base's configuration.

    Raises:
        RecipeError: the configuration lacks the sizes of a Llama-like layer.
    """
    try:
        text = config.get_text_config()
        shape = layer_shape(config, stage, itemsize)
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
    elif text.model_type.removesuffix("_text") not in FAMILIES.values():
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
    context = Context(recipe, stage, model, here, dtype, world, per_node, lengths, recipe.stage_seed(name))
    memory, micro_tokens = _placed(context, gpu)
    work = context.work(micro_tokens)
    # Only stages with LoRA were measured.
    factor = None if model.trained_all else _factors(gpu, dtype, recipe.base.base_precision).get(stage.objective)
    speed, others = context.speed(work, memory.recompute, factor), {}
    whole = int(lengths.lengths.max()) * (getattr(stage, "group", None) or stage.batch)
    for how, largest in memory.largest.items():
        micro = min(largest, max(whole, stage.micro_tokens))
        if micro >= int(lengths.lengths.max()):
            found = context.work(micro)
            others[how] = (max(each.largest for each in found), context.speed(found, how, factor))
    return StagePlan(
        name, stage, world, model, lengths, memory, speed, others,
        here.flops[dtype], context.exchanged(work[0].busiest, world),
        [] if gpu.cpu or world == 1 else context.scaling(memory.recompute),
        steps_per_epoch(lengths, stage) if lengths.real else None, micro_tokens,
        context.relief(speed, memory.recompute, micro_tokens) if gpu.timed else None,
    )  # fmt: skip


def _placed(context: Context, gpu: Gpu) -> tuple[Memory, int]:
    """The memory of a stage, and tokens of a micro-batch; with `recompute: auto` both are chosen as training does."""
    stage = context.stage

    def memory(stage: Stage, micro_tokens: int) -> Memory:
        largest = context.largest(micro_tokens)
        return memory_of(
            context.recipe, stage, context.model, gpu, itemsize=context.dtype.itemsize, dtype=context.dtype,
            world=context.world, tokens=largest, length=context.lengths.text,
        )  # fmt: skip

    found = memory(stage, stage.micro_tokens)
    if stage.recompute != "auto" or gpu.cpu or not context.model.fused:
        return found, stage.micro_tokens
    choice = context.choose(found.largest, stage.micro_tokens)
    if choice is None:  # nothing fits; the plan says so
        return memory(replace(stage, recompute="layer"), stage.micro_tokens), stage.micro_tokens
    return memory(replace(stage, recompute=choice.recompute), choice.micro_tokens), choice.micro_tokens


@dataclass(frozen=True)
class Choice:
    """What `recompute: auto` chooses. tokens: of the largest micro-batch that the data has."""

    recompute: Recompute
    micro_tokens: int
    tokens: int
    speed: Speed


@dataclass(frozen=True)
class Context:
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

    @property
    def cost(self) -> StepCost | None:
        """By which ranks are balanced; None on a CPU, where they are by tokens."""
        found = self.gpu.multiprocessors
        return StepCost.of(self.model.shape, found) if found else None

    def work(self, micro_tokens: int, world: int | None = None, steps: int = PLANNED_STEPS) -> list[Work]:
        """The first steps on `world` ranks, default: those of the plan."""
        return work_of(self.lengths, self.stage, world or self.world, self.seed, micro_tokens, steps, self.cost)

    def largest(self, micro_tokens: int) -> int:
        """Tokens of the largest micro-batch that training has."""
        sampler = sampler_of(self.lengths, self.stage, self.world, self.seed, micro_tokens, self.cost)
        return sampler.largest_micro_batch(self.stage.steps if self.lengths.real else 1)

    def speed(self, work: list[Work], how: Recompute, factor: float | None = None, world: int | None = None) -> Speed:
        """The mean speed over steps, each as long as its slowest rank takes."""
        world = world or self.world
        seconds: dict[str, float] = {}
        total = balance = device = host = 0.0
        known: dict[str, roofline.Clock] = {}  # of shares that are alike, as all are if lengths are assumed
        for each in work:
            for share in each.ranks:
                if str(share) not in known:
                    known[str(share)] = self.step(share, how, world)
            clocks = [known[str(share)] for share in each.ranks]
            slowest = max(clocks, key=lambda clock: clock.device)
            for kind, value in slowest.seconds.items():
                seconds[kind] = seconds.get(kind, 0.0) + value / len(work)
            total += max(clock.total() for clock in clocks) / len(work)
            device += slowest.device / len(work)
            host += slowest.host / len(work)
            balance += sum(clock.device for clock in clocks) / len(clocks) / slowest.device / len(work)
        tokens = sum(each.tokens for each in work) / len(work)
        micros = max(share.micros for each in work for share in each.ranks)
        idle = min(each.idle for each in work)
        return Speed(seconds, total / (factor or 1.0), tokens, micros, factor, idle, balance, device, host)

    def choose(self, largest: Mapping[Recompute, int], micro_tokens: int) -> Choice | None:
        """The fastest kind of recompute with at most `micro_tokens`; None if none fits.

        largest: for each kind the largest micro-batch that fits. Of settings that are equally fast within a percent the one
        with least recompute and largest micro-batches is taken.
        """
        found = []
        whole, longest = self.largest(micro_tokens), int(self.lengths.lengths.max())
        for how, most in largest.items():
            # If nothing larger occurs, the recipe's own value stays.
            micro = micro_tokens if whole <= most else most
            if most >= longest:
                tokens = whole if micro == micro_tokens else self.largest(micro)
                found.append(Choice(how, micro, tokens, self.speed(self.work(micro), how)))
        if not found:
            return None
        limit = 0.99 * max(each.speed.tokens_per_second for each in found)
        return next(each for each in found if each.speed.tokens_per_second >= limit)

    def relief(self, speed: Speed, how: Recompute, micro_tokens: int) -> Relief | None:
        """What would be as fast as these GPUs, if the host is the limit."""
        if speed.device_share > 1 - AS_FAST:
            return None
        slowest = speed.host * (1 + AS_FAST)
        fewest, world = None, self.world
        while world > 1:
            world = world - 1 if world <= 16 else world // 2
            if self.speed(self.work(micro_tokens, world, steps=2), how, world=world).step_seconds > slowest:
                break
            fewest = world
        unit = getattr(self.stage, "group", None) or self.world
        most = min(int(self.stage.batch / speed.device_share), MAX_GROWTH * self.stage.batch, self.lengths.an_epoch)
        larger = most // unit * unit
        while larger > self.stage.batch:
            grown = replace(self, stage=replace(self.stage, batch=larger))
            if grown.speed(grown.work(micro_tokens, steps=2), how).step_seconds <= slowest:
                break
            larger = int(0.95 * larger) // unit * unit
        return Relief(fewest, larger if larger > self.stage.batch else None)

    def exchanged(self, share: Share, world: int) -> list[wire.Transfer]:
        """Collectives of a step."""
        zero = deepspeed_config(self.stage, self.recipe.zero, self.dtype, self.model.trainable)["zero_optimization"]
        return wire.transfers(self.model, self.stage, zero, self.dtype.itemsize, world, share)

    def step(self, share: Share, how: Recompute, world: int) -> roofline.Clock:
        """The time of one step on `world` ranks."""
        stage, model = self.stage, self.model
        clock = roofline.Clock(self.gpu, self.dtype, model.base_precision == "fp8")
        dropped, read = bool(stage.lora and stage.lora.dropout), roofline.read_share(stage)
        for at, unit in enumerate(share.units):
            for i, tokens in enumerate(unit):
                text = share.squares[at][i] / tokens
                roofline.forward(clock, model, tokens, text, dropped=dropped, read=read)
                if isinstance(stage, Contrastive) and i < len(unit) - 1:  # the gradient cache encodes these twice
                    roofline.forward(clock, model, tokens, text, dropped=dropped, read=read)
                roofline.backward(clock, model, tokens, text, how, dropped=dropped, read=read)
                roofline.ends(clock, model, stage, tokens)
            for queries, candidates in share.losses[at]:
                assert isinstance(stage, Contrastive)  # no other objective has any
                roofline.contrastive(clock, model, stage, queries, candidates)
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
            wider = [[(q, c * gpus) for q, c in unit] for unit in share.losses]
            grown = replace(share, losses=wider) if shared else share
            rate = tokens / self.step(grown, how, gpus).total()
            _, part = self._once(stage, gpus)
            fixed = whole / gpus / self.step(part, how, gpus).total()
            found.append(Scaled(gpus, rate / alone, fixed / at_once, own * gpus))
        return found

    def _once(self, stage: Stage, world: int) -> tuple[int, Share]:
        """Tokens of one step on `world` ranks, and the share of the busiest."""
        (found,) = work_of(self.lengths, stage, world, self.seed, steps=1, cost=self.cost)
        return found.tokens, found.busiest


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
        stage = Mntp(data=[], batch=1, steps=1, lr=1.0)
        read = roofline.read_share(stage) if row["objective"] == "mntp" else 1.0
        roofline.forward(clock, model, tokens, length, dropped=True, read=read)
        roofline.backward(clock, model, tokens, length, row["recompute"] or "cheap", dropped=True, read=read)
        roofline.ends(clock, model, stage, tokens if row["objective"] == "mntp" else 0)
        roofline.once_a_step(clock, model, 1, 1, 0.0, 0)
        return tokens / clock.total()

    return factors(gpu.key, predict)
