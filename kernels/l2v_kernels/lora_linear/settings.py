"""What one call of the op works on, besides tensors that flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l2v_kernels.philox import keep_scale, threshold

MAX_ADAPTERS = 3
"""As many adapters as the kernels take on one input: q, k and v."""


@dataclass(frozen=True)
class Adapter:
    """LoRA on one of the linears of a group: its output += scaling * dropout(x) A^T B^T."""

    part: int
    """Which of the group's linears."""
    a_RE: torch.Tensor
    b_NR: torch.Tensor
    scaling: float = 1.0
    stream: int = 0
    """Which dropout this is (see `l2v_kernels.dropout`)."""

    @property
    def rank(self) -> int:
        """R"""
        return self.a_RE.shape[0]


@dataclass(frozen=True)
class Noise:
    """Dropout of the adapters' input. p: drop probability, rounded to 1/256; seeds_T int64 and rows_T int32 or int64 [T]:
    every token's address (see `l2v_kernels.dropout`)."""

    p: float = 0.0
    seeds_T: torch.Tensor | None = None
    rows_T: torch.Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return threshold(self.p) > 0

    @property
    def scale(self) -> float:
        """The factor of what is kept."""
        return keep_scale(self.p)


def rank_slices(adapters: tuple[Adapter, ...]) -> list[slice]:
    """Where each adapter's columns stand in xa [T, sum of ranks]."""
    slices, at = [], 0
    for adapter in adapters:
        slices.append(slice(at, at + adapter.rank))
        at += adapter.rank
    return slices
