"""The work of one worker: a chunk of raw records becomes a Parquet file of candidate rows with hashes and counts.

A pure function of the chunk and the configuration, so neither the number of workers nor a restart changes the output.
The file is written atomically, with the counts in its metadata.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2v.data.corpus import clean
from l2v.data.corpus.config import Build
from l2v.data.corpus.grams import text_hash, word_hashes
from l2v.data.corpus.language import Detector
from l2v.data.corpus.leaks import Leaks
from l2v.data.corpus.near import Signer
from l2v.data.corpus.readers import Record
from l2v.data.corpus.records import Parser, Row
from l2v.data.corpus.tally import Tally
from l2v.files import replacing

LABELS = [("id", pa.string()), ("source", pa.string()), ("licence", pa.string()), ("document", pa.string()),
          ("group", pa.string()), ("section", pa.string()), ("lang", pa.string())]  # fmt: skip
SCHEMAS = {
    "documents": pa.schema([("text", pa.string()), *LABELS]),
    "pairs": pa.schema(
        [("query", pa.string()), ("positive", pa.string()), ("negatives", pa.list_(pa.string())),
         ("instruction", pa.string()), ("document_instruction", pa.string()), *LABELS]
    ),
}  # fmt: skip
SCHEMAS["sentences"] = SCHEMAS["documents"]
"""Columns of the data set, by kind."""
TALLY = b"l2v.tally"


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of source `source`, the first of them number `first` (from 1)."""

    source: int
    index: int
    first: int
    records: list[Record]

    @property
    def name(self) -> str:
        """The name of its file."""
        return chunk_name(self.source, self.index)


def chunk_name(source: int, index: int) -> str:
    """Names sort in the order of the data."""
    return f"s{source:03d}-{index:08d}.parquet"


