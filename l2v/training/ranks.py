"""Work that ranks do together: an error on one rank is raised on all, and ranks check that they agree.

A rank that fails alone leaves the others waiting in a collective. So anything that may fail on one rank only (a file that
one node lacks) or differ between ranks (another recipe, other rows) is exchanged before training begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from l2v.errors import RecipeError, UserError

T = TypeVar("T")


def on_first_rank(work: Callable[[], T]) -> T:
    """Call `work` once, on rank 0; every rank returns its result or raises its UserError. A collective call."""
    return _exchange(work, dist.get_rank() == 0)[0]


def on_every_rank(work: Callable[[], T]) -> T:
    """Call `work` on every rank; each returns its own result. A collective call.

    Raises:
        UserError: that of the first rank that has one, on all ranks.
    """
    return _exchange(work, True, share=False)


def first_on_node(work: Callable[[], T]) -> T:
    """Call `work` on each node's first rank, which fills the caches, then on the others. A collective call.

    Raises:
        UserError: that of the first rank that has one, on all ranks.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = _exchange(work, first, share=False)
    return _exchange(lambda: result if first else work(), True, share=False)


def _exchange(work: Callable[[], T], mine: bool, *, share: bool = True) -> Any:
    result, error = None, None
    if mine:
        try:
            result = work()
        except UserError as caught:
            error = type(caught).__name__, str(caught)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (error, result if share else None))
    for failed, _ in outcomes:
        if failed:
            raise (RecipeError if failed[0] == "RecipeError" else UserError)(failed[1])
    return [value for _, value in outcomes] if share else result


def agree(facts: dict[str, Any]) -> None:
    """Check that nested, JSON-serialisable facts are equal on all ranks. A collective call.

    Raises:
        UserError: facts differ; the same error on every rank, with the first key that differs, its values and their ranks.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _flat(facts, ""))
    keys = list(dict.fromkeys(key for each in everyone for key in each))
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, each in enumerate(everyone):
            holders.setdefault(json.dumps(each.get(key), default=str, ensure_ascii=False), []).append(rank)
        if len(holders) > 1:
            values = "; ".join(f"{value} on rank {_listed(ranks)}" for value, ranks in holders.items())
            raise UserError(
                f"the ranks do not agree on {key}: {values}; all ranks need the same recipe, command line, data and run folder"
            )


def _flat(facts: Any, path: str) -> dict[str, Any]:
    if not isinstance(facts, dict) or not facts:
        return {path: facts}
    return {
        k: v for key, value in facts.items() for k, v in _flat(value, f"{path}.{key}" if path else str(key)).items()
    }


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown
