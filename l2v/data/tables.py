"""CSV and TSV files: UTF-8 with or without a byte order mark; comma, semicolon or tab; quotes with line breaks inside."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from l2v.errors import UserError

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
MAX_FIELD = 1 << 26  # characters; an unclosed quote fails here instead of at the end of the file
SAMPLE = 1 << 20  # characters from which the delimiter is detected
SAMPLE_ROWS = 200
MAX_NAME = 100  # characters; a longer "column name" is text, so the header is missing
BROKEN = (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError)


@dataclass(frozen=True)
class Layout:
    """How a table is written: its delimiter, and the columns of its header ("" for one without a name)."""

    delimiter: str
    header: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The columns that have a name; a column without one (an index, a trailing delimiter) is ignored."""
        return [name for name in self.header if name]


def is_table(path: str | Path) -> bool:
    """Whether the file name ends as CSV or TSV, plain or gzipped."""
    return str(path).lower().endswith(SUFFIXES)


def layout(path: str | Path, shown: str) -> Layout:
    """The delimiter and the header of a table; `shown` is its name in messages.

    The delimiter is the one that gives the header more than one column and most of the first rows as many fields.

    Raises:
        UserError: for an empty file, a file without a header, a column named twice, and text that is not UTF-8.
    """
    try:
        with _open(path) as stream:
            sample = stream.read(SAMPLE)
    except BROKEN as error:
        raise _unreadable(path, shown, error) from None
    if not sample.strip():
        raise UserError(f"{shown}: the file is empty; a table begins with a line of column names")
    candidates = sorted(DELIMITERS, key=lambda d: d != "\t") if ".tsv" in str(path).lower() else list(DELIMITERS)
    found = {delimiter: _fit(sample, delimiter) for delimiter in candidates}
    delimiter = max(found, key=lambda d: found[d][:2])  # on a tie the first wins
    header = tuple(name.strip() for name in found[delimiter][2])
    _check_header(header, shown)
    return Layout(delimiter, header)


def read_table(path: str | Path, shown: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table in order, each with its location ("FILE, line N", where the row begins) for messages.

    Only the current row is in memory. Rows without any text are skipped.

    Raises:
        UserError: as `layout` does, and for a row with more or fewer fields than the header or an unclosed quote.
    """
    how = layout(path, shown)
    csv.field_size_limit(MAX_FIELD)
    begins = 1
    try:
        with _open(path) as stream:
            rows = csv.reader(stream, delimiter=how.delimiter, strict=True)
            header_read = False
            for fields in rows:
                begins, line = rows.line_num + 1, begins
                if not any(field.strip() for field in fields):
                    continue
                if not header_read:
                    header_read = True
                    continue
                if len(fields) != len(how.header):
                    raise UserError(_uneven(f"{shown}, line {line}", len(fields), how))
                row = {name: field for name, field in zip(how.header, fields, strict=True) if name}
                yield f"{shown}, line {line}", row
    except BROKEN as error:
        raise _unreadable(path, shown, error) from None
    except csv.Error as error:
        raise UserError(f"{shown}, line {begins}: {_quote_trouble(error)}") from None


def _open(path: str | Path) -> TextIO:
    if str(path).lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _fit(sample: str, delimiter: str) -> tuple[bool, float, list[str]]:
    """How well a delimiter fits: whether the header has several columns, the share of rows that agree; and the header."""
    csv.field_size_limit(MAX_FIELD)
    header: list[str] | None = None
    agree = total = 0
    try:
        for fields in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True):
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = fields
                continue
            total += 1
            agree += len(fields) == len(header)
            if total == SAMPLE_ROWS:
                break
    except csv.Error:
        # The last row may be cut off by the sample; one row in many makes no difference.
        total += 1
    if header is None:
        return False, 0.0, [sample.splitlines()[0]]
    return len(header) > 1, agree / total if total else 1.0, header


def _check_header(header: tuple[str, ...], shown: str) -> None:
    names = [name for name in header if name]
    if not names or any("\n" in n or "\r" in n or len(n) > MAX_NAME or _is_number(n) for n in names):
        raise UserError(f"{shown}, line 1: no header; the first line of a table names its columns")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{shown}, line 1: the column '{twice}' appears twice in the header; rename one of them")


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _uneven(where: str, count: int, how: Layout) -> str:
    columns = f"{len(how.header)} column" + "s" * (len(how.header) != 1)
    return (
        f"{where}: {count} field{'s' * (count != 1)} where the header has {columns}; a text that holds a "
        f"{DELIMITERS[how.delimiter]} or a line break must be in double quotes"
    )


def _quote_trouble(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end" in text or "field larger" in text:
        return "a quote is opened here and never closed; close it, or double a quote inside a text"
    if "expected after" in text:
        return "a quote is closed before its field ends; double a quote inside a text"
    return f"not readable as CSV: {text}"


def _unreadable(path: str | Path, shown: str, error: Exception) -> UserError:
    """The error for bytes that are not UTF-8, with their line, or for a damaged archive."""
    if not isinstance(error, UnicodeDecodeError):
        return UserError(f"{shown}: cannot be read to the end: {error}")
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return UserError(f"{shown}: the file is UTF-16; save it as UTF-8")
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as wrong:
                byte = line[wrong.start : wrong.start + 1]
                means = byte.decode("cp1252", "replace")
                return UserError(
                    f"{shown}, line {number}: not UTF-8 (byte 0x{byte.hex()}, which is '{means}' in Windows-1252); save the "
                    "file as UTF-8"
                )
    return UserError(f"{shown}: not readable as UTF-8 text: {error}")
