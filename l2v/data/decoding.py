"""Bytes of a data file to lines of text: compression, byte order marks, UTF-16, and lines that are not UTF-8."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from l2v.data.reading import Reading
from l2v.errors import UserError, first_line

BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)
SAMPLE = 1 << 20  # bytes from which an encoding is detected
# Encodings of Danish text that are not UTF-8: Windows, DOS, and the Mac before 2001.
LEGACY = {"windows-1252": "Windows-1252", "cp850": "DOS code page 850", "mac_roman": "Mac OS Roman"}
DAMAGED = "UTF-8 with damaged letters"
LIKELY = frozenset("äöüÄÖÜéÉèêëóòôáàâíúßçñ–—‘’“”„…•€£§°«»´½·©®")
MAGIC = {
    b"PK\x03\x04": "a zip file or an Excel workbook; give an Excel workbook the ending .xlsx, unpack a zip file",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as .xlsx, .csv or .txt",
    b"%PDF": "a PDF file; save its text as .txt",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"\x1f\x8b": "compressed; give it the ending .gz",
    b"\x28\xb5\x2f\xfd": "compressed; give it the ending .zst",
}
_BREAKS = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class _Zstandard(io.RawIOBase):
    """A decompressed .zst file. pyarrow reads it: it is there already, and Python has no reader of its own before 3.14."""

    def __init__(self, raw: BinaryIO) -> None:
        import pyarrow as pa

        self._errors, self._stream = pa.ArrowException, pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except self._errors as error:
            raise OSError(first_line(error)) from None
        buffer[: len(data)] = data
        return len(data)


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: io.BufferedReader(_Zstandard(raw)),
}


def plain_name(path: str | Path) -> str:
    """The file name in lower case without the ending of a compression: "rows.csv" for "Rows.CSV.gz"."""
    name = Path(path).name.lower()
    return next((name.removesuffix(ending) for ending in OPENERS if name.endswith(ending)), name)


@contextlib.contextmanager
def open_bytes(path: str | Path, opened: Callable[[BinaryIO], object] | None = None) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed by its ending. opened: receives the file as it is on the disk, to measure progress.

    Reading may raise one of `BROKEN`.
    """
    with open(path, "rb") as raw:
        if opened:
            opened(raw)
        opener = OPENERS.get(Path(path).suffix.lower())
        if opener is None:
            yield raw
        else:
            with opener(raw) as stream:
                yield stream


def text_lines(
    path: str | Path,
    shown: str,
    reading: Reading | None = None,
    opened: Callable[[BinaryIO], object] | None = None,
    *,
    escape: bool = False,
) -> Generator[str]:
    """The lines of a text file with their ends (CR, LF or CRLF); `shown` is its name in messages.

    UTF-8 and UTF-16, with or without a byte order mark, and UTF-32 with one. A line that is not UTF-8 is read in the one of
    `LEGACY` that fits the file best, and counted in `reading`: files that were joined from several sources mix encodings.
    escape: its bytes above 127 become surrogates instead, for `surrogateescape` to give back.

    Raises:
        UserError: for a damaged archive, and for a file that is not text.
    """
    reading = reading or Reading()
    try:
        with open_bytes(path, opened) as stream:
            head = stream.peek(4096)[:4096] if isinstance(stream, io.BufferedReader) else _peek(path)
            _check_text(head, shown)
            if wide := _wide(head):
                reading.decoded(shown, wide[:6].upper(), None)
                yield from io.TextIOWrapper(stream, encoding=wide, newline="")
                return
            legacy: str | None = None
            for number, line in enumerate(stream):
                if number == 0:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    if escape:
                        text = line.decode("utf-8", "surrogateescape")
                    elif is_damaged_utf8(line):
                        text = line.decode("utf-8", "replace")
                        reading.decoded(shown, DAMAGED, 1)
                    else:
                        legacy = legacy or detect(path)
                        text = line.decode(legacy, "replace")
                        reading.decoded(shown, LEGACY[legacy], 1)
                yield from _BREAKS.findall(text) if "\r" in text[:-2] else (text,)
    except (*BROKEN, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: cannot be read to the end: {first_line(error)}") from None


def is_damaged_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8 but for a few, such as a letter that was cut in half; in another encoding hardly any fits."""
    text = data.decode("utf-8", "replace")
    whole = sum(ord(c) > 127 and c != "\ufffd" for c in text)
    return whole > text.count("\ufffd")


def detect(path: str | Path) -> str:
    """The encoding in `LEGACY` of a file that is not UTF-8, from its first lines that are not."""
    sample = bytearray()
    with open_bytes(path) as stream:
        for line in stream:
            if not line.isascii() and not _is_utf8(line) and not is_damaged_utf8(line):
                sample += line
            if len(sample) > SAMPLE // 16 or (sample and stream.tell() > 16 * SAMPLE):
                break
    return legacy_of(bytes(sample))


def legacy_of(data: bytes) -> str:
    """The encoding in `LEGACY` of bytes that are not UTF-8.

    The one in which most bytes above 127 become letters and punctuation that Danish text has. charset-normalizer 3.5 reads
    Danish DOS text as Windows-1252 (three of four texts tried), and so would lose every æ, ø and å.
    """
    fits = {name: _fit(data.decode(name, "replace")) for name in LEGACY}
    best = max(fits, key=lambda name: fits[name])  # on a tie the first wins
    return best if fits[best] >= 0 else "windows-1252"


def _fit(text: str) -> int:
    """Danish letters count most; one of upper case after one of lower case is rather an apostrophe of Windows-1252."""
    total = 0
    for before, c in itertools.pairwise(f" {text}"):
        if ord(c) > 127:
            danish = c in "æøåÆØÅ" and not (c.isupper() and before.islower())
            total += 3 if danish else 1 if c in LIKELY else -2
    return total


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _peek(path: str | Path) -> bytes:
    with open_bytes(path) as stream:
        return stream.read(4096)


def _wide(head: bytes) -> str | None:
    """The name of UTF-16 or UTF-32 (with the order of bytes where no byte order mark says it); None for another encoding."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16, whose mark begins that of UTF-32
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sides = [head[0::2].count(0), head[1::2].count(0)]
    if sum(sides) and max(sides) > len(head) // 8:  # of Latin letters one of the two bytes is 0
        return "utf-16-be" if sides[0] > sides[1] else "utf-16-le"
    return None


def _check_text(head: bytes, shown: str) -> None:
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{shown}: not a text file but {what}")
