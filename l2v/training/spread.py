"""From the plan of a step to the groups whose losses this rank computes, on the host."""

from __future__ import annotations

import torch

from l2v.batch import Segment
from l2v.data.collate import segments_of
from l2v.data.examples import Examples
from l2v.data.sampler import StepPlan
from l2v.objectives.groups import Groups
from l2v.objectives.spread import SpreadGroups, rows_of


def spread_groups(plan: StepPlan, rank: int, examples: Examples, seed: int) -> list[SpreadGroups]:
    """For every unit of the plan the groups of this rank; empty if groups are not divided among ranks.

    Texts that other ranks embed are read here for their keys, so that nothing has to be exchanged.
    """
    total = len(plan.examples)
    found = []
    for at, pools in enumerate(plan.losses):
        counts, occurrences = rows_of([units[at].micros for units in plan.units], examples.segments)
        # An example that occurs twice in a unit has rows for each occurrence.
        starts = [[occurrences[example].pop(0) for example in pool] for pool in pools]
        rows, groups = [], []
        for number in plan.owned(rank, at):
            texts = [segments_of(examples, example, seed, plan.step) for example in pools[number]]
            begun = zip(starts[number], texts, strict=True)
            rows.append(torch.cat([torch.arange(start, start + len(text)) for start, text in begun]))
            labels = labels_of([segment for text in texts for segment in text])
            groups.append(Groups.from_columns(*labels, total=total))
        found.append(SpreadGroups(counts, rows, groups))
    return found


def labels_of(segments: list[Segment]) -> list[torch.Tensor]:
    """Columns, text keys and groups of segments, int64 [segments] each."""
    columns = [[s.column for s in segments], [s.text_key for s in segments], [s.group for s in segments]]
    return [torch.tensor(column, dtype=torch.int64) for column in columns]
