"""The rows of one file as they are written: JSONL, CSV, TSV, Parquet or text, each with its location for messages."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l2v.data.tables import is_table, layout, read_table
from l2v.data.text import parse
from l2v.errors import UserError, first_line

LINES = (".jsonl", ".jsonl.gz", ".json", ".txt", ".txt.gz")
FIRST = 100  # rows of a JSONL file from which its columns are collected


def is_streamed(path: Path) -> bool:
    """Whether the file is read row by row here; False for Parquet, which `datasets` maps into memory by itself.

    Raises:
        UserError: for an unknown file type.
    """
    name = path.name.lower()
    if name.endswith(LINES) or is_table(name):
        return True
    if name.endswith(".parquet"):
        return False
    raise UserError(f"{path}: unknown file type '{path.suffix}'; use .csv, .tsv, .jsonl, .parquet or .txt")


def read_rows(path: Path, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows of a file in order; `shown` is its name in messages.

    Raises:
        UserError: for what cannot be read.
    """
    if is_table(path):
        yield from read_table(path, shown)
    elif is_streamed(path):
        yield from _lines(path, shown)
    else:
        yield from _parquet(path, shown)


def columns(path: Path, shown: str) -> tuple[list[str], bool]:
    """The columns of a file, and whether the list is complete: for JSONL, only the first rows are read."""
    if is_table(path):
        return layout(path, shown).names, True
    if _is_text(path):
        return ["text"], True
    if is_streamed(path):
        first = itertools.islice(_lines(path, shown), FIRST)
        return list(dict.fromkeys(key for _, row in first for key in row)), False
    return _parquet_file(path, shown).schema_arrow.names, True


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith((".txt", ".txt.gz"))


def _lines(path: Path, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    text = _is_text(path)
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{shown}, line {number}"
                    yield where, {"text": line.strip()} if text else parse(line, where)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{shown}: not readable as UTF-8 text: {error}") from None


def _parquet_file(path: Path, shown: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shown}: not a readable Parquet file: {first_line(error)}") from None


def _parquet(path: Path, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in _parquet_file(path, shown).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield f"{shown}, row {number}", row
