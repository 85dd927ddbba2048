"""What one call of the op needs besides x: the adapters and their dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l2v_kernels.philox import keep_scale, threshold

MAX_ADAPTERS = 3
"""Adapters that one launch of the kernels computes on one input: q, k and v."""


@dataclass(frozen=True)
class Adapter:
    """LoRA on one of the linears of a group: its output += scaling * dropout(x) A^T B^T."""

    part: int
    """Which of the group's linears."""
    a_RE: torch.Tensor
    b_OR: torch.Tensor
    scaling: float = 1.0
    stream: int = 0
    """Which dropout of the model this is (see `l2v_kernels.dropout`)."""

    @property
    def rank(self) -> int:
        """R, the rank of this adapter."""
        return self.a_RE.shape[0]


@dataclass(frozen=True)
class InputDropout:
    """Counter-based (Philox) dropout of the adapters' input.

    p: drop probability, rounded to 1/256. seeds_T int64 [T] and rows_T int32 or int64 [T]: the seed of each token's segment
    and its position there (see `l2v_kernels.dropout`); needed where p > 0.
    """

    p: float = 0.0
    seeds_T: torch.Tensor | None = None
    rows_T: torch.Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return threshold(self.p) > 0

    @property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(seeds_T, rows_T); only where they are given."""
        assert self.seeds_T is not None and self.rows_T is not None
        return self.seeds_T, self.rows_T

    @property
    def scale(self) -> float:
        """The factor of what is kept, 256 / (256 - threshold(p))."""
        return keep_scale(self.p)


def rank_slices(adapters: tuple[Adapter, ...]) -> list[slice]:
    """Each adapter's columns in xa [T, sum of ranks]."""
    slices, at = [], 0
    for adapter in adapters:
        slices.append(slice(at, at + adapter.rank))
        at += adapter.rank
    return slices
