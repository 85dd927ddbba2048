"""Raw records of a source, in order: lines, rows, pages, stanzas. The workers parse them.

A record is (where, payload): `where` names it in messages ("file, line 7"), the payload is bytes, text (with surrogates for
bytes that are not UTF-8), a mapping of columns, or the error of a record that cannot be read. Only the current record is in
memory, so a source may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from l2v.data import find, raw
from l2v.data.columns import absent, guess
from l2v.data.corpus.config import Format, Input
from l2v.data.decoding import BROKEN, open_bytes, plain_name, text_lines
from l2v.data.reading import Reading
from l2v.data.tables import read_table
from l2v.errors import UserError, first_line

Record = tuple[str, bytes | str | dict[str, Any] | UserError]
FORMATS: dict[str, Format] = {
    "table": "csv", "lines": "jsonl", "json": "json", "parquet": "parquet", "workbook": "excel", "text": "text",
}  # fmt: skip
GUESSED = {"pairs": ("query", "positive", "negatives", "score"), "documents": ("text",), "sentences": ("text",)}


def find_files(path: str, folder: str | None) -> list[Path]:
    """The files of a path, sorted: a file, a glob, or the readable files of a folder.

    Raises:
        UserError: if there are none.
    """
    full = Path(folder or ".").expanduser() / Path(path).expanduser()
    if full.is_file():
        return [full]
    try:
        return find.find_files(path, folder or ".")
    except UserError as error:
        hint = "" if folder or Path(path).is_absolute() or full.is_dir() else "; is `folder` set?"
        raise UserError(f"{error}{hint}") from None


def format_of(source: Input, file: Path) -> Format:
    """The format that a source names, or that of the file name."""
    if source.format != "auto":
        return source.format
    if plain_name(file).endswith(".xml"):
        return "mediawiki"
    try:
        return FORMATS[find.kind_of(file)]
    except UserError as error:
        raise UserError(f"{error}, or name its `format`") from None


def resolve(source: Input, folder: str | None, kind: str) -> tuple[Input, list[str]]:
    """The source with its format and columns, or its Hub revision, looked up; and sentences on guessed columns.

    Raises:
        UserError: if it does not exist, or has no column for a text of a row.
    """
    if not source.path.startswith("hub:"):
        files = find_files(source.path, folder)
        if source.format == "auto" and len({format_of(source, file) for file in files}) == 1:
            source = replace(source, format=format_of(source, files[0]))
        return _with_columns(source, files, kind)
    name = source.path.removeprefix("hub:")
    if source.revision or Path(name).exists():
        return source, []
    import huggingface_hub

    try:  # a restart must read the same rows, even after a push to the hub
        return replace(source, revision=huggingface_hub.HfApi().dataset_info(name).sha), []
    except Exception as error:  # the hub library raises what its transports raise
        raise UserError(f"{source.path}: the Hub data set cannot be loaded: {first_line(error)}") from None


def _with_columns(source: Input, files: list[Path], kind: str) -> tuple[Input, list[str]]:
    """Columns that the source does not name and its first file lacks, guessed by their names."""
    if format_of(source, files[0]) not in ("csv", "jsonl", "json", "parquet", "excel"):
        return source, []
    named = FORMATS[find.kind_of(files[0])] if find.is_readable(files[0]) else None
    if named != format_of(source, files[0]):  # the source names the format of a file with another ending
        return source, []
    names, complete = raw.columns(files[0], source.path)
    chosen: dict[str, str] = {}
    for key in GUESSED[kind]:
        if key in source.columns or key in names:
            continue
        taken = {*source.columns.values(), *chosen.values()}
        if column := guess(key, [name for name in names if name not in taken]):
            chosen[key] = column
    columns = source.columns | chosen
    for key in GUESSED[kind]:
        column = columns.get(key, key)
        may_lack = key in ("negatives", "score") and key not in source.columns
        if complete and column not in names and not may_lack and "*" not in column:
            raise UserError(absent(source.path, column, names))
    said = ", ".join(f"{key}: {column}" for key, column in chosen.items())
    notes = [f"{source.path}: columns guessed by their names: {said} (a column that you name wins)"] if said else []
    return replace(source, columns=columns), notes


@dataclass
class _Lost(Reading):
    """Errors of rows that cannot be read, which become records of their own."""

    keep_going: bool = True
    waiting: list[UserError] = field(default_factory=list)

    def lose(self, error: UserError, *, file: bool = False, rows: int = 1) -> None:
        self.waiting += [error] * rows


class Reader:
    """The records of one source; `progress` is the share that has been read, from 0 to 1, or None."""

    def __init__(self, source: Input, folder: str | None) -> None:
        self.source = source
        self.hub = source.path.startswith("hub:")
        self.files = [] if self.hub else find_files(source.path, folder)
        self.mixed = source.format == "auto" and len({format_of(source, file) for file in self.files}) > 1
        self.sizes = [file.stat().st_size for file in self.files]
        self._raw: BinaryIO | None = None
        self._at, self._rows, self._total = 0, 0, None

    def stamp(self) -> list[list[Any]]:
        """Names, sizes and times of the files, to detect edits."""
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]

    def progress(self) -> float | None:
        """The share of the bytes (files) or rows (hub) that has been read."""
        if self.hub:
            return min(1.0, self._rows / self._total) if self._total else None
        done = sum(self.sizes[: self._at])
        if self._raw is not None and not self._raw.closed:
            done += self._raw.tell()
        return min(1.0, done / max(1, sum(self.sizes)))

    def __iter__(self) -> Iterator[Record]:
        for number, record in enumerate(self._hub() if self.hub else self._all(), start=1):
            yield record
            if number == self.source.limit:
                return

    def _all(self) -> Iterator[Record]:
        for at, file in enumerate(self.files):
            self._at = at
            # A mixture of files has no single format that the workers could parse.
            how = "parsed" if self.mixed else format_of(self.source, file)
            shown = self.source.path if len(self.files) == 1 else file.name
            try:
                yield from getattr(self, f"_{how}")(file, shown)
            except BROKEN as error:
                raise UserError(f"{shown}: cannot be read to the end: {error}") from None

    def _opened(self, raw: BinaryIO) -> None:
        """Keep the file as it is on the disk for `progress`."""
        self._raw = raw

    def _jsonl(self, file: Path, shown: str) -> Iterator[Record]:
        for number, line in enumerate(text_lines(file, shown, None, self._opened, escape=True), start=1):
            if line.strip():
                yield f"{shown}, line {number}", line.rstrip("\r\n")

    _text = _jsonl

    def _csv(self, file: Path, shown: str) -> Iterator[Record]:
        lost = _Lost()
        yield from self._with_lost(read_table(file, shown, lost, self._opened, escape=True), lost)

    def _parsed(self, file: Path, shown: str) -> Iterator[Record]:
        lost, named = _Lost(), {*self.source.columns.values(), *FIELD_NAMES}
        only = (
            None if any(name.endswith("*") for name in named) else named
        )  # a pattern stands for columns not known here
        yield from self._with_lost(raw.read_rows(file, shown, lost, opened=self._opened, only=only), lost)

    _json = _parquet = _excel = _parsed

    def _with_lost(self, rows: Iterator[tuple[str, dict[str, Any]]], lost: _Lost) -> Iterator[Record]:
        while True:
            record = next(rows, None)
            for error in lost.waiting:
                yield str(error).partition(": ")[0], error
            lost.waiting.clear()
            if record is None:
                return
            yield record

    def _mediawiki(self, file: Path, shown: str) -> Iterator[Record]:
        with open_bytes(file, self._opened) as stream:
            try:
                yield from pages(stream, shown)
            except ElementTree.ParseError as error:
                raise UserError(f"{shown}: not a MediaWiki dump from here on: {error}") from None

    def _debian(self, file: Path, shown: str) -> Iterator[Record]:
        first = 0
        stanza: list[bytes] = []
        with open_bytes(file, self._opened) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    first = first if stanza else number
                    stanza.append(line)
                elif stanza:
                    yield f"{shown}, line {first}", b"".join(stanza)
                    stanza = []
            if stanza:
                yield f"{shown}, line {first}", b"".join(stanza)

    def _hub(self) -> Iterator[Record]:
        import datasets

        source, name = self.source, self.source.path.removeprefix("hub:")
        try:
            rows = datasets.load_dataset(
                name, source.name, split=source.split, revision=source.revision, streaming=True
            )
            info = (rows.info.splits or {}).get(source.split)
            self._total = min(filter(None, (info and info.num_examples, source.limit)), default=None)
            for self._rows, row in enumerate(rows, start=1):
                yield f"{source.path}, row {self._rows}", row
        except UserError:
            raise
        except Exception as error:  # the hub library raises what its transports raise
            raise UserError(f"{source.path}: the Hub data set cannot be loaded: {first_line(error)}") from None


FIELD_NAMES = (
    "id", "text", "query", "positive", "negatives", "group", "document", "section", "title", "url", "instruction",
    "document_instruction", "score",
)  # fmt: skip


def pages(stream: BinaryIO, shown: str) -> Iterator[Record]:
    """Pages of a MediaWiki XML dump (export schema 0.10 and 0.11) one by one: title, namespace, redirect, wikitext.

    Each element is cleared once it is read, so memory is bounded by the largest page.
    """
    root: ElementTree.Element | None = None
    page: dict[str, Any] = {}
    number = 0
    for event, element in ElementTree.iterparse(stream, events=("start", "end")):
        if event == "start":
            root = element if root is None else root
            continue
        tag = element.tag.rpartition("}")[2]
        if tag in ("title", "ns", "text"):
            page[tag] = element.text or ""
        elif tag == "redirect":
            page["redirect"] = element.get("title", "")
        elif tag == "id" and "id" not in page:  # the page's id comes before that of its revision
            page["id"] = element.text or ""
        elif tag == "page":
            number += 1
            yield f"{shown}, page {number}", page
            page = {}
            if root is not None:
                root.clear()
