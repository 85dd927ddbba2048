"""Divide the examples of a step among ranks and micro-batches, so that no rank waits long for another.

Everything here is arithmetic on lengths, the same on every rank and without random numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np

EXCHANGES_PER_RANK = 2
"""Exchanges that `even_out` tries, for every rank; each is a search over all pairs of examples."""
NEAR = 0.005
"""Differences of predicted time below this share are ignored."""


class Cost(Protocol):
    """Predicted time of work on one rank, in any unit (`l2v.model.cost`)."""

    def weights(self, tokens_N: np.ndarray, squares_N: np.ndarray) -> np.ndarray:
        """Of every example, as if work had no steps. squares_N: sums of squared lengths of its texts."""
        ...

    def times(self, tokens_N: np.ndarray, squares_N: np.ndarray) -> np.ndarray:
        """Of micro-batches. It may rise in steps, as GEMMs do whose tiles fill a GPU in waves."""
        ...


def longest_first(weights_N: Sequence[int] | np.ndarray, world: int) -> np.ndarray:
    """The rank of every example, int64 [N]: the heaviest first, to the rank that has least (Graham 1969, LPT)."""
    owner_N = np.zeros(len(weights_N), dtype=np.int64)
    ranks: list[tuple[float, int]] = [(0, rank) for rank in range(world)]
    for at in np.argsort(-np.asarray(weights_N), kind="stable"):
        load, rank = ranks[0]
        owner_N[at] = rank
        heapq.heapreplace(ranks, (load + weights_N[at], rank))
    return owner_N


def even_out(
    owner_N: np.ndarray, tokens_N: np.ndarray, squares_N: np.ndarray, world: int, cost: Cost, limit: int
) -> np.ndarray:
    """Exchange examples while that lowers the time of the slowest rank, for times that rise in steps. Returns owners, int64 [N].

    Equal tokens are not equal times: a few tokens more may begin another wave of tiles. limit: tokens of a micro-batch; ranks
    that need several keep what they have, since a step is then a small part of their time.
    """
    owner_N = owner_N.copy()
    load_R = np.bincount(owner_N, tokens_N, world)
    square_R = np.bincount(owner_N, squares_N, world)
    if load_R.max() > limit:
        return owner_N
    # No assignment is faster than one in which every rank has the mean.
    bound = cost.times(np.array([load_R.sum() / world]), np.array([square_R.sum() / world]))[0] * (1 + NEAR)
    for _ in range(EXCHANGES_PER_RANK * world):
        time_R = cost.times(load_R, square_R)
        slow = int(time_R.argmax())
        if time_R[slow] <= bound:
            break
        mine, theirs = np.flatnonzero(owner_N == slow), np.flatnonzero(owner_N != slow)
        if not len(theirs):
            break
        ranks = owner_N[theirs]
        tokens_MN = tokens_N[mine][:, None] - tokens_N[theirs]
        squares_MN = squares_N[mine][:, None] - squares_N[theirs]
        here_MN = cost.times(load_R[slow] - tokens_MN, square_R[slow] - squares_MN)
        there_MN = cost.times(load_R[ranks] + tokens_MN, square_R[ranks] + squares_MN)
        worst_MN = np.where(load_R[ranks] + tokens_MN <= limit, np.maximum(here_MN, there_MN), np.inf)
        at = int(worst_MN.argmin())
        if worst_MN.flat[at] >= time_R[slow] * (1 - NEAR):
            break
        own, other = mine[at // len(theirs)], theirs[at % len(theirs)]
        owner_N[[own, other]] = owner_N[[other, own]]
        load_R = np.bincount(owner_N, tokens_N, world)
        square_R = np.bincount(owner_N, squares_N, world)
    return owner_N


def in_order(share: Sequence[int], lengths: np.ndarray, limit: int) -> list[list[int]]:
    """Micro-batches of at most `limit` tokens in the order of the batch, each as full as the next example allows."""
    micros: list[list[int]] = [[]]
    room = limit
    for i in share:
        need = int(lengths[i])
        if micros[-1] and need > room:
            micros.append([])
            room = limit
        micros[-1].append(i)
        room -= need
    return micros


def last_full(share: Sequence[int], lengths: np.ndarray, limit: int, count: int = 1) -> list[list[int]]:
    """Micro-batches of at most `limit` tokens, at least `count`: the last ones are full, the first has the rest.

    A gradient cache encodes every micro-batch but the last twice, so the last should be as large as possible. All ranks need
    equally many micro-batches; one that has fewer gives an example to each that is missing, if it has enough.
    """
    micros = [micro[::-1] for micro in in_order(list(reversed(share)), lengths, limit)[::-1]]
    while len(micros) < count:
        most = max(micros, key=len)
        micros.insert(0, [most.pop(0)] if len(most) > 1 else [])
    return micros
