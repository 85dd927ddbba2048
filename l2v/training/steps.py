"""One optimizer step's gradients: MNTP and contrastive, over micro-batches and ranks.

Both normalise by the count of the whole step (labels, queries) over ranks and micro-batches. DeepSpeed averages gradients
over ranks, so a local share is multiplied by the world size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from l2v.batch import PackedBatch
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.mntp import mntp_loss
from l2v.recipe import Contrastive

Micros = Sequence[PackedBatch]


def mntp_step(engine, units: Sequence[Micros], device: torch.device) -> dict[str, torch.Tensor]:
    """Backward through all micro-batches; returns this rank's share of the mean loss and accuracy (device scalars)."""
    micros = [micro for unit in units for micro in unit]
    world = dist.get_world_size()
    count = torch.tensor(float(sum(len(m.labels_L) for m in micros)), device=device)
    dist.all_reduce(count)
    count = count.clamp(min=1)
    loss_sum, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    for at, micro in enumerate(micros):
        batch = micro.to(device)
        logits_LV = engine(batch, "logits")
        loss = mntp_loss(logits_LV, batch.labels_L, count)
        _backward(engine, loss * world, last=at == len(micros) - 1)
        loss_sum += loss.detach()
        hits += (logits_LV.detach().argmax(-1) == batch.labels_L).sum() / count
    return {"loss": loss_sum, "accuracy": hits}


def contrastive_step(
    engine, units: Sequence[Micros], stage: Contrastive, counts: Sequence[int], total: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Backward of the contrastive loss; returns this rank's share of the mean loss.

    A unit is a set of examples whose embeddings meet in one loss. If it is one micro-batch, its graph is kept; if it is
    several, they are encoded without graph first, the loss is taken once over all embeddings, and a second pass carries
    its gradient on (gradient cache, Gao et al. 2021, arXiv 2101.06983). Noise has an address, so both passes see the same
    masks. counts: candidates of every rank (for negatives: global); total: queries of all ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    gather = stage.negatives == "global" and world > 1
    loss_sum = torch.zeros((), device=device)

    def loss_of(vectors_SE: torch.Tensor, micros: Micros) -> torch.Tensor:
        groups = Groups.from_columns(
            torch.cat([m.columns_S for m in micros]),
            torch.cat([m.text_keys_S for m in micros]),
            counts=list(counts) if gather else None,
            rank=rank if gather else 0,
            total=total,
        ).to(device)
        return contrastive_loss(
            vectors_SE, groups, scale=stage.scale, mask_duplicates=stage.mask_duplicates, gather=gather
        )

    for at, micros in enumerate(units):
        last = at == len(units) - 1
        if len(micros) == 1:
            loss = loss_of(engine(micros[0].to(device), "vectors"), micros)
            _backward(engine, loss * world, last=last)
        else:
            with torch.no_grad():
                vectors = [engine(m.to(device), "vectors") for m in micros]
            sizes = [len(v) for v in vectors]
            cache_SE = torch.cat(vectors).requires_grad_()
            loss = loss_of(cache_SE, micros)
            (gradient_SE,) = torch.autograd.grad(loss, cache_SE)
            for i, (micro, part) in enumerate(zip(micros, gradient_SE.split(sizes), strict=True)):
                carried = (engine(micro.to(device), "vectors") * part).sum()
                _backward(engine, carried * world, last=last and i == len(micros) - 1)
        loss_sum += loss.detach()
    return {"loss": loss_sum}


def _backward(engine, loss: torch.Tensor, *, last: bool) -> None:
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)
