"""The Danish sample that ships with l2v: passages, questions, hard negatives; part of it is held out from every stage.

`sample_da/passages.jsonl`: id, subject, register, split (train or heldout), text.
`sample_da/questions.jsonl`: id, query, positive (a passage id), negatives (passage ids), kind (plain, colloquial or
disjoint: shares no content word with its passage).
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from l2v.data.text import sentences
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
def questions(split: str) -> list[Question]:
    """The questions whose passage belongs to `split`."""
    known = passages()
    rows = (Question(**{**row, "negatives": tuple(row["negatives"])}) for row in _read("questions.jsonl"))
    return [q for q in rows if known[q.positive].split == split]


def rows(path: str, kind: str) -> list[dict[str, Any]]:
    """Rows of `sample:da/train` or `sample:da/heldout` as documents, sentences or pairs."""
    match = re.fullmatch(r"sample:da/(train|heldout)", path)
    if not match:
        raise UserError(f"{path}: no such sample; use sample:da/train or sample:da/heldout")
    split = match.group(1)
    texts = [p.text for p in passages().values() if p.split == split]
    if kind == "documents":
        return [{"text": text} for text in texts]
    if kind == "sentences":
        parts = [part for text in texts for part in sentences(text)]
        return [{"text": text} for text in [*parts, *(q.query for q in questions(split))]]
    known = passages()
    return [
        {
            "query": q.query,
            "positive": known[q.positive].text,
            "negatives": [known[n].text for n in q.negatives],
            "instruction": None,
            "document_instruction": None,
        }
        for q in questions(split)
    ]


def _read(name: str) -> list[dict[str, Any]]:
    text = resources.files("l2v.data").joinpath("sample_da", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]
