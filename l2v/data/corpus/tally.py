"""What happened to every record and row: counts by source, and the first examples of each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

EXAMPLES = 3
SHOWN = 160
"""Largest number of characters of an example."""

REASONS = {
    "malformed": "not readable as a record, or a field is absent",
    "encoding": "bytes that are text in no known encoding",
    "redirect": "a page that only points to another one",
    "namespace": "a page that is not an article",
    "empty": "no text is left after cleaning",
    "not a pair": "a score of 0, or below min_score",
    "empty positive": "a pair without its positive",
    "empty query": "a pair without its query",
    "language": "in another language",
    "too short": "fewer words than the smallest length",
    "too long": "more words than the largest length",
    "leak, exact": "equals or contains an evaluation text",
    "leak, n-gram": "shares consecutive words with an evaluation text",
    "duplicate": "the same words as an earlier row",
    "near-duplicate": "nearly the same words as an earlier row",
}
"""Why something is dropped, in the order of the checks."""
RECORD_REASONS = ("malformed", "encoding", "redirect", "namespace", "empty", "not a pair")
LOST = ("malformed", "encoding")
"""Reasons that lie in a file and not in its texts."""
CHANGES = {
    "re-decoded": "not UTF-8, decoded as Windows-1252 (or as DOS or Mac text where that fits)",
    "mojibake": "UTF-8 that had been read as Windows-1252, repaired",
    "cleaned": "markup, spaces, control characters or Unicode forms changed",
    "negatives": "empty negatives, or negatives equal to the positive, removed",
}
"""What is repaired and kept."""


@dataclass
class Tally:
    """Counts of one source; `examples` are (where, text) in the order of the source."""

    records: int = 0
    made: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[list[str]]] = field(default_factory=dict)

    def drop(self, reason: str, where: str, text: str) -> None:
        """Count one dropped record or row."""
        self.dropped[reason] += 1
        self.show(reason, where, text)

    def change(self, what: str, where: str, text: str) -> None:
        """Count one repaired text."""
        self.changed[what] += 1
        self.show(what, where, text)

    def show(self, what: str, where: str, text: str) -> None:
        """Keep an example, up to EXAMPLES of each kind."""
        kept = self.examples.setdefault(what, [])
        if len(kept) < EXAMPLES:
            kept.append([where, shorten(text)])

    def add(self, other: Tally) -> None:
        """Add the counts of later records of the same source."""
        self.records += other.records
        self.made += other.made
        for own, more in ((self.dropped, other.dropped), (self.changed, other.changed), (self.kept, other.kept)):
            own.update(more)
        for what, found in other.examples.items():
            shown = self.examples.setdefault(what, [])
            shown += found[: EXAMPLES - len(shown)]

    @property
    def records_dropped(self) -> int:
        """Number of records that gave no row."""
        return sum(self.dropped[r] for r in RECORD_REASONS)

    @property
    def adds_up(self) -> bool:
        """Whether every row is either kept or dropped for exactly one reason."""
        rows = sum(n for r, n in self.dropped.items() if r not in RECORD_REASONS)
        return self.made == rows + sum(self.kept.values())

    def to_json(self) -> str:
        """As JSON text, for a chunk's file."""
        return json.dumps(self.plain(), ensure_ascii=False)

    def plain(self) -> dict:
        """As plain values."""
        return {
            "records": self.records,
            "made": self.made,
            "dropped": dict(self.dropped),
            "changed": dict(self.changed),
            "kept": dict(self.kept),
            "examples": self.examples,
        }

    @classmethod
    def from_json(cls, text: str) -> Tally:
        """The tally that `to_json` wrote."""
        v = json.loads(text)
        return cls(
            v["records"], v["made"], Counter(v["dropped"]), Counter(v["changed"]), Counter(v["kept"]), v["examples"]
        )


def shorten(text: str) -> str:
    """The start of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
