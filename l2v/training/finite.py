"""What to say when a step's loss or embeddings are not finite. The step is not applied; every rank says the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from l2v.batch import PackedBatch
from l2v.errors import UserError

FEW = 3


def is_broken(loss: torch.Tensor, not_finite_S: torch.Tensor | None) -> torch.Tensor:
    """A device scalar bool: this rank's share of the loss, or one of its embeddings, is NaN or infinite."""
    broken = ~loss.isfinite()
    return broken if not_finite_S is None else broken | not_finite_S.any()


def refuse(step: int, units: Sequence[Sequence[PackedBatch]], not_finite_S: torch.Tensor | None) -> UserError:
    """The error of a broken step (counted from 1), naming examples and columns. A collective call."""
    mine: list[tuple[int, int]] = []
    micros = [micro for unit in units for micro in unit]
    if not_finite_S is not None:
        examples_S, columns_S = (
            torch.cat([getattr(m, name) for m in micros]) for name in ("example_ids_S", "columns_S")
        )
        bad_S = not_finite_S.cpu()
        mine = list(zip(examples_S[bad_S].tolist(), columns_S[bad_S].tolist(), strict=True))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, sum(len(m.lengths) for m in micros)))
    bad = sorted((row for rows, _ in everyone for row in rows), key=lambda row: (row[0] < 0, row))
    count = sum(n for _, n in everyone)
    undone = "so this step changed nothing"
    if not bad:
        return UserError(f"step {step}: the loss is not finite, {undone}; lower lr, or use base.precision: fp32")
    shown = ", ".join(_name(example, column) for example, column in bad[:FEW])
    more = f" and {len(bad) - FEW} more" if len(bad) > FEW else ""
    if len(bad) * 2 > count:  # not a matter of the text
        remedy = "lower lr, look for NaN in the base's weights, or use base.precision: fp32"
    else:
        remedy = "remove or mend the text, look for NaN in the base's weights, or use base.precision: fp32"
    return UserError(
        f"step {step}: the embedding of {shown}{more} is not finite ({len(bad)} of {count} embeddings), {undone}; {remedy}"
    )


def _name(example: int, column: int) -> str:
    if column < 0:
        return "the token that fills an empty micro-batch (id 0)"
    return f"the {('query', 'positive')[column] if column < 2 else f'negative {column - 1}'} of example {example}"
