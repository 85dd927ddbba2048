"""Steps whose loss, embeddings or gradients hold NaN or Inf: skipped, counted, and reported the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from l2v.batch import PackedBatch
from l2v.errors import UserError
from l2v.training.faults import keep_batch

NAMED_EXAMPLES = 3
"""Examples that an error message lists."""


def is_broken(loss: torch.Tensor, nonfinite_S: torch.Tensor | None) -> torch.Tensor:
    """Whether this rank's share of the loss or one of its embeddings is NaN or Inf: bool [] on the device."""
    broken = ~loss.isfinite()
    return broken if nonfinite_S is None else broken | nonfinite_S.any()


@dataclass(frozen=True)
class BrokenStep:
    """A step (counted from 1) that was not applied.

    units: this rank's micro-batches. loss: its share of the loss (device scalar). nonfinite_S: for every segment, whether
    its embedding holds NaN or Inf (bool [S]; None for MNTP).
    """

    step: int
    units: Sequence[Sequence[PackedBatch]]
    loss: torch.Tensor
    nonfinite_S: torch.Tensor | None


@dataclass
class Skips:
    """Number of skipped steps, in total and in a row up to now; stored in checkpoints."""

    total: int = 0
    in_a_row: int = 0

    @classmethod
    def of(cls, resume) -> Skips:
        """The counts of a checkpoint, or zeros."""
        return cls(resume.facts.get("skipped", 0), resume.facts.get("skipped_in_a_row", 0)) if resume else cls()

    def facts(self) -> dict[str, int]:
        """The counts as a checkpoint stores them."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}

    def count(self, applied: bool) -> None:
        """Count one step."""
        self.total += not applied
        self.in_a_row = 0 if applied else self.in_a_row + 1

    def report(self, broken: BrokenStep, *, limit: int, folder: Path, log: Callable[[str], None]) -> UserError | None:
        """Log a skipped step; once `limit` were skipped in a row, return the error that ends training. A collective call.

        folder: the stage's; the batch of the last skipped step is saved there.
        """
        what, remedy = describe(broken)
        if self.in_a_row < limit:
            log(f"WARNING: {what}, so the step is skipped ({self.in_a_row} in a row; training stops at {limit})")
            return None
        path = keep_batch(folder, broken.step, broken.units, what)
        row = f" ({self.in_a_row} steps in a row)" if self.in_a_row > 1 else ""
        return UserError(
            f"{what}{row}, so it was not applied; {remedy}. Every rank's part of the batch is in {path.parent}, "
            "and the state before it is saved"
        )


def describe(broken: BrokenStep) -> tuple[str, str]:
    """Which values of a step hold NaN or Inf, with examples and columns, and what the user can do. A collective call."""
    mine: list[tuple[int, int]] = []
    micros = [micro for unit in broken.units for micro in unit]
    if broken.nonfinite_S is not None:
        examples_S = torch.cat([micro.example_ids_S for micro in micros])
        columns_S = torch.cat([micro.columns_S for micro in micros])
        bad_S = broken.nonfinite_S.cpu()
        mine = list(zip(examples_S[bad_S].tolist(), columns_S[bad_S].tolist(), strict=True))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, sum(len(m.lengths) for m in micros), bool(broken.loss.isfinite())))
    bad = sorted((row for rows, _, _ in everyone for row in rows), key=lambda row: (row[0] < 0, row))
    count = sum(n for _, n, _ in everyone)
    if not bad:
        what = "a gradient" if all(finite for _, _, finite in everyone) else "the loss"
        return f"step {broken.step}: {what} is NaN or Inf", "lower lr, or use base.precision: fp32"
    shown = ", ".join(_name(example, column) for example, column in bad[:NAMED_EXAMPLES])
    more = f" and {len(bad) - NAMED_EXAMPLES} more" if len(bad) > NAMED_EXAMPLES else ""
    if len(bad) * 2 > count:  # most embeddings are bad, so the texts are not the cause
        remedy = "lower lr, look for NaN in the base's weights, or use base.precision: fp32"
    else:
        remedy = "remove or fix the text, look for NaN in the base's weights, or use base.precision: fp32"
    return (
        f"step {broken.step}: the embedding of {shown}{more} is NaN or Inf ({len(bad)} of {count} embeddings)",
        remedy,
    )


def _name(example: int, column: int) -> str:
    if column < 0:
        return "the filler token of an empty micro-batch (id 0)"
    return f"the {('query', 'positive')[column] if column < 2 else f'negative {column - 1}'} of example {example}"
