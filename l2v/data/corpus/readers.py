"""Raw records of a source, in order: lines, rows, pages, stanzas. The workers parse them.

A record is (where, payload): `where` names it in messages ("file, line 7"), the payload is bytes, text or a mapping of
columns. Only the current record is in memory, so a source may be larger than memory.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import glob
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from l2v.data.corpus.config import Format, Input
from l2v.errors import UserError, first_line

Record = tuple[str, bytes | str | dict[str, Any]]
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text",
    ".xml": "mediawiki",
}  # fmt: skip
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
WIDE = (b"\xff\xfe", b"\xfe\xff")


def find_files(path: str, folder: str | None, formats: str = "") -> list[Path]:
    """The files of a path: a file, a glob, or a folder of Parquet or JSONL files; sorted.

    Raises:
        UserError: if there are none.
    """
    full = Path(folder or ".").expanduser() / Path(path).expanduser()
    if full.is_file():
        return [full]
    if full.is_dir():
        for pattern in ("*.parquet", "*.jsonl", "*.jsonl.gz"):
            if found := sorted(full.glob(pattern)):
                return found
        raise UserError(f"{path}: the folder holds no .parquet, .jsonl or .jsonl.gz file")
    found = sorted(Path(p) for p in glob.glob(str(full)) if Path(p).is_file())
    if not found:
        hint = "" if folder else "; is `folder` set?" if not Path(path).is_absolute() else ""
        raise UserError(f"{path}: file not found{hint}")
    return found


def format_of(source: Input, file: Path) -> Format:
    """The format that a source names, or that of the file name."""
    if source.format != "auto":
        return source.format
    name = file.with_suffix("") if file.suffix in OPENERS else file
    if name.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UserError(f"{source.path}: unknown file type '{name.suffix}'; use one of {known}, or name its `format`")
    return SUFFIXES[name.suffix]


def resolve(source: Input, folder: str | None) -> Input:
    """The source with its format, or its Hub revision, looked up.

    Raises:
        UserError: if it does not exist.
    """
    if not source.path.startswith("hub:"):
        return replace(source, format=format_of(source, find_files(source.path, folder)[0]))
    name = source.path.removeprefix("hub:")
    if source.revision or Path(name).exists():
        return source
    import huggingface_hub

    try:  # a restart must read the same rows, even after a push to the hub
        return replace(source, revision=huggingface_hub.HfApi().dataset_info(name).sha)
    except Exception as error:  # the hub library raises what its transports raise
        raise UserError(f"{source.path}: the Hub data set cannot be loaded: {first_line(error)}") from None


class Reader:
    """The records of one source; `progress` is the share that has been read, from 0 to 1, or None."""

    def __init__(self, source: Input, folder: str | None) -> None:
        self.source = source
        self.hub = source.path.startswith("hub:")
        self.files = [] if self.hub else find_files(source.path, folder)
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
            how = format_of(self.source, file)
            shown = self.source.path if len(self.files) == 1 else file.name
            try:
                yield from getattr(self, f"_{how}")(file, shown)
            except BROKEN as error:
                raise UserError(f"{shown}: cannot be read to the end: {error}") from None

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[BinaryIO]:
        """Decompressed bytes; keeps the raw file for `progress`."""
        with open(file, "rb") as raw:
            self._raw = raw
            if file.suffix in OPENERS:
                with OPENERS[file.suffix](raw, "rb") as stream:
                    yield stream
            else:
                yield raw

    def _lines(self, file: Path, shown: str, *, whole: bool = False) -> Iterator[tuple[int, bytes]]:
        """Numbered lines that are not blank, without their ends; `whole`: every line as it stands."""
        with self._open(file) as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    if line.startswith(WIDE):
                        raise UserError(f"{shown}: the file is UTF-16; convert it to UTF-8 first")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if whole:
                    yield number, line
                elif line.strip():
                    yield number, line.rstrip(b"\r\n")

    def _jsonl(self, file: Path, shown: str) -> Iterator[Record]:
        for number, line in self._lines(file, shown):
            yield f"{shown}, line {number}", line

    _text = _jsonl

    def _csv(self, file: Path, shown: str) -> Iterator[Record]:
        # A byte that is not UTF-8 becomes a surrogate, so that the workers can decode the row in its own encoding.
        comma = "\t" if ".tsv" in file.suffixes else ","
        # Line ends stay: inside quotes they are part of the text, and without them its words would run together.
        lines = (line.decode("utf-8", "surrogateescape") for _, line in self._lines(file, shown, whole=True))
        rows = csv.DictReader(lines, delimiter=comma)
        try:
            for row in rows:
                yield f"{shown}, line {rows.line_num}", row
        except csv.Error as error:
            raise UserError(f"{shown}, line {rows.line_num}: not readable as CSV: {error}") from None

    def _parquet(self, file: Path, shown: str) -> Iterator[Record]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file)
            names = set(table.schema_arrow.names)
            wanted = [c for c in names if c in set(self.source.columns.values()) | set(FIELD_NAMES)]
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{shown}, row {number}", row
        except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
            raise UserError(f"{shown}: not a readable Parquet file: {first_line(error)}") from None

    def _mediawiki(self, file: Path, shown: str) -> Iterator[Record]:
        with self._open(file) as stream:
            try:
                yield from pages(stream, shown)
            except ElementTree.ParseError as error:
                raise UserError(f"{shown}: not a MediaWiki dump from here on: {error}") from None

    def _debian(self, file: Path, shown: str) -> Iterator[Record]:
        first = 0
        stanza: list[bytes] = []
        with self._open(file) as stream:
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
    "document_instruction",
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
