"""Steps whose loss, embeddings or gradients are not finite: left out, counted, and named. Every rank says the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from l2v.batch import PackedBatch
from l2v.errors import UserError
from l2v.recipe import Stage
from l2v.training.faults import keep_batch

FEW = 3


def is_broken(loss: torch.Tensor, not_finite_S: torch.Tensor | None) -> torch.Tensor:
    """A device scalar bool: this rank's share of the loss, or one of its embeddings, is NaN or infinite."""
    broken = ~loss.isfinite()
    return broken if not_finite_S is None else broken | not_finite_S.any()


@dataclass
class Skips:
    """How many steps were left out, in all and in a row up to now; part of a checkpoint."""

    total: int = 0
    in_a_row: int = 0

    @classmethod
    def of(cls, resume) -> Skips:
        """As they stood in a checkpoint, or none."""
        return cls(resume.facts.get("skipped", 0), resume.facts.get("skipped_in_a_row", 0)) if resume else cls()

    def facts(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}

    def count(self, applied: bool) -> None:
        """One more step."""
        self.total += not applied
        self.in_a_row = 0 if applied else self.in_a_row + 1

    def say(
        self,
        step: int,
        stage: Stage,
        units: Sequence[Sequence[PackedBatch]],
        not_finite_S: torch.Tensor | None,
        loss: torch.Tensor,
        note: Callable[[str], None],
        folder: Path,
    ) -> UserError | None:
        """Tell of a step that was left out; the error that ends training once it is too many. A collective call."""
        what, remedy = describe(step, units, not_finite_S, loss)
        if self.in_a_row < stage.skip_limit:
            note(f"WARNING: {what}, so it is left out ({self.in_a_row} in a row; training stops at {stage.skip_limit})")
            return None
        path = keep_batch(folder, step, units, what)
        row = f" ({self.in_a_row} steps in a row)" if self.in_a_row > 1 else ""
        return UserError(
            f"{what}{row}, so it changed nothing; {remedy}. Every rank's part of the batch lies in {path.parent}, "
            "the state before it is saved"
        )


def describe(
    step: int, units: Sequence[Sequence[PackedBatch]], not_finite_S: torch.Tensor | None, loss: torch.Tensor
) -> tuple[str, str]:
    """What of a step (counted from 1) is not finite, with examples and columns, and the way out. A collective call."""
    mine: list[tuple[int, int]] = []
    micros = [micro for unit in units for micro in unit]
    if not_finite_S is not None:
        examples_S, columns_S = (
            torch.cat([getattr(m, name) for m in micros]) for name in ("example_ids_S", "columns_S")
        )
        bad_S = not_finite_S.cpu()
        mine = list(zip(examples_S[bad_S].tolist(), columns_S[bad_S].tolist(), strict=True))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, sum(len(m.lengths) for m in micros), bool(loss.isfinite())))
    bad = sorted((row for rows, _, _ in everyone for row in rows), key=lambda row: (row[0] < 0, row))
    count = sum(n for _, n, _ in everyone)
    if not bad:
        what = "a gradient" if all(finite for _, _, finite in everyone) else "the loss"
        return f"step {step}: {what} is not finite", "lower lr, or use base.precision: fp32"
    shown = ", ".join(_name(example, column) for example, column in bad[:FEW])
    more = f" and {len(bad) - FEW} more" if len(bad) > FEW else ""
    if len(bad) * 2 > count:  # not a matter of the text
        remedy = "lower lr, look for NaN in the base's weights, or use base.precision: fp32"
    else:
        remedy = "remove or mend the text, look for NaN in the base's weights, or use base.precision: fp32"
    return f"step {step}: the embedding of {shown}{more} is not finite ({len(bad)} of {count} embeddings)", remedy


def _name(example: int, column: int) -> str:
    if column < 0:
        return "the token that fills an empty micro-batch (id 0)"
    return f"the {('query', 'positive')[column] if column < 2 else f'negative {column - 1}'} of example {example}"
