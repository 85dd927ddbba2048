"""Which examples a step trains on, on which rank, in which micro-batch: a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from l2v.data.balance import Cost, even_out, in_order, last_full, longest_first
from l2v.data.mixture import Mixture, draw
from l2v.errors import UserError

SCANNED_STEPS = 64
"""Steps that are searched for the largest micro-batch."""
Pool = list[int]
"""Examples of one loss."""


@dataclass
class Unit:
    """Examples that are embedded before their loss is computed, in micro-batches; an empty one keeps ranks in step."""

    micros: list[list[int]]

    @property
    def examples(self) -> list[int]:
        return [i for micro in self.micros for i in micro]


@dataclass
class StepPlan:
    """The work of one optimizer step. units[rank] is the work of a rank; counts are equal on all ranks.

    losses: for every unit the groups whose losses are computed from the embeddings of all ranks. Empty without groups, where
    a unit's examples of all ranks share one loss, and on one rank, where each group is a unit.
    """

    step: int
    epoch: float
    units: list[list[Unit]]
    losses: list[list[Pool]] = field(default_factory=list)

    @property
    def examples(self) -> list[int]:
        """All examples of the step, of every rank."""
        return [i for units in self.units for unit in units for i in unit.examples]

    def owned(self, rank: int, unit: int) -> list[int]:
        """The groups of a unit, by their number in `losses`, whose losses a rank computes; empty without `losses`."""
        return list(range(rank, len(self.losses[unit]), len(self.units))) if self.losses else []


class Sized(Protocol):
    """What a sampler needs from examples; it also uses `mixture`, and `squares` or `segments`, if they have them."""

    @property
    def lengths(self) -> np.ndarray: ...


class Sampler:
    """Deterministic, balanced batches.

    Every epoch is a permutation drawn from (seed, epoch); its last batch may be short, so that no example is lost or
    repeated. With a mixture (`l2v.data.mixture`), an epoch uses the rows of a source as often as its weight says and,
    with `homogeneous`, consists of pools (a batch, or a group of one) of one source, of nearly equal sizes. Ranks get
    shares of nearly equal cost, default: of nearly equal tokens, and cut them into micro-batches of at most `micro_tokens`
    tokens. Each rank computes the plan of all ranks, so nothing has to be communicated.

    group: examples of one loss. On several ranks all of them embed a part of every group. cost: must be the same on all ranks.
    """

    def __init__(
        self, examples: Sized, *, batch: int, micro_tokens: int, seed: int, world: int = 1, group: int | None = None,
        cost: Cost | None = None,
    ) -> None:  # fmt: skip
        self.lengths, self.batch, self.micro_tokens = examples.lengths, batch, micro_tokens
        self.seed, self.world, self.group, self.cost = seed, world, group, cost
        self.squares = squares_of(examples)
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
        losses: list[list[Pool]] = []
        if self.world == 1:
            groups = pools if self.group else [[i for pool in pools for i in pool]]
            units = [[Unit(in_order(pool, self.lengths, self.micro_tokens)) for pool in groups]]
        else:
            losses = self._rounds(pools)
            columns = [self._spread([i for pool in part for i in pool]) for part in losses]
            units = [list(share) for share in zip(*columns, strict=True)]
        return StepPlan(step, epoch + (at + 1) / self.steps_per_epoch, units, losses if self.group else [])

    def largest_micro_batch(self, steps: int) -> int:
        """Tokens of the largest micro-batch of any rank in `steps` steps, or in SCANNED_STEPS of them, evenly spaced."""
        found = 1
        for step in sorted({round(at) for at in np.linspace(0, steps - 1, min(steps, SCANNED_STEPS))}):
            micros = (micro for units in self.plan(step).units for unit in units for micro in unit.micros)
            found = max(found, *(int(self.lengths[micro].sum()) for micro in micros if micro))
        return found

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

    def _rounds(self, pools: list[Pool]) -> list[list[Pool]]:
        """Groups that are embedded together: as many as fit one micro-batch on every rank, so that none is encoded twice."""
        tokens = [int(self.lengths[pool].sum()) for pool in pools]
        fewest = max(1, min(len(pools), -(-sum(tokens) // (self.world * self.micro_tokens))))
        for count in range(fewest, len(pools)):
            parts = [list(map(int, part)) for part in np.array_split(np.arange(len(pools)), count)]
            chosen = [[i for at in part for i in pools[at]] for part in parts]
            if all(self._busiest(examples) <= self.micro_tokens for examples in chosen):
                return [[pools[at] for at in part] for part in parts]
        return [[pool] for pool in pools]

    def _busiest(self, examples: Sequence[int]) -> int:
        """Tokens of the rank with most if these examples are divided."""
        return int(np.bincount(self._owners(examples), self.lengths[list(examples)], self.world).max())

    def _owners(self, examples: Sequence[int]) -> np.ndarray:
        """The rank of each of these examples, int64."""
        tokens_N, squares_N = self.lengths[list(examples)], self.squares[list(examples)]
        if self.cost is None:
            return longest_first(tokens_N, self.world)
        owner_N = longest_first(self.cost.weights(tokens_N, squares_N), self.world)
        return even_out(owner_N, tokens_N, squares_N, self.world, self.cost, self.micro_tokens)

    def _spread(self, examples: list[int]) -> list[Unit]:
        """Examples divided among the ranks, a unit each; within a rank they keep the order of the batch."""
        owners = self._owners(examples)
        shares = [[i for i, owner in zip(examples, owners, strict=True) if owner == r] for r in range(self.world)]
        most = max(len(last_full(share, self.lengths, self.micro_tokens)) for share in shares)
        # Equal numbers on all ranks, or collectives would hang.
        return [Unit(last_full(share, self.lengths, self.micro_tokens, most)) for share in shares]


def squares_of(examples: Sized) -> np.ndarray:
    """Sum of the squared lengths of every example's texts, float64; without `squares` its texts count as equally long."""
    found = getattr(examples, "squares", None)
    if found is None:
        found = examples.lengths.astype(np.float64) ** 2 / getattr(examples, "segments", 1)
    return found
