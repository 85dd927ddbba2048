"""Which candidates become negatives: the positive-aware filter, and the choice among the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

REASONS = ("same text", "another positive", "same group", "too close")


@dataclass(frozen=True)
class Rule:
    """When a candidate scores too high to be a negative, and how many are taken.

    relative: above this share of the positive's score (0.95 is TopK-PercPos of Moreira et al. 2024, arXiv 2407.15831; a
    share of a negative score would be above it, so there the same distance is used). absolute: above the positive's score
    minus this (their TopK-MarginPos). None disables a rule.
    """

    number: int = 4
    relative: float | None = 0.95
    absolute: float | None = None

    def ceiling(self, positive: float) -> float:
        """The highest score that a negative of this positive may have."""
        limits = [float("inf")]
        if self.relative is not None:
            limits.append(positive - (1 - self.relative) * abs(positive))
        if self.absolute is not None:
            limits.append(positive - self.absolute)
        return min(limits)


def plain(text: str) -> str:
    """A text normalised for comparison: case and white space are ignored."""
    return " ".join(text.casefold().split())


@dataclass
class Known:
    """Documents that the pairs rule out as negatives: the positives of a query, and those of its group."""

    positives: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    groups: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def add(self, query: str, document: int, group: int) -> None:
        """One pair: its query, the number of its positive, its group or -1."""
        self.positives[plain(query)].add(document)
        if group >= 0:
            self.groups[group].add(document)

    def reason(self, query: str, own: int, group: int, document: int, texts: Sequence[str]) -> str | None:
        """Why a document cannot be a negative whatever its score; None if it can. texts: normalised by `plain`."""
        if document == own or texts[document] in (texts[own], plain(query)):
            return "same text"
        if document in self.positives[plain(query)] or texts[document] in {
            texts[other] for other in self.positives[plain(query)]
        }:
            return "another positive"
        if group >= 0 and document in self.groups[group]:
            return "same group"
        return None


def in_turn(lists: Iterable[Sequence[int]]) -> list[int]:
    """The first of each list, then the second of each, ... every number once, none below 0."""
    rows = [list(one) for one in lists]
    out: dict[int, None] = {}
    for rank in range(max(map(len, rows), default=0)):
        for one in rows:
            if rank < len(one) and one[rank] >= 0:
                out.setdefault(int(one[rank]))
    return list(out)


def choose(
    candidates: Sequence[int], scores: Sequence[float], positive: float, rule: Rule
) -> tuple[list[int], list[int]]:
    """Indices into `candidates`, which are in order of preference: those chosen, and those that are too close."""
    ceiling = rule.ceiling(positive)
    close = [at for at, score in enumerate(scores) if score > ceiling]
    below = [at for at, score in enumerate(scores) if score <= ceiling]
    return below[: rule.number], close
