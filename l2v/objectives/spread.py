"""Contrastive losses of groups whose texts are embedded on several ranks.

With `negatives: micro` a batch has several groups, each with a loss of its own. If a rank embedded whole groups, four groups
would keep four ranks busy at most. So all ranks embed a part of every group, and the embeddings are gathered. Each group's loss
is then computed on one rank, from the same rows in the same order as a single process has them, and the gradients return to
the ranks that the rows came from. The gradient of a row has one term that is not zero, so adding it up rounds nothing.

Why not a mask over all scores: it would compute every group with every other, which grows with the square of their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from l2v.batch import moved
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.gather import gather_rows


@dataclass
class SpreadGroups:
    """The groups whose losses this rank computes, and where their texts are among the embeddings of all ranks.

    counts: rows of every rank, the filler rows of empty micro-batches included; the same on all ranks. rows: for each group
    int64 [texts], its rows among those of all ranks. groups: the structure of each; `total` is the queries of the whole step.
    """

    counts: list[int]
    rows: list[torch.Tensor]
    groups: list[Groups]

    def to(self, device: torch.device) -> SpreadGroups:
        """The same with its tensors on a device."""
        there = [moved(rows, device) for rows in self.rows]
        return replace(self, rows=there, groups=[groups.to(device) for groups in self.groups])


def spread_loss(embeddings_SE: torch.Tensor, spread: SpreadGroups, **options) -> torch.Tensor:
    """The sum of the losses of this rank's groups. A collective call, and so is its backward.

    embeddings_SE: [S, E], all rows of this rank's unit, in the order of its micro-batches. options: those of
    `contrastive_loss`. The sum over ranks is the mean over all queries, as there; a rank without a group returns 0.

    Raises:
        ValueError: the number of rows differs from `spread.counts`.
    """
    (all_RE,) = gather_rows([embeddings_SE], [spread.counts])
    if not spread.rows:
        # The gradients of the others pass through the same collective.
        return all_RE[:0].sum()
    own = all_RE[torch.cat(spread.rows)].split([len(rows) for rows in spread.rows])
    losses = [contrastive_loss(rows, groups, **options) for rows, groups in zip(own, spread.groups, strict=True)]
    return torch.stack(losses).sum()


def rows_of(micros: Sequence[Sequence[Sequence[int]]], segments: np.ndarray) -> tuple[list[int], dict[int, list[int]]]:
    """Rows of every rank, and the first row of each occurrence of every example, from the plan of a unit.

    micros: [rank][micro-batch] the examples. segments: texts of each example, by its number.
    """
    counts: list[int] = []
    first: dict[int, list[int]] = {}
    for rank in micros:
        begin = sum(counts)
        at = begin
        for micro in rank:
            for example in micro:
                first.setdefault(example, []).append(at)
                at += int(segments[example])
            at += not micro  # the filler of an empty micro-batch
        counts.append(at - begin)
    return counts, first
