"""Excel workbooks: the first sheet that is visible and holds text is a table whose first row names the columns."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l2v.data.reading import Reading, listed
from l2v.data.tables import check_header
from l2v.errors import UserError, first_line


def header(path: Path, shown: str) -> list[str]:
    """The columns of a workbook's first sheet.

    Raises:
        UserError: as `read_workbook`.
    """
    return [name for name in next(_rows(path, shown, Reading()))[1] if name]


def read_workbook(path: Path, shown: str, reading: Reading | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a workbook's first sheet, each with its location ("FILE, row N"), every cell as text.

    A formula gives the value that Excel stored. Rows without any text are skipped. reading: receives a note on sheets that
    are not read.

    Raises:
        UserError: openpyxl is not installed, the file is no workbook, or its first row does not name the columns.
    """
    rows = _rows(path, shown, reading or Reading())
    _, names = next(rows)
    for number, cells in rows:
        if any(cells):
            cells += [""] * (len(names) - len(cells))
            row = {name: cell for name, cell in zip(names, cells, strict=False) if name}
            yield f"{shown}, row {number}", row


def _rows(path: Path, shown: str, reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each row; the first is the header."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"{shown}: Excel workbooks need openpyxl: pip install 'l2v[excel]', or save it as .csv"
        ) from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl raises what its parser meets
        raise UserError(f"{shown}: not a readable Excel workbook: {first_line(error)}") from None
    try:
        visible = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible"]
        for sheet in visible:
            sheet.reset_dimensions()  # other programs write a wrong range, and rows outside it would be lost
        filled = [sheet for sheet in visible if any(map(_text, itertools.chain(*sheet.iter_rows(values_only=True))))]
        if not filled:
            raise UserError(f"{shown}: the workbook is empty; its first row names the columns")
        if others := [sheet.title for sheet in book.worksheets if sheet is not filled[0]]:
            reading.note(f"{shown}: only its sheet '{filled[0].title}' is read, not {listed(others, 3)}")
        begun = False
        for number, values in enumerate(filled[0].iter_rows(values_only=True), start=1):
            cells = [_text(value) for value in values]
            if not begun and any(cells):
                begun = True
                check_header(tuple(cells), f"{shown}, row {number}")
            if begun:
                yield number, cells
    finally:
        book.close()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value).strip()
