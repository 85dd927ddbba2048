"""Gradients of one optimizer step, MNTP and contrastive, over micro-batches and ranks.

Both divide the loss by the step's total count (labels, queries) over all ranks and micro-batches. DeepSpeed averages
gradients over ranks, so a rank's share is multiplied by the world size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from l2v.batch import PackedBatch, moved
from l2v.errors import first_line
from l2v.model.memory import is_out_of_memory
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.mntp import mntp_loss_of_hidden
from l2v.objectives.spread import SpreadGroups, spread_loss
from l2v.recipe import Contrastive
from l2v.training.faults import OutOfMemory, OutOfMemoryGuard, filler
from l2v_kernels.spans import span

Micros = Sequence[PackedBatch]
Progress = Callable[[int, int, int], None]


def mntp_step(
    engine, units: Sequence[Micros], device: torch.device, guard: OutOfMemoryGuard | None = None
) -> dict[str, torch.Tensor]:
    """Backward through all micro-batches; returns this rank's share of the mean loss and accuracy (device scalars).

    guard: keeps the rank in step if memory runs out; the returned values are then meaningless.
    """
    micros = [micro for unit in units for micro in unit]
    world = dist.get_world_size()
    count = moved(torch.tensor(float(sum(len(m.labels_L) for m in micros))), device)
    dist.all_reduce(count)
    count = count.clamp(min=1)
    share = functools.partial(mntp_loss_of_hidden, count=count)
    loss_sum, hits = torch.zeros((), device=device), torch.zeros((), device=device)

    def forward_backward(micro: PackedBatch, last: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        loss, found = engine(micro.to(device), "loss", share)
        _backward(engine, loss * scale, last=last)
        return loss.detach(), found

    for at, micro in enumerate(micros):
        last = at == len(micros) - 1
        loss, found = _guarded(
            guard,
            functools.partial(forward_backward, micro, last, world),
            functools.partial(lambda last: forward_backward(filler(device), last, 0.0), last),
        )
        loss_sum += loss
        hits += found
    return {"loss": loss_sum, "accuracy": hits / count}


def loss_options(stage: Contrastive) -> dict[str, Any]:
    """A stage's options of `contrastive_loss`, the same in training and on held-out examples."""
    return {
        "scale": stage.scale,
        "mask_duplicates": stage.mask_duplicates,
        "mask_groups": stage.grouped,
        "directions": stage.directions,
        "partition": stage.partition,
        "own_negatives": stage.hard_negatives == "own",
        "false_negative_margin": stage.false_negative_margin,
        "prefixes": stage.matryoshka,
        "prefix_weights": stage.matryoshka_weights,
        "quantize": stage.quantize,
        "warn": False,  # the loop counts such queries and logs them
    }


@dataclass(frozen=True)
class StepCounts:
    """Number of candidates and queries of every rank in a step, from the plan."""

    candidates: Sequence[int]
    queries: Sequence[int]

    @property
    def total(self) -> int:
        """Queries of all ranks."""
        return sum(self.queries)


def contrastive_step(
    engine,
    units: Sequence[Micros],
    stage: Contrastive,
    counts: StepCounts,
    *,
    spread: Sequence[SpreadGroups] = (),
    progress: Progress | None = None,
    guard: OutOfMemoryGuard | None = None,
) -> dict[str, torch.Tensor]:
    """Exact gradients of the contrastive loss over micro-batches and ranks, with a gradient cache.

    A unit is a set of examples whose embeddings share one loss (with `negatives: global`, together with those of all ranks), or
    a part of the examples of several groups that are divided among ranks.

    units: this rank's; all ranks have the same number, each with the same number of micro-batches. spread: for every unit the
    groups whose losses this rank computes; empty if groups are not divided among ranks. progress: called with
    (pass 1 or 2, finished micro-batches of that pass, micro-batches of the step). guard: keeps the rank in step if memory
    runs out; the returned values are then meaningless.
    Returns loss, this rank's share of the mean loss (device scalar), and nonfinite_S (bool): for every segment of the units,
    in order, whether its embedding holds NaN or Inf. Nothing waits for the device.
    """
    cache = GradientCache(engine, stage, sum(map(len, units)), progress=progress, guard=guard)
    world = dist.get_world_size()
    everyone: dict[str, Any] = {}
    if stage.negatives == "global" and world > 1:
        everyone = {"counts": counts.candidates, "query_counts": counts.queries, "rank": dist.get_rank()}
    loss_sum = torch.zeros((), device=engine.device)
    for at, micros in enumerate(units):
        if spread:
            loss_sum += cache.unit(micros, spread[at].to(engine.device), last=at == len(units) - 1)
            continue
        labels = (torch.cat([getattr(m, n) for m in micros]) for n in ("columns_S", "text_keys_S", "groups_S"))
        groups = Groups.from_columns(*labels, total=counts.total, **everyone).to(engine.device)
        loss_sum += cache.unit(micros, groups, last=at == len(units) - 1)
    return {"loss": loss_sum, "nonfinite_S": torch.cat(cache.nonfinite)}


