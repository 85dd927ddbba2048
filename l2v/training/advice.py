"""The question that a stage asks before it starts, and the answer, which comes from `l2v.plan.advice`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from l2v.data.balance import Cost
from l2v.model.fused import Recompute
from l2v.model.memory import ExecutionMode, TailMemory
from l2v.recipe import Recipe, Stage


@dataclass(frozen=True)
class Question:
    """A stage about to train.

    examples, config: of the stage and of its base. per_node: ranks on a machine. micro_tokens: of the recipe, or fewer if memory
    ran out before. may_choose: whether micro_tokens may be lowered; not in a run that resumes, which keeps its sums' order.
    free: bytes for activations on the rank with least. mode, end: how layers run, and the end of a forward by its tokens.
    """

    recipe: Recipe
    name: str
    stage: Stage
    examples: Any
    config: Any
    dtype: torch.dtype
    world: int
    per_node: int
    micro_tokens: int
    may_choose: bool
    free: int
    mode: ExecutionMode
    end: Callable[[int], TailMemory]


@dataclass(frozen=True)
class Advice:
    """cost: by which ranks are balanced, default: tokens. recompute: None if memory alone decides. lines: to log."""

    cost: Cost | None
    recompute: Recompute | None
    micro_tokens: int
    lines: list[str]


Advise = Callable[[Question], Advice]
