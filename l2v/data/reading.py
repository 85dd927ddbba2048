"""What reading a source met besides its rows: rows and files that cannot be read, empty texts, other encodings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from l2v.errors import UserError

SHOWN = 5  # findings of a kind that are named
HALF = 0.5  # a source that loses a larger share of its rows is refused


@dataclass
class Reading:
    """The tally of one source.

    keep_going: drop and count rows and files that cannot be read, instead of raising.
    rows: rows that were read. lost, empty, below: rows that cannot be read, without a text, and below the smallest score.
    blanks: hard negatives without a text, which are dropped.
    files: files that cannot be read. encodings: of files that are not UTF-8: name and number of lines (None: all).
    examples: the first sentences of each kind.
    """

    keep_going: bool = False
    rows: int = 0
    lost: int = 0
    empty: int = 0
    below: int = 0
    files: int = 0
    blanks: int = 0
    encodings: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lose(self, error: UserError, *, file: bool = False, rows: int = 1) -> None:
        """Count rows (or a whole file) that cannot be read; raises `error` unless `keep_going`.

        rows: how many are lost with it; a quote that is never closed takes all that follow.
        """
        if not self.keep_going:
            raise error
        self.files += file
        self.lost += 0 if file else rows
        self.example("files" if file else "lost", str(error))

    def example(self, kind: str, sentence: str) -> None:
        """Keep a sentence, if it is among the first of its kind."""
        kept = self.examples.setdefault(kind, [])
        if len(kept) < SHOWN:
            kept.append(sentence)

    def decoded(self, shown: str, encoding: str, lines: int | None) -> None:
        """Count lines of a file that are not UTF-8; None for the whole file."""
        before = self.encodings.get(shown, (encoding, 0))[1]
        self.encodings[shown] = (encoding, None if lines is None or before is None else before + lines)

    def note(self, sentence: str) -> None:
        """Keep a sentence to log, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def merge(self, other: Reading) -> None:
        """Add what reading another source met."""
        for key in ("rows", "lost", "empty", "below", "files", "blanks"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.encodings |= other.encodings
        self.unread |= other.unread
        for kind, examples in other.examples.items():
            for example in examples:
                self.example(kind, example)
        for sentence in other.notes:
            self.note(sentence)

    def sentences(self, path: str) -> list[str]:
        """What to log, a sentence each; `path` is the source's name in the recipe."""
        out = list(self.notes)
        several = len(self.encodings) - SHOWN
        for shown, (encoding, lines) in list(self.encodings.items())[:SHOWN]:
            part = "" if lines is None else f" ({_count(lines, 'line')})"
            out.append(f"{shown}: not valid UTF-8, read as {encoding}{part}")
        if several > 0:
            out.append(f"{path}: {_count(several, 'more file')} not UTF-8")
        for kind, count, what in (
            ("files", self.files, "file that cannot be read"),
            ("lost", self.lost, "row that cannot be read"),
            ("empty", self.empty, "row with an empty text"),
            ("below", self.below, "row below the smallest score"),
        ):
            if count:
                first = self.examples.get(kind)
                noun, _, rest = what.partition(" ")
                out.append(
                    f"{path}: {_count(count, noun)} {rest} skipped" + (f", the first: {first[0]}" if first else "")
                )
        if self.blanks:
            out.append(f"{path}: {_count(self.blanks, 'empty hard negative')} dropped")
        return out

    def check(self, path: str) -> None:
        """Refuse a source that lost more than half of its rows or files.

        Raises:
            UserError: it did; the message has the first reason.
        """
        lost, all_rows = self.lost, self.rows + self.lost
        first = next(iter(self.examples.get("lost") or self.examples.get("files") or [""]))
        if lost > HALF * all_rows:
            raise UserError(f"{path}: {lost} of {_count(all_rows, 'row')} cannot be read; the first: {first}")
        if self.files and not all_rows:
            raise UserError(f"{path}: {_count(self.files, 'file')} cannot be read; the first: {first}")

    def facts(self) -> dict[str, Any]:
        """The tally as plain values, for `of`."""
        return asdict(self)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Reading:
        """The tally that `facts` wrote."""
        facts = dict(facts)
        facts["encodings"] = {key: (name, lines) for key, (name, lines) in facts["encodings"].items()}
        return cls(**facts)


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names with commas, at most `most` of them and the number of the others."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
