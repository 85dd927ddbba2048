"""Decontamination: evaluation texts as hashes on disk, and whether a row contains one of them.

A row is a leak in three cases: its words equal those of an evaluation text; it contains a whole evaluation text of at least
`least` words; it shares `ngram` consecutive words with one (Brown et al. 2020, arXiv 2005.14165, appendix C, takes 13). Words are
compared in lower case, without punctuation. The hashes are sorted arrays that workers map into memory and share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from l2v.data.corpus import clean
from l2v.data.corpus.config import Decontaminate, Held, Input
from l2v.data.corpus.grams import gram_hashes, text_hash, word_hashes
from l2v.data.corpus.readers import Reader, format_of
from l2v.data.text import parse
from l2v.errors import UserError, first_line
from l2v.files import replace_text


class Leaks:
    """The evaluation texts in a folder that `prepare` wrote."""

    def __init__(self, folder: Path, settings: Decontaminate) -> None:
        self.ngram = settings.ngram
        self.exact = _mapped(folder / "exact.npy")
        self.grams = {int(p.stem.split("-")[1]): _mapped(p) for p in sorted(folder.glob("grams-*.npy"))}

    def kind(self, words: list[str], hashes: np.ndarray) -> str | None:
        """`exact` or `n-gram` if a text with these words and `word_hashes` is a leak, else None."""
        if not words or not len(self.exact):
            return None
        if _holds(self.exact, np.array([text_hash(" ".join(words))], np.uint64)):
            return "exact"
        for length, known in self.grams.items():
            if _holds(known, gram_hashes(hashes, length)):
                return "n-gram" if length == self.ngram else "exact"
        return None


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False).view(
        np.ndarray
    )  # a plain view: a memmap's own indexing costs microseconds


def _holds(known: np.ndarray, asked: np.ndarray) -> bool:
    if not len(known) or not len(asked):
        return False
    at = np.searchsorted(known, asked)
    at[at == len(known)] = 0
    return bool(np.any(known[at] == asked))


def prepare(settings: Decontaminate, folder: Path, base: str | None) -> list[dict[str, Any]]:
    """Write the hashes of all evaluation texts to `folder`. Returns an entry for each set: its texts, or why it was not read.

    sets.json is written last and marks the folder as complete. A set that cannot be read does not raise: the others still count.
    """
    if (folder / "sets.json").is_file():
        return json.loads((folder / "sets.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    exact: set[int] = set()
    grams: dict[int, set[int]] = {}
    sets = []
    for held in settings.sources:
        entry = asdict(held) | {"texts": 0, "error": None}
        try:
            for text in _texts(held, base):
                words = clean.words(text)
                if not words:
                    continue
                entry["texts"] += 1
                exact.add(text_hash(" ".join(words)))
                length = min(settings.ngram, len(words))
                if length >= settings.least:
                    found = gram_hashes(word_hashes(words), length)
                    grams.setdefault(length, set()).update(found.tolist())
        except UserError as error:
            entry["error"] = str(error)
        sets.append(entry)
    _save(folder / "exact.npy", exact)
    for length, values in grams.items():
        _save(folder / f"grams-{length:02d}.npy", values)
    replace_text(folder / "sets.json", json.dumps(sets, ensure_ascii=False))
    return sets


def _save(path: Path, values: set[int]) -> None:
    np.save(path, np.sort(np.fromiter(values, np.uint64, len(values))))


def _texts(held: Held, base: str | None) -> Iterator[str]:
    if held.path.startswith("mteb:"):
        yield from _mteb(held)
        return
    source = Input(path=held.path, licence="", name=held.name, split=held.split, revision=held.revision)
    reader = Reader(source, base)
    for where, payload in reader:
        if isinstance(payload, UserError):
            raise payload
        if isinstance(payload, dict):
            row = {key: clean.restored(value) if isinstance(value, str) else value for key, value in payload.items()}
        else:
            text = clean.decode(payload, "auto")[0] if isinstance(payload, bytes) else clean.restored(payload)
            row = parse(text, where) if format_of(source, reader.files[0]) == "jsonl" else {"text": text}
        if held.columns:
            for column in held.columns:
                if column not in row:
                    raise UserError(f"{where}: the field '{column}' is absent; found {', '.join(map(str, row))}")
        yield from _strings([row[c] for c in held.columns] if held.columns else row.values())


def _strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _strings(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _strings(value)


def _mteb(held: Held) -> Iterator[str]:
    """Every text of an mteb task's test data, whatever its type: queries, documents, sentences, labels' texts."""
    name = held.path.removeprefix("mteb:")
    try:
        import mteb
    except ImportError:
        raise UserError(f"{held.path}: evaluation sets by name need mteb: pip install mteb") from None
    try:
        task = mteb.get_task(name)
        task.load_data()
    except Exception as error:  # mteb and the hub library raise what their transports raise
        raise UserError(f"{held.path}: the evaluation set cannot be loaded: {first_line(error)}") from None
    yield from _deep(task.dataset, task.metadata.eval_splits, held.columns)


def _deep(data: Any, splits: list[str], columns: list[str] | None) -> Iterator[str]:
    if hasattr(data, "column_names") and not hasattr(data, "keys"):
        for row in data:
            yield from _strings([row[c] for c in columns if c in row] if columns else row.values())
    elif hasattr(data, "items"):
        inner = {k: v for k, v in data.items() if k in splits} or dict(data.items())
        for value in inner.values():
            yield from _deep(value, splits, columns)
    else:
        yield from _strings([data])
