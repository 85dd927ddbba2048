"""Rows of an evaluation file: JSONL (also .gz), CSV, TSV or Parquet; invalid rows are skipped, counted and reported."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2v.errors import UserError, first_line

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")


@dataclass
class Rows:
    """Valid rows in file order, the number of skipped ones, and where and why the first was skipped."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0
    first: str = ""

    def note(self) -> str | None:
        """One sentence on the skipped rows."""
        rows = "1 row" if self.dropped == 1 else f"{self.dropped} rows"
        return f"{rows} skipped, the first at {self.first}" if self.dropped else None


def read_rows(path: Path, texts: Sequence[str], others: Sequence[str] = ()) -> Rows:
    """Read a file whose rows need every field of `texts` as text that is not empty, and every field of `others`.

    Raises:
        UserError: if the file does not exist, has another suffix, or has no valid row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    out = Rows()
    for at, row in _parsed(path):
        trouble = row if isinstance(row, str) else _trouble(row, texts, others)
        if trouble is None:
            out.rows.append(row)
        else:
            out.dropped += 1
            out.first = out.first or f"{path}:{at}: {trouble}"
    if not out.rows:
        raise UserError(out.first or f"{path}: has no rows")
    return out


def digest(paths: Sequence[Path], facts: Any) -> str:
    """A hash of the bytes of the files and of the facts."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in paths:
        with open(path, "rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:16]


def _trouble(row: Any, texts: Sequence[str], others: Sequence[str]) -> str | None:
    if not isinstance(row, dict):
        return "not a JSON object"
    for key in (*texts, *others):
        if row.get(key) is None:
            near = ", ".join(map(str, row)) or "none"
            return f"has no '{key}' (its fields: {near})"
    for key in texts:
        if not isinstance(row[key], str) or not row[key].strip():
            return f"'{key}' is not a text, or empty"
    return None


def _parsed(path: Path) -> Iterator[tuple[int, Any]]:
    """Line (or Parquet row) number and row; for a row that cannot be parsed, the reason as text."""
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as Parquet: {first_line(error)}") from None
    elif name.endswith((".csv", ".tsv")):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from None
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if name.endswith(".tsv") else ",")
        yield from ((reader.line_num, row) for row in reader)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        try:
            with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
                for at, line in enumerate(file, 1):
                    if line.strip():
                        yield at, _json(line)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
    else:
        raise UserError(f"{path}: does not end in one of {', '.join(ENDINGS)}")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValueError:
        return "not JSON"
