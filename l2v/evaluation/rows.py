"""Rows of an evaluation file of any readable form; invalid rows are skipped, counted and reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2v.data import raw
from l2v.data.find import kind_of
from l2v.data.reading import Reading
from l2v.errors import UserError


@dataclass
class Rows:
    """Valid rows in file order, the number of skipped ones, where and why the first was skipped, and other notes."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    first: str = ""
    notes: list[str] = field(default_factory=list)

    def note(self) -> str | None:
        """What to report about the file, in one line."""
        rows = "1 row" if self.dropped == 1 else f"{self.dropped} rows"
        skipped = [f"{rows} skipped, the first at {self.first}"] if self.dropped else []
        return "; ".join([*skipped, *self.notes]) or None


def read_rows(path: Path, texts: Sequence[str], others: Sequence[str] = ()) -> Rows:
    """Read a file whose rows need every field of `texts` as text that is not empty, and every field of `others`.

    Raises:
        UserError: if the file does not exist, is of an unknown type, or has no valid row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind_of(path)
    out, reading = Rows(), Reading(keep_going=True)
    for where, row in raw.read_rows(path, str(path), reading):
        if trouble := _trouble(row, texts, others):
            out.dropped += 1
            out.first = out.first or f"{where}: {trouble}"
        else:
            out.rows.append(row)
    if reading.lost:
        out.dropped += reading.lost
        out.first = reading.examples["lost"][0]
    if not out.rows:
        raise UserError(out.first or f"{path}: has no rows")
    reading.lost = 0
    out.notes = reading.sentences(str(path))
    return out


def digest(paths: Sequence[Path], facts: Any) -> str:
    """A hash of the bytes of the files and of the facts."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in paths:
        with open(path, "rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


def _trouble(row: dict[str, Any], texts: Sequence[str], others: Sequence[str]) -> str | None:
    for key in (*texts, *others):
        if row.get(key) is None:
            near = ", ".join(map(str, row)) or "none"
            return f"has no '{key}' (its fields: {near})"
    for key in texts:
        if not isinstance(row[key], str) or not row[key].strip():
            return f"'{key}' is not a text, or empty"
    return None
