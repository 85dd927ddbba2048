"""The Danish sample that ships with l2v: passages, questions, hard negatives; part of it is held out from every stage.

The training part is itself cut in two, `fit` and `dev`, for the choice of a recipe: whoever tunes trains on `fit` and scores the
questions of `dev`, and the held-out questions stay unseen until the end.

`sample_da/passages.jsonl`: id, subject, register, split (train or heldout), text.
`sample_da/questions.jsonl`: id, query, positive (a passage id), negatives (passage ids), kind (plain, colloquial or
disjoint: shares no content word with its passage).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from l2v.data.text import crops, sentences
from l2v.errors import UserError


@dataclass(frozen=True)
class Passage:
    """One passage of the sample."""

    id: str
    subject: str
    register: str
    split: str
    text: str


@dataclass(frozen=True)
class Question:
    """One question, the id of the passage that answers it, and ids of passages that look like an answer but are not."""

    id: str
    query: str
    positive: str
    negatives: tuple[str, ...]
    kind: str


@functools.cache
def passages() -> dict[str, Passage]:
    """All passages by id, in file order."""
    return {row["id"]: Passage(**row) for row in _read("passages.jsonl")}


@functools.cache
def splits() -> dict[str, frozenset[str]]:
    """The ids of the passages of `train` and `heldout`, and of the two parts of `train`: `dev`, every fourth, and `fit`."""
    train = [p.id for p in passages().values() if p.split == "train"]
    dev = frozenset(train[::4])
    held_out = frozenset(p.id for p in passages().values() if p.split == "heldout")
    return {"train": frozenset(train), "heldout": held_out, "fit": frozenset(train) - dev, "dev": dev}


@functools.cache
def questions(split: str) -> list[Question]:
    """The questions whose passage belongs to `split`."""
    rows = (Question(**{**row, "negatives": tuple(row["negatives"])}) for row in _read("questions.jsonl"))
    return [q for q in rows if q.positive in splits()[split]]


def rows(path: str, kind: str) -> list[dict[str, Any]]:
    """Rows of `sample:da/train`, `heldout`, `fit` or `dev` as documents, sentences or pairs.

    `sample:da/train/crops`: pairs that are cropped from the passages, without a question (`l2v.data.text.crops`).

    Raises:
        UserError: there is no such sample, or crops are read as something else than pairs.
    """
    match = re.fullmatch(r"sample:da/(train|heldout|fit|dev)(/crops)?", path)
    if not match:
        raise UserError(f"{path}: no such sample; use sample:da/train or sample:da/heldout, or sample:da/train/crops")
    split = match.group(1)
    texts = [p.text for p in passages().values() if p.id in splits()[split]]
    if match.group(2):
        if kind != "pairs":
            raise UserError(f"{path}: crops are pairs, for a supervised stage; use sample:da/{split}")
        return [_pair(sentence, rest) for text in texts for sentence, rest in crops(text)]
    if kind == "documents":
        return [{"text": text} for text in texts]
    if kind == "sentences":
        parts = [part for text in texts for part in sentences(text)]
        return [{"text": text} for text in [*parts, *(q.query for q in questions(split))]]
    known = passages()
    return [_pair(q.query, known[q.positive].text, [known[n].text for n in q.negatives]) for q in questions(split)]


def _pair(query: str, positive: str, negatives: Sequence[str] = ()) -> dict[str, Any]:
    empty = {"instruction": None, "document_instruction": None}
    return {"query": query, "positive": positive, "negatives": list(negatives)} | empty


def _read(name: str) -> list[dict[str, Any]]:
    text = resources.files("l2v.data").joinpath("sample_da", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]
