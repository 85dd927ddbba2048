"""The rows of one file as they are written, whatever its form, each with its location for messages."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from l2v.data.decoding import text_lines
from l2v.data.find import kind_of
from l2v.data.reading import Reading
from l2v.data.tables import is_table, layout, read_table
from l2v.data.text import check_text, parse
from l2v.errors import UserError, first_line

WRAPPERS = ("data", "rows", "texts", "items", "examples")
FIRST = 100  # rows of a JSONL file from which its columns are collected
Row = tuple[str, dict[str, Any]]
Opened = Callable[[BinaryIO], object]


def read_rows(
    path: Path,
    shown: str,
    reading: Reading | None = None,
    *,
    whole: bool = False,
    opened: Opened | None = None,
    only: Collection[str] | None = None,
) -> Iterator[Row]:
    """All rows of a file in order; `shown` is its name in messages.

    reading: counts what cannot be read and other encodings. whole: a text file is one row, not a row a line. opened:
    receives the file that is open, to measure progress. only: of Parquet, read just these columns, where it has any.

    Raises:
        UserError: for what cannot be read (rows: unless `reading` keeps going).
    """
    reading = reading or Reading()
    kind = kind_of(path)
    if kind == "table":
        yield from read_table(path, shown, reading, opened)
    elif kind == "lines":
        yield from _json_lines(path, shown, reading, opened)
    elif kind == "json":
        yield from _json(path, shown, reading, opened)
    elif kind == "parquet":
        yield from _parquet(path, shown, opened, only)
    elif kind == "workbook":
        from l2v.data.workbook import read_workbook

        yield from read_workbook(path, shown, reading)
    else:
        yield from _text(path, shown, reading, whole, opened)


def columns(path: Path, shown: str) -> tuple[list[str], bool]:
    """The columns of a file, and whether the list is complete: for JSON, only the first rows are read."""
    kind = kind_of(path)
    if kind == "table":
        return layout(path, shown).names, True
    if kind == "text":
        return ["text"], True
    if kind == "parquet":
        return _parquet_file(path, shown).schema_arrow.names, True
    if kind == "workbook":
        from l2v.data.workbook import header

        return header(path, shown), True
    # A row that cannot be read is reported by what reads all of them.
    first = itertools.islice(read_rows(path, shown, Reading(keep_going=True)), FIRST)
    return list(dict.fromkeys(key for _, row in first for key in row)), False


def delimiter(path: Path, shown: str) -> str | None:
    """The delimiter of a table; None for a file of another kind."""
    return layout(path, shown).delimiter if is_table(path) else None


def _text(path: Path, shown: str, reading: Reading, whole: bool, opened: Opened | None) -> Iterator[Row]:
    lines = text_lines(path, shown, reading, opened)
    if whole:
        yield shown, {"text": "".join(lines).strip()}
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{shown}, line {number}", {"text": line.strip()}


def _json_lines(
    path: Path, shown: str, reading: Reading, opened: Opened | None, lines: Iterator[str] | None = None
) -> Iterator[Row]:
    for number, line in enumerate(lines or text_lines(path, shown, reading, opened), start=1):
        if not line.strip():
            continue
        where = f"{shown}, line {number}"
        try:
            row = parse(line, where)
        except UserError as error:
            reading.lose(error)
            continue
        yield where, row


def _json(path: Path, shown: str, reading: Reading, opened: Opened | None) -> Iterator[Row]:
    """A list of objects (or of texts), an object that holds one such list, or an object a line."""
    lines = text_lines(path, shown, reading, opened)
    first = next((line for line in lines if line.strip()), "")
    if not first:
        return
    second = next((line for line in lines if line.strip()), "")
    if second.lstrip().startswith("{") and _is_json(first) and first.lstrip().startswith("{"):
        # Blank lines before the second object are rare; then the numbers of the lines are too small by those.
        yield from _json_lines(path, shown, reading, opened, itertools.chain([first, second], lines))
        return
    try:
        tree = json.loads("".join([first, second, *lines]))
    except json.JSONDecodeError as error:
        raise UserError(f"{shown}, line {error.lineno}: malformed JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown}: not readable as JSON: {first_line(error)}") from None
    items = tree
    if isinstance(tree, dict):
        # A list of objects, or of texts under the usual names: another list of texts is a field of the one row.
        lists = [
            value
            for key, value in tree.items()
            if isinstance(value, list) and ((value and isinstance(value[0], dict)) or key in WRAPPERS)
        ]
        if len(lists) != 1 and second:
            raise UserError(f"{shown}: one JSON object; give a list of objects, or one object a line (.jsonl)")
        items = lists[0] if len(lists) == 1 else [tree]
    for number, item in enumerate(items, start=1):
        where = f"{shown}, item {number}"
        row = {"text": item} if isinstance(item, str) else item
        try:
            if not isinstance(row, dict):
                raise UserError(f"{where}: an item is an object of fields, or a text; found {type(item).__name__}")
            check_text(row, where)
        except UserError as error:
            reading.lose(error)
            continue
        yield where, row


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parquet_file(path: Path, shown: str, stream: BinaryIO | None = None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(stream or path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shown}: not a readable Parquet file: {first_line(error)}") from None


def _parquet(path: Path, shown: str, opened: Opened | None, only: Collection[str] | None) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    with open(path, "rb") as stream:
        if opened:
            opened(stream)
        file = _parquet_file(path, shown, stream)
        wanted = [name for name in file.schema_arrow.names if name in only] if only else []
        batches = file.iter_batches(batch_size=256, columns=wanted or None)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{shown}: cannot be read to the end: {first_line(error)}") from None
            if batch is None:
                return
            for row in batch.to_pylist():
                number += 1
                yield f"{shown}, row {number}", row
