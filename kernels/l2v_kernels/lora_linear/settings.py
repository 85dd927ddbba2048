"""What one call of the op needs besides x: the adapters and their dropout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from l2v_kernels.launching import power_of_2
from l2v_kernels.lora_linear.frozen import stacked_view
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

    @cached_property
    def threshold(self) -> int:
        """p in steps of 1/256."""
        return threshold(self.p)

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.threshold > 0

    @property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(seeds_T, rows_T); only where they are given."""
        assert self.seeds_T is not None and self.rows_T is not None
        return self.seeds_T, self.rows_T

    @cached_property
    def scale(self) -> float:
        """The factor of what is kept, 256 / (256 - threshold(p))."""
        return keep_scale(self.p)


class Adapters(tuple[Adapter, ...]):
    """The adapters of a group, with what a call asks of them worked out once.

    Build it again when a matrix moves to other memory; values may change in place.
    """

    @classmethod
    def of(cls, adapters: Iterable[Adapter]) -> Adapters:
        """The same adapters; itself if it is one."""
        return adapters if isinstance(adapters, cls) else cls(adapters)

    @cached_property
    def ranks(self) -> int:
        """The sum of their ranks: width of xa [T, sum of ranks]."""
        return sum(a.rank for a in self)

    @cached_property
    def slices(self) -> list[slice]:
        """Each adapter's columns in xa [T, sum of ranks]."""
        slices, at = [], 0
        for adapter in self:
            slices.append(slice(at, at + adapter.rank))
            at += adapter.rank
        return slices

    @cached_property
    def sizes(self) -> tuple[list[int], list[int]]:
        """Number of elements of each A, and of each B."""
        return [a.a_RE.numel() for a in self], [a.b_OR.numel() for a in self]

    @cached_property
    def triples(self) -> list[Adapters]:
        """Adapters by as many as one launch of the kernels computes."""
        if len(self) <= MAX_ADAPTERS:
            return [self]
        return [Adapters(self[i : i + MAX_ADAPTERS]) for i in range(0, len(self), MAX_ADAPTERS)]

    @cached_property
    def outputs(self) -> list[int]:
        """O of each."""
        return [a.b_OR.shape[0] for a in self]

    @cached_property
    def streams(self) -> list[int]:
        """The dropout stream of each, and 0 up to `MAX_ADAPTERS`, as kernels take them."""
        return [a.stream for a in self] + [0] * (MAX_ADAPTERS - len(self))

    @cached_property
    def padded_ranks(self) -> list[int]:
        """The rank of each, and 0 up to `MAX_ADAPTERS`."""
        return [a.rank for a in self] + [0] * (MAX_ADAPTERS - len(self))

    @cached_property
    def block_r(self) -> int:
        """Columns of a kernel's tile that holds the largest rank. tl.dot needs sides of at least 16."""
        return max(16, power_of_2(max(self.padded_ranks)))

    def starts(self, sizes: tuple[int, ...]) -> list[int]:
        """Where each one's columns begin in y [T, O], and 0 up to `MAX_ADAPTERS`. sizes: O of each linear of the group."""
        if self._starts[0] != sizes:
            found = [sum(sizes[: a.part]) for a in self]
            self._starts = sizes, found + [0] * (MAX_ADAPTERS - len(self))
        return self._starts[1]

    _starts: tuple[tuple[int, ...], list[int]] = (), []

    def factors(self, dropout: InputDropout) -> list[float]:
        """scaling * the dropout's scale of each, and 0 up to `MAX_ADAPTERS`."""
        scale = dropout.scale
        return [a.scaling * scale for a in self] + [0.0] * (MAX_ADAPTERS - len(self))

    @cached_property
    def runs(self) -> list[Adapters]:
        """Neighbours of one rank, by as many as one launch of the kernels computes."""
        by_rank = itertools.groupby(self, lambda a: a.rank)
        return [triple for _, run in by_rank for triple in Adapters(run).triples]

    @cached_property
    def _a_view(self) -> torch.Tensor | None:
        return _contiguous_view([a.a_RE for a in self])

    @cached_property
    def _b_view(self) -> torch.Tensor | None:
        return _contiguous_view([a.b_OR for a in self])

    def stacked_a(self) -> torch.Tensor:
        """All A, one below the other: [sum of ranks, E]; copied only if they do not lie so in memory."""
        return self._a_view if self._a_view is not None else torch.cat([a.a_RE for a in self])

    def stacked_b(self) -> torch.Tensor:
        """All B of one rank, one below the other: [sum of outputs, R], likewise."""
        return self._b_view if self._b_view is not None else torch.cat([a.b_OR for a in self])


class PendingSum:
    """A gradient of which only partial sums exist, for the next launch that adds partial sums to add as well.

    One backward's groups share it, so that no group needs a launch for this alone; `launch.finish` adds the last.
    """

    def __init__(self) -> None:
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def __bool__(self) -> bool:
        return self._kept is not None

    def put(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        """out [n] is to become the sum of parts fp32 [J, n] over J. Nothing else may be pending."""
        assert self._kept is None
        self._kept = parts, out

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is pending, for whoever adds it; None if nothing is."""
        kept, self._kept = self._kept, None
        return kept


def _contiguous_view(matrices: list[torch.Tensor]) -> torch.Tensor | None:
    view = stacked_view(matrices)
    return view if view is not None and view.is_contiguous() else None
