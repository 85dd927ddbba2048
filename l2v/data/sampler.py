"""Which examples a step trains on, on which rank, in which micro-batch: a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from l2v.data.mixture import Mixture, draw
from l2v.errors import UserError


@dataclass
class Unit:
    """Examples of one loss, split into micro-batches; an empty micro-batch keeps ranks in step."""

    micros: list[list[int]]

    @property
    def examples(self) -> list[int]:
        return [i for micro in self.micros for i in micro]


@dataclass
class StepPlan:
    """The work of one optimizer step. units[rank] is the work of a rank; counts are equal on all ranks."""

    step: int
    epoch: float
    units: list[list[Unit]]

    @property
    def examples(self) -> list[int]:
        """All examples of the step, of every rank."""
        return [i for units in self.units for unit in units for i in unit.examples]


class Sized(Protocol):
    """What a sampler needs from examples; it also uses `mixture` if they have one."""

    @property
    def lengths(self) -> np.ndarray: ...


class Sampler:
    """Deterministic, token-balanced batches.

    Every epoch is a permutation drawn from (seed, epoch); its last batch may be short, so that no example is lost or
    repeated. With a mixture (`l2v.data.mixture`), an epoch uses the rows of a source as often as its weight says and,
    with `homogeneous`, consists of pools (a batch, or a group of one) of one source, of nearly equal sizes. Ranks get
    shares of nearly equal tokens and cut them into micro-batches of at most `micro_tokens` tokens. Each rank computes the
    plan of all ranks, so nothing has to be communicated.
    """

    def __init__(
        self, examples: Sized, *, batch: int, micro_tokens: int, seed: int, world: int = 1, group: int | None = None
    ) -> None:
        self.lengths, self.batch, self.micro_tokens = examples.lengths, batch, micro_tokens
        self.seed, self.world, self.group = seed, world, group
        self.mixture: Mixture | None = getattr(examples, "mixture", None)
        pools = self.mixture.count_pools(group or batch) if self.mixture else -(-len(self.lengths) // (group or batch))
        self.steps_per_epoch = -(-pools // (batch // (group or batch)))
        self._epoch: tuple[int, list[np.ndarray]] | None = None
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > micro_tokens:
            raise UserError(
                f"example {longest} has {self.lengths[longest]} tokens (all its texts) and micro_tokens is {micro_tokens}; "
                "raise micro_tokens or lower length"
            )

    def plan(self, step: int) -> StepPlan:
        """The plan of a step, counted from 0."""
        epoch, at = divmod(step, self.steps_per_epoch)
        per_step = self.batch // (self.group or self.batch)
        pools = [pool.tolist() for pool in self._pools(epoch)[at * per_step : (at + 1) * per_step]]
        if self.group is None:
            shares = [[Unit(self._split(share))] for share in self._balance([[i] for pool in pools for i in pool])]
        else:
            shares = [[Unit(self._split(one)) for one in share] for share in self._balance(pools, flat=False)]
        for units in shares:  # equal numbers on all ranks, or collectives would hang
            units.extend(Unit([[]]) for _ in range(max(map(len, shares)) - len(units)))
        for column in zip(*shares, strict=True):
            most = max(len(unit.micros) for unit in column)
            for unit in column:
                unit.micros.extend([] for _ in range(most - len(unit.micros)))
        return StepPlan(step, epoch + (at + 1) / self.steps_per_epoch, shares)

    def _pools(self, epoch: int) -> list[np.ndarray]:
        """The examples of an epoch, in pools of one loss each."""
        if self._epoch is None or self._epoch[0] != epoch:
            size = self.group or self.batch
            if self.mixture:
                pools = self.mixture.pools(self.seed, epoch, size)
            else:
                order = draw(len(self.lengths), self.seed, epoch)
                pools = [order[at : at + size] for at in range(0, len(order), size)]
            self._epoch = (epoch, pools)
        return self._epoch[1]

    def _balance(self, items: Sequence[list[int]], flat: bool = True) -> list[list]:
        """Longest first to the rank with the fewest tokens; within a rank, the order of the batch."""
        tokens = [int(self.lengths[item].sum()) for item in items]
        load, owner = [0] * self.world, [0] * len(items)
        for at in sorted(range(len(items)), key=lambda i: (-tokens[i], i)):
            owner[at] = min(range(self.world), key=lambda r: (load[r], r))
            load[owner[at]] += tokens[at]
        shares = [[item for item, rank in zip(items, owner, strict=True) if rank == r] for r in range(self.world)]
        return [[i for item in share for i in item] for share in shares] if flat else shares

    def _split(self, share: list[int]) -> list[list[int]]:
        micros: list[list[int]] = [[]]
        room = self.micro_tokens
        for i in share:
            need = int(self.lengths[i])
            if micros[-1] and need > room:
                micros.append([])
                room = self.micro_tokens
            micros[-1].append(i)
            room -= need
        return micros
