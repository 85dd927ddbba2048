"""CSV and TSV files: comma, semicolon or tab; quotes with line breaks inside; encodings and compression of `decoding`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from l2v.data.decoding import plain_name, text_lines
from l2v.data.reading import Reading, listed
from l2v.errors import UserError

SUFFIXES = (".csv", ".tsv", ".tab")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
MAX_FIELD = 1 << 26  # characters; an unclosed quote fails here instead of at the end of the file
SAMPLE = 1 << 20  # characters from which the delimiter is detected
SAMPLE_ROWS = 200
MAX_NAME = 100  # characters; a longer "column name" is text, so the header is missing
_SEP = re.compile(r"\s*\"?sep=(.)\"?\s*")  # Excel's own first line, which names the delimiter


@dataclass(frozen=True)
class Layout:
    """How a table is written: its delimiter, the columns of its header ("" for one without a name), lines before it."""

    delimiter: str
    header: tuple[str, ...]
    before: int = 0

    @property
    def names(self) -> list[str]:
        """The columns that have a name; a column without one (an index, a trailing delimiter) is ignored."""
        return [name for name in self.header if name]


def is_table(path: str | Path) -> bool:
    """Whether the file name ends as CSV or TSV, also compressed."""
    return plain_name(path).endswith(SUFFIXES)


def layout(path: str | Path, shown: str) -> Layout:
    """The delimiter and the header of a table; `shown` is its name in messages.

    The delimiter is the one that gives the header more than one column and most of the first rows as many fields, or the
    one that a first line `sep=;` names.

    Raises:
        UserError: for an empty file, a file without a header, a column named twice, and what is not text.
    """
    lines = text_lines(path, shown)
    sample = ""
    for line in lines:
        sample += line
        if len(sample) > SAMPLE:
            break
    lines.close()
    named, before = None, 0
    if match := _SEP.fullmatch(sample.partition("\n")[0]):
        named, before, sample = match[1], 1, sample.partition("\n")[2]
    if not sample.strip():
        raise UserError(f"{shown}: the file is empty; a table begins with a line of column names")
    candidates = sorted(DELIMITERS, key=lambda d: d != "\t") if is_tabbed(path) else list(DELIMITERS)
    found = {delimiter: _fit(sample, delimiter) for delimiter in ([named] if named else candidates)}
    delimiter = max(found, key=lambda d: found[d][:2])  # on a tie the first wins
    header = tuple(name.strip() for name in found[delimiter][2])
    check_header(header, f"{shown}, line {before + 1}")
    return Layout(delimiter, header, before)


def is_tabbed(path: str | Path) -> bool:
    """Whether the file name says that a tab is the delimiter."""
    return plain_name(path).endswith((".tsv", ".tab"))


def read_table(
    path: str | Path,
    shown: str,
    reading: Reading | None = None,
    opened: Callable[[BinaryIO], object] | None = None,
    *,
    escape: bool = False,
) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table in order, each with its location ("FILE, line N", where the row begins) for messages.

    Only the current row is in memory. Rows without any text are skipped. reading: counts what cannot be read. escape: as
    for `text_lines`.

    Raises:
        UserError: as `layout` does, and (unless `reading` keeps going) for a row with more or fewer fields than the header
            or an unclosed quote.
    """
    how, reading = layout(path, shown), reading or Reading()
    csv.field_size_limit(MAX_FIELD)
    lines = text_lines(path, shown, reading, opened, escape=escape)
    for _ in range(how.before):
        next(lines)
    rows = csv.reader(lines, delimiter=how.delimiter, strict=True)
    begins = ends = how.before
    header_read = False
    while True:
        begins = ends + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            taken = max(1, rows.line_num + how.before - begins + 1)
            reading.lose(UserError(f"{shown}, line {begins}: {_quote_trouble(error)}"), rows=taken)
            fields = []
        ends = rows.line_num + how.before
        if fields is None:
            return
        if not any(field.strip() for field in fields):
            continue
        if not header_read:
            header_read = True
            continue
        if len(fields) != len(how.header):
            reading.lose(UserError(_uneven(f"{shown}, line {begins}", len(fields), how)))
            continue
        yield f"{shown}, line {begins}", {name: field for name, field in zip(how.header, fields, strict=True) if name}


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


def check_header(header: tuple[str, ...], where: str) -> None:
    """Check that the first line of a table names its columns.

    Raises:
        UserError: for a line of text or numbers, and for a name that appears twice.
    """
    names = [name for name in header if name]
    if not names or any("\n" in n or "\r" in n or len(n) > MAX_NAME or _is_number(n) for n in names):
        raise UserError(f"{where}: no header; the first line of a table names its columns")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{where}: the column '{twice}' appears twice in the header ({listed(names)}); rename one of them"
        )


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
        f"{DELIMITERS.get(how.delimiter, how.delimiter)} or a line break must be in double quotes"
    )


def _quote_trouble(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end" in text or "field larger" in text:
        return "a quote is opened here and never closed; close it, or double a quote that belongs to the text"
    if "expected after" in text:
        return "a quote is closed before its field ends; double a quote that belongs to the text"
    return f"not readable as CSV: {text}"
