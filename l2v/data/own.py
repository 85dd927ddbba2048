"""Inspect a user's file for `l2v init`: what its columns hold, and how much there is to train on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from l2v.data import raw
from l2v.data.columns import LOOKED_FOR, guess, settle
from l2v.data.find import find_files
from l2v.data.reading import Reading, listed
from l2v.data.rows import read_source
from l2v.data.tables import DELIMITERS, is_table
from l2v.data.text import sentences
from l2v.errors import UserError
from l2v.recipe.new import OwnData
from l2v.recipe.source import Source

MEASURED = 10_000  # rows whose lengths are measured
MAX_QUERY = 60  # letters of the example query
LONG = 40  # words; texts of more on average are split into sentences for SimCSE


def look(path: str) -> OwnData:
    """Read a file, a folder or a glob once, row by row; rows that cannot be read are counted.

    Raises:
        UserError: for a file without a column of a known name (the message lists its columns), for one with
            fewer than two rows of text, and for what cannot be read.
    """
    source, kind, names = kind_of_data(path)
    data = _measure(OwnData(source, "pairs" if kind == "pairs" else "texts"))
    if data.rows < 2:
        raise UserError(f"{path}: {data.rows} row{'s' * (data.rows != 1)} with text; training needs at least 2")
    files = find_files(path)
    if len(files) == 1 and (delimiter := raw.delimiter(files[0], path)):
        data.delimiter = DELIMITERS.get(delimiter, delimiter)
    data.files, data.columns = len(files), names
    data.searched = guess("text", names) or data.document
    return data


def kind_of_data(path: str) -> tuple[Source, Literal["pairs", "documents"], list[str]]:
    """Whether a file (or several) holds pairs or texts: its source with guessed columns, the kind, and all columns.

    Several files may have other columns each, so theirs are guessed when they are read.

    Raises:
        UserError: no column has a known name; or nothing can be found or read.
    """
    files = find_files(path)
    names: list[str] = []
    for file in files:
        try:
            found, _ = raw.columns(file, str(file) if len(files) > 1 else path)
        except UserError:
            if len(files) == 1:
                raise
            continue  # reported when the files are read
        names += [name for name in found if name not in names]
    pairs, texts = (settle(Source(path), names, kind).source for kind in ("pairs", "documents"))
    if pairs.query in names and pairs.positive in names:
        # The column of scores stays a guess, so that a word in it is no mistake.
        return (replace(pairs, score=None) if len(files) == 1 else Source(path)), "pairs", names
    if texts.text in names:
        return (texts if len(files) == 1 else Source(path)), "documents", names
    if not names:
        raise UserError(f"{path}: the file is empty; it needs at least one row")
    raise UserError(_unusable(path, names))


def _unusable(path: str, names: list[str]) -> str:
    if any(len(name) > 40 or name.endswith((".", "?", "!")) for name in names):
        return (
            f"{path}: the first line looks like data, not like names of columns; put a line above it, such as Spørgsmål and Svar "
            "(or question and answer) with the same delimiter"
        )
    header = ", the first line of the file," if is_table(path) else ""
    query, positive, text = (", ".join(LOOKED_FOR[key]) for key in ("query", "positive", "text"))
    return (
        f"{path}: no column to train on: found {listed(names)}{header} and looked for a pair ({query} with {positive}) or for "
        f"texts ({text}); rename a column, or copy a recipe (l2v recipes NAME) and name the columns in its data"
    )


def _measure(data: OwnData) -> OwnData:
    """Count rows, empty rows and negatives; take lengths from the first rows."""
    letters, words = [], []
    parts = 0
    reading = Reading(keep_going=True)
    source = replace(data.source, skip_bad=True)
    for _, found in read_source(source, "pairs" if data.kind == "pairs" else "documents", reading):
        for row in found:
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
    reading.check(data.source.path)
    data.empty, data.bad = reading.empty, reading.lost + reading.files
    data.notes = reading.sentences(data.source.path)
    if data.rows:
        data.long_letters = int(np.percentile(letters, 95))
        if data.kind == "texts" and np.mean(words) > LONG and parts >= 2:
            data.sentences = parts * data.rows // len(words)
            data.long_letters = min(data.long_letters, 400)  # a sentence, not its text
    if data.empty or data.bad:
        data.source = replace(data.source, skip_empty=bool(data.empty), skip_bad=bool(data.bad))
    return data
