"""One optimizer step's gradients: MNTP and contrastive, over micro-batches and ranks.

Both normalise by the count of the whole step (labels, queries) over ranks and micro-batches. DeepSpeed averages gradients
over ranks, so a local share is multiplied by the world size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from l2v.batch import PackedBatch
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.mntp import mntp_loss_of_hidden
from l2v.recipe import Contrastive
from l2v.training.faults import Guard, OutOfMemory, filler, is_out_of_memory
from l2v_kernels.spans import span

Micros = Sequence[PackedBatch]
Progress = Callable[[int, int, int], None]


def mntp_step(
    engine, units: Sequence[Micros], device: torch.device, guard: Guard | None = None
) -> dict[str, torch.Tensor]:
    """Backward through all micro-batches; returns this rank's share of the mean loss and accuracy (device scalars).

    guard: keeps the rank in step if memory runs out; then what is returned means nothing.
    """
    run = guard.run if guard else _plainly
    micros = [micro for unit in units for micro in unit]
    world = dist.get_world_size()
    count = torch.tensor(float(sum(len(m.labels_L) for m in micros)), device=device)
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
        loss, found = run(
            functools.partial(forward_backward, micro, last, world),
            lambda last=last: forward_backward(filler(device), last, 0.0),
        )
        loss_sum += loss
        hits += found
    return {"loss": loss_sum, "accuracy": hits / count}


def loss_options(stage: Contrastive) -> dict[str, Any]:
    """What a stage asks of `contrastive_loss`, in training and on held-out examples alike."""
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
    }


def contrastive_step(
    engine,
    units: Sequence[Micros],
    stage: Contrastive,
    counts: Sequence[int],
    total: int,
    device: torch.device,
    progress: Progress | None = None,
    query_counts: Sequence[int] | None = None,
    guard: Guard | None = None,
) -> dict[str, torch.Tensor]:
    """Backward of the contrastive loss over micro-batches and ranks, exact by a gradient cache.

    A unit is a set of examples whose embeddings meet in one loss. All its micro-batches are encoded without graph, but for
    the last, which keeps its own; the loss is taken once over all embeddings (with `negatives: global`, of all ranks);
    the last micro-batch goes backward, and the others are encoded again, this time with graph, and carry their part of the
    gradient on (Gao et al. 2021, arXiv 2101.06983). Noise has an address, so both passes see the same masks. Memory: one
    micro-batch's activations and a unit's embeddings, fp32 [S, E], with their gradient. A micro-batch is copied to the
    device in either pass (17 bytes a token, nothing beside encoding it); to keep them there would grow with the batch.

    units: of this rank; all ranks have equally many, of equally many micro-batches. counts, query_counts: candidates and
    queries of every rank, from the plan (for negatives: global; query_counts by default [total], one rank's). total:
    queries of all ranks. progress: called with (pass 1 or 2, micro-batches done in it, micro-batches of the step).
    guard: keeps the rank in step if memory runs out; then what is returned means nothing.
    Returns loss: this rank's share of the mean loss (device scalar), and not_finite_S: bool, for every segment of the units
    in order, whether its embedding holds a NaN or an infinity. Nothing waits for the device.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    everyone = {}
    if stage.negatives == "global" and world > 1:
        everyone = {"counts": counts, "query_counts": query_counts or [total], "rank": rank}
    options, of = loss_options(stage), sum(map(len, units))
    loss_sum, not_finite, done = torch.zeros((), device=device), [], [0, 0]

    def tell(number: int) -> None:
        done[number - 1] += 1
        if progress:
            progress(number, done[number - 1], of)

    run = guard.run if guard else _plainly
    width = engine.module.decoder.config.get_text_config().hidden_size

    def encode(micro: PackedBatch) -> torch.Tensor:
        vectors_SE = run(
            lambda: engine(micro.to(device), "vectors"),
            lambda: torch.zeros(len(micro.lengths), width, device=device),
        )
        not_finite.append(~vectors_SE.detach().isfinite().all(-1))
        tell(1)
        return vectors_SE

    def backward(vectors_SE: torch.Tensor, gradient_SE: torch.Tensor | None, last: bool) -> None:
        loss = vectors_SE.sum() * 0 if gradient_SE is None else (vectors_SE * gradient_SE).sum() * world
        _backward(engine, loss, last=last)

    def backward_of(vectors: Callable[[], torch.Tensor], part_SE: torch.Tensor, last: bool) -> None:
        run(
            lambda: backward(vectors(), part_SE, last),
            lambda: backward(engine(filler(device), "vectors"), None, last),
        )
        tell(2)

    for at, micros in enumerate(units):
        last_unit = at == len(units) - 1
        labels = (torch.cat([getattr(m, n) for m in micros]) for n in ("columns_S", "text_keys_S", "groups_S"))
        groups = Groups.from_columns(*labels, total=total, **everyone).to(device)
        with torch.no_grad():
            first = [encode(micro) for micro in micros[:-1]]
        kept_SE = encode(micros[-1])
        sizes = [len(micro.lengths) for micro in micros]
        cache_SE = torch.cat([*first, kept_SE.detach()]).requires_grad_()
        del first
        with span("loss"):
            try:
                loss = contrastive_loss(cache_SE, groups, **options)
                (gradient_SE,) = torch.autograd.grad(loss, cache_SE)
            except (RuntimeError, MemoryError) as error:
                # Embeddings of all ranks meet here, in collectives that cannot be taken up halfway.
                if guard is None or not is_out_of_memory(error):
                    raise
                raise OutOfMemory(str(error).splitlines()[0]) from None
        del cache_SE
        *parts, part_SE = gradient_SE.split(sizes)
        backward_of(lambda kept_SE=kept_SE: kept_SE, part_SE, last_unit and not parts)
        del kept_SE
        for i, (micro, part_SE) in enumerate(zip(micros[:-1], parts, strict=True)):
            again = functools.partial(lambda micro: engine(micro.to(device), "vectors"), micro)
            backward_of(again, part_SE, last_unit and i == len(parts) - 1)
        loss_sum += loss.detach()
    return {"loss": loss_sum, "not_finite_S": torch.cat(not_finite)}


def _plainly(work: Callable[[], Any], instead: Callable[[], Any]) -> Any:
    return work()


def _backward(engine, loss: torch.Tensor, *, last: bool) -> None:
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)
