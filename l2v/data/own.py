"""Inspect a user's file for `l2v init`: what its columns hold, and how much there is to train on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from l2v.data import raw
from l2v.data.columns import LOOKED_FOR, guess, settle
from l2v.data.sources import scan
from l2v.data.tables import DELIMITERS, is_table, layout
from l2v.data.text import sentences
from l2v.errors import UserError
from l2v.recipe.new import OwnData
from l2v.recipe.source import Source

MEASURED = 10_000  # rows whose lengths are measured
MAX_QUERY = 60  # letters of the example query
LONG = 40  # words; texts of more on average are split into sentences for SimCSE


def look(path: str) -> OwnData:
    """Read a file once, row by row.

    Raises:
        UserError: for a file without a column of a known name (the message lists its columns), for one with
            fewer than two rows of text, and for what cannot be read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: file not found; give a .csv, .tsv, .jsonl, .parquet or .txt file")
    names, _ = raw.columns(file, path)
    pairs = settle(Source(path), names, "pairs").source
    texts = settle(Source(path), names, "documents").source
    if pairs.query in names and pairs.positive in names:
        data = _measure(OwnData(pairs, "pairs"))
    elif texts.text in names:
        data = _measure(OwnData(texts, "texts"))
    elif not names:
        raise UserError(f"{path}: the file is empty; it needs at least one row")
    else:
        raise UserError(_unusable(path, names))
    if data.rows < 2:
        raise UserError(f"{path}: {data.rows} row{'s' * (data.rows != 1)} with text; training needs at least 2")
    if is_table(file):
        data.delimiter = DELIMITERS[layout(file, path).delimiter]
    data.columns = names
    data.searched = guess("text", names) or data.document
    return data


def _unusable(path: str, names: list[str]) -> str:
    header = ", the first line of the file," if is_table(path) else ""
    query, positive, text = (", ".join(LOOKED_FOR[key]) for key in ("query", "positive", "text"))
    return (
        f"{path}: no column to train on: found {', '.join(names)}{header} and looked for a pair ({query} with {positive}) or for "
        f"texts ({text}); rename a column, or copy a recipe (l2v recipes NAME) and name the columns in its data"
    )


def _measure(data: OwnData) -> OwnData:
    """Count rows, empty rows and negatives; take lengths from the first rows."""
    texts: list[str] = []
    letters, words = [], []
    parts = 0
    for found in scan(data.source, "pairs" if data.kind == "pairs" else "documents"):
        if not found:
            data.empty += 1
            continue
        (row,) = found
        data.rows += 1
        if not data.example and len(query := row.get("query", "")) <= MAX_QUERY:
            data.example = " ".join(query.split())
        data.negatives = max(data.negatives, len(row.get("negatives", ())))
        text = row["positive" if data.kind == "pairs" else "text"]
        data.letters += len(text)
        if data.rows <= MEASURED:
            texts = [text, *(row[key] for key in ("query",) if key in row), *row.get("negatives", ())]
            letters.append(max(map(len, texts)))
            words.append(len(text.split()))
            parts += len(sentences(text))
    if data.rows:
        data.long_letters = int(np.percentile(letters, 95))
        if data.kind == "texts" and np.mean(words) > LONG and parts >= 2:
            data.sentences = parts * data.rows // len(words)
            data.long_letters = min(data.long_letters, 400)  # a sentence, not its text
    if data.empty:
        data.source = replace(data.source, skip_empty=True)
    return data
