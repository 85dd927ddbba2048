"""How the sources of a stage are mixed: how often each is used, which examples share a batch, which pairs are swapped.

All of it is a function of (seed, epoch) or (seed, step, example), independent of ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from l2v.batch import mix
from l2v.errors import UserError
from l2v.recipe import Stage
from l2v.recipe.source import Source

# Different from each other and from the words that a plain epoch is drawn with.
CYCLE, MIX, POOLS, SWAP = 1, 2, 3, 4


@dataclass
class Mixture:
    """The sources of examples and how the recipe mixes them.

    members: for each source, its examples, int64. counts: how many of them an epoch uses. homogeneous: all examples of
    one loss come from one source. swap: for each source, whether query and positive may be exchanged.
    """

    members: list[np.ndarray]
    counts: list[int]
    homogeneous: bool
    swap: list[bool]
    notes: list[str] = field(default_factory=list)

    def pools(self, seed: int, epoch: int, size: int) -> list[np.ndarray]:
        """The examples of an epoch in pools of at most `size`, in order; with `homogeneous`, of one source each.

        A source is an endless sequence of permutations, drawn from (seed, source, cycle). An epoch takes the next `counts`
        examples of it, so no example is repeated before all others of its source were used, whatever the weight.
        """
        taken = [self._taken(seed, epoch, source) for source in range(len(self.members))]
        if not self.homogeneous:
            rows = np.concatenate(taken)
            rows = rows[draw(len(rows), seed, MIX, epoch)]
            return [rows[at : at + size] for at in range(0, len(rows), size)]
        pools = [pool for rows in taken for pool in np.array_split(rows, -(-len(rows) // size)) if len(rows)]
        return [pools[at] for at in draw(len(pools), seed, POOLS, epoch)]

    def count_pools(self, size: int) -> int:
        """How many pools every epoch has."""
        return sum(-(-n // size) for n in (self.counts if self.homogeneous else [sum(self.counts)]))

    def _taken(self, seed: int, epoch: int, source: int) -> np.ndarray:
        members, count = self.members[source], self.counts[source]
        parts, at, end = [members[:0]], epoch * count, (epoch + 1) * count
        while at < end:
            cycle, begin = divmod(at, len(members))
            order = members[draw(len(members), seed, CYCLE, source, cycle)]
            parts.append(order[begin : begin + end - at])
            at += len(parts[-1])
        return np.concatenate(parts)

    def swapped(self, example: int, seed: int, step: int) -> bool:
        """Whether query and positive of this example are exchanged in this step."""
        if not any(self.swap):
            return False
        return bool(self._swaps[example]) and mix(seed, step, example, SWAP) & 1 == 1

    def __post_init__(self) -> None:
        self._swaps = np.zeros(sum(map(len, self.members)), dtype=bool)
        for members, swap in zip(self.members, self.swap, strict=True):
            self._swaps[members] = swap


def draw(count: int, *address: int) -> np.ndarray:
    """A permutation of `count`, int64, drawn from a seed of several whole numbers.

    Uses raw Philox words, not Generator.permutation: numpy keeps only the former stable across versions, and a run that
    resumes after an upgrade must keep the same order.
    """
    return np.argsort(np.random.Philox(key=mix(*address)).random_raw(count), kind="stable")


def mix_sources(sources: Sequence[Source], sizes: Sequence[int], rows_of: np.ndarray, stage: Stage) -> Mixture | None:
    """The mixture that a stage's sources ask for; None if they are concatenated.

    sizes: rows of each source; rows_of: the row of every example.

    Raises:
        UserError: if homogeneous batches are asked for and an epoch uses only one example of a source.
    """
    homogeneous = getattr(stage, "homogeneous", False)
    if not homogeneous and not any(s.weight != 1 or s.swap for s in sources):
        return None
    source_of = np.searchsorted(np.cumsum(sizes), rows_of, side="right")
    members = [np.flatnonzero(source_of == at) for at in range(len(sources))]
    counts = [
        max(1, int(s.weight * len(own) + 0.5)) if len(own) else 0 for s, own in zip(sources, members, strict=True)
    ]
    for source, own, count in zip(sources, members, counts, strict=True):
        if homogeneous and len(own) and min(len(own), count) == 1:
            raise UserError(
                f"{source.path}: homogeneous batches need at least 2 examples of a source, and an epoch uses 1 of "
                f"{len(own)} (weight {source.weight:g}); add rows, raise the weight, or remove the source"
            )
    notes = [
        f"{source.path}: {len(own)} examples, weight {source.weight:g}: {count} of {sum(counts)} in an epoch "
        f"({100 * count / sum(counts):.1f}%)"
        for source, own, count in zip(sources, members, counts, strict=True)
    ]
    return Mixture(members, counts, homogeneous, [source.swap for source in sources], notes)
