"""Queries of a step that have no negative left and so teach nothing: counted from the labels, while the step before computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from l2v.batch import PackedBatch
from l2v.data.collate import segments_of
from l2v.data.examples import Examples
from l2v.data.sampler import StepPlan
from l2v.objectives.groups import Groups
from l2v.objectives.negatives import WITH_QUERIES, without_negatives
from l2v.objectives.spread import SpreadGroups
from l2v.recipe import Contrastive
from l2v.training.spread import labels_of


def queries_alone(
    plan: StepPlan, units: Sequence[Sequence[PackedBatch]], rank: int, examples: Examples, stage: Contrastive, seed: int,
    spread: Sequence[SpreadGroups] = (),
) -> int:  # fmt: skip
    """This rank's queries of a step without a negative, on the host and without communication.

    units: this rank's micro-batches. With `negatives: global` the texts of other ranks are read from the examples, but only if
    a query has no negative on its own rank. spread: the groups whose losses this rank computes; their queries are counted here,
    wherever they are embedded.
    """
    if spread:
        return sum(int(_alone(groups, stage).sum()) for unit in spread for groups in unit.groups)
    total = 0
    for at, micros in enumerate(units):
        labels = [torch.cat([getattr(m, n) for m in micros]) for n in ("columns_S", "text_keys_S", "groups_S")]
        alone_N = _alone(Groups.from_columns(*labels), stage)
        if alone_N.any() and stage.negatives == "global" and len(plan.units) > 1:
            others = [
                segment
                for other, theirs in enumerate(plan.units)
                if other != rank
                for example in theirs[at].examples
                for segment in segments_of(examples, example, seed, plan.step)
            ]
            everyone = (torch.cat(pair) for pair in zip(labels, labels_of(others), strict=True))
            alone_N = _alone(Groups.from_columns(*everyone), stage)[: len(alone_N)]
        total += int(alone_N.sum())
    return total


def _alone(groups: Groups, stage: Contrastive) -> torch.Tensor:
    return without_negatives(
        groups,
        mask_duplicates=stage.mask_duplicates,
        mask_groups=stage.grouped,
        own_negatives=stage.hard_negatives == "own",
        with_queries=bool(WITH_QUERIES & set(stage.directions)),
    )
