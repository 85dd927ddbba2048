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
from l2v_kernels.spans import span

Micros = Sequence[PackedBatch]
Progress = Callable[[int, int, int], None]


def mntp_step(engine, units: Sequence[Micros], device: torch.device) -> dict[str, torch.Tensor]:
    """Backward through all micro-batches; returns this rank's share of the mean loss and accuracy (device scalars)."""
    micros = [micro for unit in units for micro in unit]
    world = dist.get_world_size()
    count = torch.tensor(float(sum(len(m.labels_L) for m in micros)), device=device)
    dist.all_reduce(count)
    count = count.clamp(min=1)
    share = functools.partial(mntp_loss_of_hidden, count=count)
    loss_sum, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    for at, micro in enumerate(micros):
        loss, found = engine(micro.to(device), "loss", share)
        _backward(engine, loss * world, last=at == len(micros) - 1)
        loss_sum += loss.detach()
        hits += found
    return {"loss": loss_sum, "accuracy": hits / count}


def loss_options(stage: Contrastive) -> dict[str, Any]:
    """What a stage asks of `contrastive_loss`, in training and on held-out examples alike."""
    return {
        "scale": stage.scale,
        "mask_duplicates": stage.mask_duplicates,
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

    def encode(micro: PackedBatch) -> torch.Tensor:
        vectors_SE = engine(micro.to(device), "vectors")
        not_finite.append(~vectors_SE.detach().isfinite().all(-1))
        tell(1)
        return vectors_SE

    for at, micros in enumerate(units):
        last_unit = at == len(units) - 1
        columns_S, keys_S = (torch.cat([getattr(m, name) for m in micros]) for name in ("columns_S", "text_keys_S"))
        groups = Groups.from_columns(columns_S, keys_S, total=total, **everyone).to(device)
        with torch.no_grad():
            first = [encode(micro) for micro in micros[:-1]]
        kept_SE = encode(micros[-1])
        sizes = [len(micro.lengths) for micro in micros]
        cache_SE = torch.cat([*first, kept_SE.detach()]).requires_grad_()
        del first
        with span("loss"):
            loss = contrastive_loss(cache_SE, groups, **options)
            (gradient_SE,) = torch.autograd.grad(loss, cache_SE)
        del cache_SE
        *parts, part_SE = gradient_SE.split(sizes)
        _backward(engine, (kept_SE * part_SE).sum() * world, last=last_unit and not parts)
        tell(2)
        del kept_SE
        for i, (micro, part_SE) in enumerate(zip(micros[:-1], parts, strict=True)):
            vectors_SE = engine(micro.to(device), "vectors")
            _backward(engine, (vectors_SE * part_SE).sum() * world, last=last_unit and i == len(parts) - 1)
            tell(2)
        loss_sum += loss.detach()
    return {"loss": loss_sum, "not_finite_S": torch.cat(not_finite)}


def _backward(engine, loss: torch.Tensor, *, last: bool) -> None:
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)
