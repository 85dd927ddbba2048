"""Semantic search: texts with their places in files, their vectors kept next to the run, and the nearest to a query."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2v.batch import mix
from l2v.data import raw, sample
from l2v.data.columns import absent, settle
from l2v.data.find import find_files, kind_of, left_out
from l2v.data.reading import Reading
from l2v.data.sources import open_rows
from l2v.data.tokens import text_key
from l2v.encoder import Encoder, nonempty
from l2v.encoding.index import Index
from l2v.encoding.rows import place_of, text_of
from l2v.errors import Notice, UserError
from l2v.files import replacing
from l2v.recipe import Source

UNITS = {"table": "line", "lines": "line", "text": "line", "json": "item", "parquet": "row", "workbook": "row"}
"""What the number of a row counts, by the kind of its file."""


@dataclass(frozen=True)
class Passage:
    """One text of a corpus: its file, the line or row that it stands in (from 1), the row's id, and the row itself.

    row: None where the text has none (a Hub data set). fields: empty unless they were asked for.
    """

    text: str
    file: str
    row: int | None = None
    id: str | None = None
    where: str = ""
    fields: dict[str, Any] | None = None


@dataclass(frozen=True)
class Hit:
    """A passage and its cosine similarity to a query."""

    score: float
    passage: Passage

    def as_json(self) -> dict[str, Any]:
        """Plain values: score, file, row, id, where, text, fields."""
        return {"score": round(self.score, 6)} | vars(self.passage)


def read_corpus(file: str | None, column: str, notes: list[str], *, fields: bool = False) -> list[Passage]:
    """The texts of a file, of a glob's or a folder's files, or of a source of recipes; None: the passages of the Danish sample.

    column: the field that holds the text. Empty texts and rows that cannot be read are skipped and counted. notes: receives
    what a user should know: a guessed column, skipped rows, the number of texts. fields: keep all fields of each row.

    Raises:
        UserError: there is no text, or a file cannot be read.
    """
    if file is None:
        shipped = [_of_sample(passage, fields) for passage in sample.passages().values()]
        notes.append(f"searching the {len(shipped)} passages of the Danish sample; --texts FILE searches your own")
        return shipped
    if ":" in file.partition("/")[0] and not Path(file).exists():  # hub:NAME or sample:da/train
        texts = open_rows([Source(path=file, text=column, skip_empty=True)], "documents", notes)["text"]
        return [Passage(text, file, at, where=f"{file}, text {at}") for at, text in enumerate(texts, 1)]
    files, reading = find_files(file), Reading(keep_going=True)
    if sentence := left_out(file):
        reading.note(sentence)
    found: list[Passage] = []
    for path in files:
        try:
            found += _read(
                path, file if len(files) == 1 and Path(file).is_file() else str(path), column, reading, fields
            )
        except UserError as error:
            if len(files) == 1:
                raise
            reading.lose(error, file=True)
    reading.check(file)
    notes += reading.sentences(file)
    if not found:
        raise UserError(f"{file}: holds no text to search")
    notes.append(f"searching {len(found):,} text{'s' * (len(found) != 1)}")
    return found


class Searcher:
    """An encoder and the vectors of a corpus, ready for queries.

    The vectors are kept in the model's folder, by what decides them, and only affect the speed of the next search.
    """

    def __init__(self, model: str, passages: list[Passage], *, instruction: str | None = None, **options: Any) -> None:
        """instruction: before the queries; default: that of the training. options: of `Encoder.from_pretrained`.

        Raises:
            UserError: the model cannot be loaded, or a text is no text.
        """
        self.encoder, self.passages = Encoder.from_pretrained(model, **options), passages
        self.notes: list[str] = []
        self._document = trained(self.encoder, "document", self.notes)
        self._instruction = trained(self.encoder, "query", self.notes) if instruction is None else instruction
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)  # the user has read it
            key = json.dumps(Encoder.identity(model, **options), sort_keys=True) + f"\n{self._document}\n"
        folder = Path(model) / ".search" if Path(model).is_dir() else None
        self.vectors_ME = self._vectors(key + self.encoder.tokenizer.fingerprint(), folder)

    def find(self, query: str, top: int) -> list[Hit]:
        """The `top` passages nearest to a query, the nearest first."""
        scores_M = self.vectors_ME @ self.encoder.encode(query, self._instruction, normalize=True)
        return [Hit(float(scores_M[at]), self.passages[at]) for at in np.argsort(-scores_M, kind="stable")[:top]]

    def _vectors(self, key: str, folder: Path | None) -> np.ndarray:
        """Unit vectors of the passages, float32 [M, E]."""
        texts = [passage.text for passage in self.passages]
        nonempty(texts, "error")
        name = mix(text_key(key), *(text_key(text) for text in texts))
        cache = folder / f"{name:016x}.npy" if folder else None
        if cache and cache.is_file():
            with contextlib.suppress(OSError, ValueError):  # damaged: computed again
                found = np.load(cache, allow_pickle=False)
                if found.shape == (len(texts), self.encoder.dimension):
                    return found
        vectors_ME = self.encoder.encode(texts, self._document, normalize=True, show_progress=True)
        if cache:
            with contextlib.suppress(OSError):
                cache.parent.mkdir(exist_ok=True)
                with replacing(cache) as partial, open(partial, "wb") as file:
                    np.save(file, vectors_ME, allow_pickle=False)
        return vectors_ME


class IndexSearcher:
    """An encoder and a file of `l2v encode`, ready for queries; the vectors stay on the disk."""

    def __init__(
        self, model: str, path: str, *, instruction: str | None = None, approximate_above: int | None = None, **options: Any
    ) -> None:  # fmt: skip
        """instruction, options: as for `Searcher`. approximate_above: more vectors than that are searched with HNSW.

        Raises:
            UserError: the model cannot be loaded, or the file is no index or one of another model.
        """
        self.index = Index(path)
        self.encoder = Encoder.from_pretrained(model, **{"length": self.index.facts["length"]} | options)
        self.index.check(self.encoder)
        self.notes = [f"searching {len(self.index):,} vectors of {path}"]
        if approximate_above is not None and len(self.index) > approximate_above:
            self.index.approximate()
            self.notes.append("approximate: HNSW may miss some of the nearest; omit --approximate-above for all")
        if self.index.facts["side"] == "query":
            self.notes.append("its texts were encoded as queries (--side query)")
        self._instruction = trained(self.encoder, "query", self.notes) if instruction is None else instruction

    def find(self, query: str, top: int) -> list[Hit]:
        """The `top` rows nearest to a query, the nearest first. With .npy and .safetensors a hit has a place and no text."""
        query_E = self.encoder.encode(query, self._instruction, dimensions=self.index.width)
        at, scores = self.index.search(query_E, top)
        return [Hit(float(score), self._passage(int(n))) for n, score in zip(at, scores, strict=True)]

    def _passage(self, at: int) -> Passage:
        row, path = self.index.row(at), str(self.index.path)
        if not path.endswith(".parquet"):
            where = f"{row['file']}, {UNITS[kind_of(row['file'])]} {row['row']}" if row["row"] else row["file"]
            return Passage("", **row, where=where)
        column = settle(Source(path=path, text=self.index.facts["input"]["column"]), list(row), "documents").source.text
        where = f"{path}, row {at + 1}"
        place = place_of(
            row, where, path, self.index.facts["input"]["id"] if self.index.facts["input"]["id"] in row else None
        )
        return Passage(str(row.get(column) or ""), **place, where=where, fields=row)


def trained(encoder: Encoder, side: Any, notes: list[str]) -> str | None:
    """The instruction of the training; none, with a note, if there were several."""
    why = encoder.instructions.unclear(side)
    if why is None:
        return encoder.instructions.one(side)
    option = "; --instruction TEXT chooses one" if side == "query" else ""
    notes.append(f"{side} texts are encoded without an instruction, because {why}{option}")
    return None


def _of_sample(passage: sample.Passage, fields: bool) -> Passage:
    where = f"sample:da, passage {passage.id}"
    return Passage(passage.text, "sample:da", None, passage.id, where, vars(passage) if fields else None)


def _read(path: Path, shown: str, column: str, reading: Reading, fields: bool) -> Iterator[Passage]:
    names, complete = raw.columns(path, shown)
    choice = settle(Source(path=shown, text=column), names, "documents")
    if note := choice.note():
        reading.note(note)
    column = choice.source.text
    if complete and column not in names:
        raise UserError(absent(shown, column, names))
    for where, row in raw.read_rows(path, shown, reading):
        try:
            text = text_of(row, column, where)
        except UserError as error:
            reading.lose(error)
            continue
        reading.rows += 1
        if not text:
            reading.empty += 1
            reading.example("empty", where)
            continue
        yield Passage(text, **place_of(row, where, shown), where=where, fields=row if fields else None)
