"""The rows of data files as chunks of texts, the same chunks in every process and after every restart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2v.data import raw
from l2v.data.columns import absent, settle
from l2v.data.decoding import text_lines
from l2v.data.find import find_files, kind_of, left_out
from l2v.data.reading import Reading
from l2v.errors import UserError
from l2v.recipe.source import Source

CHUNK_ROWS = 4096
CHUNK_LETTERS = 500_000  # of text and kept fields; about what a small model encodes in a minute on a CPU
IDS = ("id", "_id", "ID", "Id")
_NUMBER = re.compile(r", (?:line|row|item) (\d+)$")


@dataclass(frozen=True)
class Input:
    """What is encoded. file: a file, folder or glob. column: the field with the text; `text` may be guessed.

    id: the field that names a row (default: the first of `IDS` that it has). kept: the fields that go with the vectors;
    None for all, () for none. reserved: a name that no kept field may have, because the vectors have it. empty: `error`,
    `zeros` or `skip`, as for `Encoder.encode`.
    """

    file: str
    column: str = "text"
    id: str | None = None
    kept: tuple[str, ...] | None = ()
    reserved: str | None = None
    empty: str = "error"


@dataclass
class Chunk:
    """Consecutive rows. texts: None for an empty one. places: file, row (line, row or item, from 1) and id of each row.

    types: the Arrow schema of the kept fields where their file states one, else None.
    """

    number: int
    texts: list[str | None] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[dict[str, Any]] = field(default_factory=list)
    types: Any = None
    letters: int = 0


@dataclass(frozen=True)
class Row:
    """One row of a file. text: None if it is empty."""

    text: str | None
    fields: dict[str, Any]
    place: dict[str, Any]
    types: Any = None


def chunks(given: Input, notes: list[str] | None = None) -> Iterator[Chunk]:
    """The rows of all files as chunks of at most `CHUNK_ROWS` rows and about `CHUNK_LETTERS` letters.

    notes: receives what a user should know: guessed columns, files of other types, other encodings, skipped rows.

    Raises:
        UserError: a row cannot be read, has no such column, or holds no text or an empty one; the message names the line.
    """
    chunk = Chunk(0)
    for row in _rows(given, [] if notes is None else notes):
        full = len(chunk.texts) == CHUNK_ROWS or chunk.letters >= CHUNK_LETTERS
        if chunk.texts and (full or row.types != chunk.types):
            yield chunk
            chunk = Chunk(chunk.number + 1)
        chunk.texts.append(row.text)
        chunk.rows.append(row.fields)
        chunk.places.append(row.place)
        chunk.types = row.types
        chunk.letters += sum(len(v) for v in (row.text, *row.fields.values()) if isinstance(v, str | bytes))
    if chunk.texts:
        yield chunk


@dataclass(frozen=True)
class Scan:
    """What a first pass over the files found. files: name and SHA-256 of each; stamps: see `stamps`; notes: sentences for
    the user.
    """

    rows: int
    chunks: int
    files: tuple[tuple[str, str], ...]
    stamps: tuple[tuple[str, int, int], ...]
    notes: tuple[str, ...]


def scan(given: Input, progress: Callable[[int], object] = lambda rows: None) -> Scan:
    """Read all rows once, so that a mistake in the last line is reported before a model is loaded.

    progress: called with the number of rows of each chunk.

    Raises:
        UserError: as `chunks`; or there is no row.
    """
    notes: list[str] = []
    rows = number = 0
    before = stamps(given.file)
    for chunk in chunks(given, notes):
        rows, number = rows + len(chunk.texts), chunk.number + 1
        progress(len(chunk.texts))
    if not rows:
        raise UserError(f"{given.file}: holds no text to encode")
    files = tuple((file.name, _sha256(file)) for file in find_files(given.file))
    return Scan(rows, number, files, before, tuple(notes))


def stamps(path: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size in bytes and time of the last change (ns) of each file, to notice that one changes."""
    stats = [(file.name, file.stat()) for file in find_files(path)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The text in a field, without white space around it; "" for null.

    Raises:
        UserError: the row lacks the field, or holds something else in it.
    """
    if column not in row:
        raise UserError(absent(where, column, row))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: the field '{column}' is text; found {type(text).__name__}")
    return (text or "").strip()


def place_of(row: dict[str, Any], where: str, shown: str, id: str | None = None) -> dict[str, Any]:
    """file, row (its line, row or item from 1; None where it has none) and id (None for none) of a row.

    Raises:
        UserError: `id` names a field that the row lacks.
    """
    if id is not None and id not in row:
        raise UserError(absent(where, id, row))
    number = _NUMBER.search(where)
    own = row[id] if id is not None else next((row[key] for key in IDS if row.get(key) is not None), None)
    return {"file": shown, "row": int(number[1]) if number else None, "id": None if own is None else str(own)}


def _rows(given: Input, notes: list[str]) -> Iterator[Row]:
    files, reading = find_files(given.file), Reading()
    if sentence := left_out(given.file):
        reading.note(sentence)
    skipped = 0
    for file in files:
        shown = given.file if len(files) == 1 and Path(given.file).expanduser().is_file() else str(file)
        for row in _of_file(file, shown, given, reading):
            if row.text is None and given.empty == "skip":
                skipped += 1
            else:
                yield row
    notes += reading.sentences(given.file)
    if skipped:
        notes.append(f"{given.file}: {skipped:,} row{'s' * (skipped != 1)} with an empty text skipped")


def _of_file(file: Path, shown: str, given: Input, reading: Reading) -> Iterator[Row]:
    names, complete = raw.columns(file, shown)
    choice = settle(Source(path=shown, text=given.column), names, "documents")
    if note := choice.note():
        reading.note(note)
    column, kept = choice.source.text, given.kept
    for name in (column, *(kept or ()), *([given.id] if given.id else ())) if complete else ():
        if name not in names:
            raise UserError(absent(shown, name, names))
    only = None if kept is None else {column, *kept, *([given.id] if given.id else IDS)}
    types = _types(file, kept) if kind_of(file) == "parquet" else None
    lines = kind_of(file) == "text"
    for where, row in _lines(file, shown, reading) if lines else raw.read_rows(file, shown, reading, only=only):
        text = text_of(row, column, where)
        if not text and given.empty == "error":
            raise UserError(
                f"{where}: '{column}' is empty, and an empty text has no embedding; --empty zeros gives it a vector of zeros, "
                "--empty skip drops the row"
            )
        _check_encodable(text, column, where)
        if missing := [name for name in kept or () if name not in row]:
            raise UserError(absent(where, missing[0], row))
        fields = dict(row) if kept is None else {name: row[name] for name in kept}
        if given.reserved in fields:
            raise UserError(
                f"{where}: has a field '{given.reserved}' already; name that of the vectors otherwise (--vector-column NAME)"
            )
        yield Row(text or None, fields, place_of(row, where, shown, given.id), types)


def _lines(file: Path, shown: str, reading: Reading) -> Iterator[raw.Row]:
    """All lines of a text file, blank ones as empty texts: without them vectors would not match lines."""
    for number, line in enumerate(text_lines(file, shown, reading), start=1):
        yield f"{shown}, line {number}", {"text": line.strip()}


def _types(file: Path, kept: tuple[str, ...] | None) -> Any:
    """The Arrow schema of a Parquet file's kept fields, so that they keep their types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(file).remove_metadata()
    return pa.schema([schema.field(name) for name in (schema.names if kept is None else kept)])


def _check_encodable(text: str, column: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: '{column}' holds half of a surrogate pair, which is no text") from None


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