class Worker:
    """The filters of a build, loaded once in each process."""

    def __init__(self, config: Build, work: Path) -> None:
        self.config, self.work = config, work
        self.pairs = config.kind == "pairs"
        self.schema = SCHEMAS[config.kind]
        self.parsers: dict[int, Parser] = {}
        also = {code for s in config.sources for code in s.languages or ()}
        self.detector = Detector(config.language, also) if config.language else None
        self.leaks = Leaks(work / "leaks", config.decontaminate)
        self.signer = Signer(config.near) if config.near else None
        self.numbers = {name: i for i, name in enumerate(config.split_names())}

    def __call__(self, chunk: Chunk) -> str:
        """Write the chunk's file and return its name."""
        if chunk.source not in self.parsers:
            self.parsers[chunk.source] = Parser(self.config, self.config.sources[chunk.source])
        parser, tally = self.parsers[chunk.source], Tally()
        columns: dict[str, list[Any]] = {name: [] for name in self.schema.names}
        exact, splits, bands, shingles = [], [], [], []
        for offset, (where, payload) in enumerate(chunk.records):
            for row in parser.rows(chunk.first + offset, where, payload, tally):
                words = [clean.words(text) for text in self._texts(row)]
                hashes = [word_hashes(part) for part in words]
                if why := self._refused(row, words, hashes, parser):
                    tally.drop(why, row["id"], " → ".join(self._texts(row)) or where)
                    continue
                for name, values in columns.items():
                    values.append(row[name])
                exact.append(text_hash(" ".join(word for part in words for word in part)))
                splits.append(self.numbers[self._split(row, parser)])
                if self.signer:
                    own = self.signer(np.concatenate(hashes))
                    bands.append(own[0].tobytes())
                    shingles.append(own[1].tobytes())
        table = pa.table(columns, schema=self.schema)
        table = table.append_column("_exact", pa.array(exact, pa.uint64()))
        table = table.append_column("_split", pa.array(splits, pa.uint8()))
        if self.signer:
            table = table.append_column("_bands", pa.array(bands, pa.binary(8 * self.signer.count)))
            table = table.append_column("_shingles", pa.array(shingles, pa.binary()))
        table = table.replace_schema_metadata({TALLY: tally.to_json().encode()})
        path = self.work / "chunks" / chunk.name
        with replacing(path) as partial:
            pq.write_table(table, partial, compression="zstd", use_dictionary=["source", "licence", "lang", "section"])
        return chunk.name

    def _texts(self, row: Row) -> list[str]:
        return [row["query"], row["positive"]] if self.pairs else [row["text"]]

    def _refused(self, row: Row, words: list[list[str]], hashes: list[np.ndarray], parser: Parser) -> str | None:
        """Why a row is dropped, checked in the order of `tally.REASONS`; also sets its language."""
        length = self.config.length
        if self.pairs:
            if not row["positive"]:
                return "empty positive"
            if not row["query"]:
                return "empty query"
        if not self._language(row, parser):
            return "language"
        limits = [length.query, length.positive] if self.pairs else [length.text]
        if self.config.kind == "sentences":
            limits = [(self.config.sentences.least, self.config.sentences.most)]
        for text, (least, most) in zip(self._texts(row), limits, strict=True):
            count = len(text.split())
            if count < least:
                return "too short"
            if count > most:
                return "too long"
        if parser.source.into in (None, "train"):  # an evaluation split is not checked against itself
            for negative in row.get("negatives", ()):
                words, hashes = [*words, clean.words(negative)], [*hashes, word_hashes(clean.words(negative))]
            kinds = {self.leaks.kind(*part) for part in zip(words, hashes, strict=True)}
            for kind in ("exact", "n-gram"):
                if kind in kinds:
                    return f"leak, {kind}"
        return None

    def _language(self, row: Row, parser: Parser) -> bool:
        """Whether every text long enough for detection is in a language that is kept; sets `lang`."""
        own = parser.source.languages
        row["lang"] = own[0] if own else self.config.language.keep[0] if self.config.language else ""
        language = self.config.language
        if language is None or self.detector is None or own == []:
            return True
        keep = own or language.keep
        texts = self._texts(row)
        if len(keep) == 1 or not own:
            texts = [" ".join(texts)]  # a title alone is too short to distinguish Danish from Norwegian
        found = [self.detector.of(text) for text in texts]
        row["lang"] = next((code for code in reversed(found) if code), row["lang"])
        return all(code is None or code in keep for code in found)

    def _split(self, row: Row, parser: Parser) -> str:
        """The split by a hash of the group, so that a group is never divided over two splits."""
        if parser.source.into:
            return parser.source.into
        place = text_hash(f"{self.config.seed}\n{row['group']}") / 2**64
        for name, share in self.config.splits.items():
            if place < share:
                return name
            place -= share
        return next(iter(self.config.splits))


_worker: Worker | None = None


def start(config: Build, work: Path) -> None:
    """Make this process a worker that exits when its parent process ends, even by a kill."""
    global _worker
    pa.set_cpu_count(1)  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    _worker = Worker(config, work)


def work_on(chunk: Chunk) -> str:
    """`Worker.__call__` of this process."""
    assert _worker is not None  # by `start`
    return _worker(chunk)


def read_tally(path: Path) -> Tally:
    """The counts of a chunk's file."""
    return Tally.from_json(pq.read_schema(path).metadata[TALLY].decode())


@dataclass(frozen=True)
class Hashes:
    """A chunk's rows: exact hashes uint64 [rows], split numbers uint8 [rows] and, for the near-duplicate search,
    band hashes uint64 [rows, bands] and the bytes of each row's shingles."""

    exact: np.ndarray
    split: np.ndarray
    bands: np.ndarray
    shingles: list[bytes]


def read_hashes(path: Path, bands: int) -> Hashes:
    """The hashes of a chunk's file; `bands` is 0 without a near-duplicate search."""
    names = ["_exact", "_split", *(["_bands", "_shingles"] if bands else [])]
    table = pq.read_table(path, columns=names, use_threads=False)
    exact, split = (table[name].to_numpy() for name in names[:2])
    if not bands:
        return Hashes(exact, split, np.empty((len(exact), 0), np.uint64), [])
    raw = b"".join(table["_bands"].to_pylist())
    return Hashes(exact, split, np.frombuffer(raw, np.uint64).reshape(-1, bands), table["_shingles"].to_pylist())