class GradientCache:
    """Gradients of a contrastive batch in the memory of one micro-batch (Gao et al. 2021, arXiv 2101.06983).

    1. Encode all micro-batches of a unit without a graph, except the last, which keeps its graph.
    2. Compute the loss once over all embeddings, and its gradient with respect to them.
    3. Run the backward of the last micro-batch. Encode each of the others again, now with a graph, and run its backward
       from its part of the gradient.

    Dropout is keyed by text, layer and position, so both passes see the same masks. Memory: one micro-batch's activations
    and a unit's embeddings, fp32 [S, E], with their gradient. A micro-batch is copied to the device in both passes (17 bytes
    a token, negligible next to encoding it); keeping them on the device would take memory that grows with the batch.
    """

    def __init__(
        self, engine, stage: Contrastive, micros: int, *, progress: Progress | None, guard: OutOfMemoryGuard | None
    ) -> None:
        """micros: micro-batches of the step."""
        self.engine, self.device, self.guard = engine, engine.device, guard
        self.options = loss_options(stage)
        self.progress, self.micros, self.done = progress, micros, [0, 0]
        self.world = dist.get_world_size()
        self.width = engine.module.decoder.config.get_text_config().hidden_size
        self.nonfinite: list[torch.Tensor] = []

    def unit(self, micros: Micros, groups: Groups | SpreadGroups, *, last: bool) -> torch.Tensor:
        """Backward of one unit; returns its loss. last: this unit's last backward ends the step's gradient accumulation."""
        with torch.no_grad():
            first = [self._encode(micro) for micro in micros[:-1]]
        kept_SE = self._encode(micros[-1])
        sizes = [len(micro.lengths) for micro in micros]
        cache_SE = torch.cat([*first, kept_SE.detach()]).requires_grad_()
        del first
        loss, gradient_SE = self._loss(cache_SE, groups)
        del cache_SE
        *parts, part_SE = gradient_SE.split(sizes)
        self._backward(functools.partial(lambda vectors_SE: vectors_SE, kept_SE), part_SE, last=last and not parts)
        del kept_SE
        for at, (micro, part_SE) in enumerate(zip(micros[:-1], parts, strict=True)):
            encode_again = functools.partial(self._vectors, micro)
            self._backward(encode_again, part_SE, last=last and at == len(parts) - 1)
        return loss.detach()

    def _vectors(self, micro: PackedBatch) -> torch.Tensor:
        return self.engine(micro.to(self.device), "vectors")

    def _encode(self, micro: PackedBatch) -> torch.Tensor:
        """Embeddings of a micro-batch, fp32 [S, E]; zeros if memory ran out."""
        vectors_SE = _guarded(
            self.guard,
            lambda: self._vectors(micro),
            lambda: torch.zeros(len(micro.lengths), self.width, device=self.device),
        )
        self.nonfinite.append(~vectors_SE.detach().isfinite().all(-1))
        self._count(1)
        return vectors_SE

    def _loss(self, cache_SE: torch.Tensor, groups: Groups | SpreadGroups) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss over all embeddings of a unit, and its gradient with respect to them."""
        with span("loss"):
            try:
                if isinstance(groups, SpreadGroups):
                    loss = spread_loss(cache_SE, groups, **self.options)
                else:
                    loss = contrastive_loss(cache_SE, groups, **self.options)
                (gradient_SE,) = torch.autograd.grad(loss, cache_SE)
            except (RuntimeError, MemoryError) as error:
                # The embeddings of all ranks are exchanged here, in collectives that cannot be resumed halfway.
                if self.guard is None or not is_out_of_memory(error):
                    raise
                raise OutOfMemory(first_line(error)) from None
        return loss, gradient_SE

    def _backward(self, vectors: Callable[[], torch.Tensor], gradient_SE: torch.Tensor, *, last: bool) -> None:
        """Backward of a micro-batch from its part of the gradient; of a batch without loss if memory ran out."""

        def work() -> None:
            _backward(self.engine, (vectors() * gradient_SE).sum() * self.world, last=last)

        def instead() -> None:
            _backward(self.engine, self._vectors(filler(self.device)).sum() * 0, last=last)

        _guarded(self.guard, work, instead)
        self._count(2)

    def _count(self, number: int) -> None:
        self.done[number - 1] += 1
        if self.progress:
            self.progress(number, self.done[number - 1], self.micros)


def _guarded(guard: OutOfMemoryGuard | None, work: Callable[[], Any], instead: Callable[[], Any]) -> Any:
    return guard.run(work, instead) if guard else work()


def _backward(engine, loss: torch.Tensor, *, last: bool) -> None:
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)
