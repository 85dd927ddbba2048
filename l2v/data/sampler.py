"""Which examples a step trains on, on which rank, in which micro-batch: a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from l2v.batch import mix
from l2v.data.examples import Examples
from l2v.errors import UserError


@dataclass
class Unit:
    """Examples whose embeddings meet in one loss, split into micro-batches; an empty one keeps ranks in step."""

    micros: list[list[int]]

    @property
    def examples(self) -> list[int]:
        return [i for micro in self.micros for i in micro]


@dataclass
class StepPlan:
    """The work of one optimizer step. units[rank] is what a rank does; all ranks have equal numbers of everything."""

    step: int
    epoch: float
    units: list[list[Unit]]

    @property
    def examples(self) -> list[int]:
        """All that the step trains on, of every rank."""
        return [i for units in self.units for unit in units for i in unit.examples]


class Sampler:
    """Deterministic, token-balanced batches.

    Every epoch is a permutation drawn from (seed, epoch); its last batch may be short, so that no example is lost or seen
    twice. Ranks get shares of nearly equal tokens and cut them into micro-batches of at most `micro_tokens` tokens.
    Each rank computes the plan of all of them, so nothing has to be communicated.
    """

    def __init__(
        self, examples: Examples, *, batch: int, micro_tokens: int, seed: int, world: int = 1, group: int | None = None
    ) -> None:
        self.lengths, self.batch, self.micro_tokens = examples.lengths, batch, micro_tokens
        self.seed, self.world, self.group = seed, world, group
        self.steps_per_epoch = -(-len(self.lengths) // batch)
        self._permutation: tuple[int, np.ndarray] | None = None
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > micro_tokens:
            raise UserError(
                f"example {longest} has {self.lengths[longest]} tokens (all its texts) and micro_tokens is {micro_tokens}; "
                "raise micro_tokens or lower length"
            )

    def plan(self, step: int) -> StepPlan:
        """The plan of a step, counted from 0."""
        epoch, at = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[at * self.batch : (at + 1) * self.batch].tolist()
        if self.group is None:
            shares = [[Unit(self._split(share))] for share in self._balance([[i] for i in chosen])]
        else:
            groups = [chosen[i : i + self.group] for i in range(0, len(chosen), self.group)]
            shares = [[Unit(self._split(one)) for one in share] for share in self._balance(groups, flat=False)]
        for units in shares:  # equal numbers on all ranks, or collectives would hang
            units.extend(Unit([[]]) for _ in range(max(map(len, shares)) - len(units)))
        for column in zip(*shares, strict=True):
            most = max(len(unit.micros) for unit in column)
            for unit in column:
                unit.micros.extend([] for _ in range(most - len(unit.micros)))
        return StepPlan(step, epoch + (at + 1) / self.steps_per_epoch, shares)

    def _order(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            # Raw Philox words, not Generator.permutation: numpy promises only the former across its versions, and a run
            # that is resumed after an upgrade must go on in the same order.
            words = np.random.Philox(key=mix(self.seed, epoch)).random_raw(len(self.lengths))
            self._permutation = (epoch, np.argsort(words, kind="stable"))
        return self._permutation[1]

    def _balance(self, items: Sequence[list[int]], flat: bool = True) -> list[list]:
        """Longest first to the rank with the fewest tokens; within a rank the batch's own order."""
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
