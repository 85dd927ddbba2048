"""Texts of the map of embeddings: those that the run itself was held out on or trained on, a file, or the Danish sample."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from l2v.data import sample
from l2v.data.local import is_local, rows_of
from l2v.data.rows import Kind
from l2v.errors import UserError
from l2v.recipe import Source
from l2v.runs.facts import RunFacts

MAX_TEXTS = 2000  # more dots would overlap in a picture
MAX_PAIRS = 300  # two dots and a line each
MAX_READ = 20_000  # rows that are read to choose from; the first ones, so that a large file is not read to its end
# The subjects of the sample are written without Danish letters in its files.
SUBJECTS = {"boern": "børn", "haandvaerk": "håndværk", "oekonomi": "økonomi"}
KINDS: dict[str, Kind] = {"mntp": "documents", "simcse": "sentences", "supervised": "pairs"}


@dataclass
class Texts:
    """What a map shows. labels: the topic of each text, or for `pairs` which side it is; source: a phrase for the caption.

    pairs: the first half are queries, the second half their answers in the same order. instructions: of queries and answers.
    """

    texts: list[str]
    labels: list[str]
    source: str
    pairs: bool = False
    instructions: tuple[str | None, str | None] = (None, None)


def of_sample(why: str = "") -> Texts:
    """The passages of the Danish sample, by subject."""
    passages = list(sample.passages().values())
    labels = [SUBJECTS.get(p.subject, p.subject) for p in passages]
    return Texts([p.text for p in passages], labels, f"the passages of the Danish sample, by subject{why}")


def of_file(file: str, text: str, label: str) -> Texts:
    """Texts of a file with a column of topics.

    Raises:
        UserError: if the file has no such column, or fewer than two topics.
    """
    from l2v.evaluation.rows import read_rows

    rows = _some(read_rows(Path(file), [text], [label]).rows, MAX_TEXTS)
    labels = [str(row[label]) for row in rows]
    if len(set(labels)) < 2 or len(rows) < 4:
        raise UserError(
            f"{file}: {len(rows)} rows of {len(set(labels))} topics in '{label}'; a map needs 4 rows and 2 topics"
        )
    return Texts([row[text] for row in rows], labels, f"{Path(file).name}, by {label}")


def of_run(run: RunFacts, *, sample: bool = False) -> Texts:
    """Texts of the last trained stage: held-out ones if it has them, else those it was trained on.

    The Danish sample if `sample`, if the stage was trained on it, or if the run's data cannot be read here.
    """
    assert run.last is not None
    if sample:
        return of_sample()
    kind = KINDS.get(run.last.objective, "sentences")
    why = ""
    for key, role in (("eval_data", "held-out"), ("data", "training")):
        for plain in run.last.recipe.get(key) or ():
            source = _source(plain)
            if source.path.startswith("sample:"):
                return of_sample()
            if not is_local(source):
                why = why or f" (the run's own data, {source.path}, is on the Hub)"
                continue
            try:
                found = _own(source, kind, role)
            except (UserError, OSError) as error:
                why = why or f" (the run's own data cannot be read here: {error})"
                continue
            if len(found.texts) >= 4:
                return found
    return of_sample(why)


def _source(plain: dict[str, Any]) -> Source:
    known = {field.name for field in fields(Source)}
    return Source(**{key: value for key, value in plain.items() if key in known})


def _own(source: Source, kind: Kind, role: str) -> Texts:
    """The source's texts; without topics, so the file is the label, or the side of a pair."""
    name, found = Path(source.path).name, list(rows_of(source, kind, MAX_READ))
    keys = ("query", "positive") if kind == "pairs" else ("text",)

    def texts_of(settled: Source, row: dict[str, Any]) -> list[str] | None:
        texts = [row.get(getattr(settled, key)) for key in keys]
        good = [text for text in texts if isinstance(text, str) and text.strip()]
        return good if len(good) == len(keys) else None

    rows = [texts for settled, row in found if (texts := texts_of(settled, row))]
    if not rows:
        raise UserError(f"{source.path}: no row has {' and '.join(keys)}")
    settled = found[0][0]
    first = f"the first {MAX_READ:,} rows of " if len(found) == MAX_READ else ""
    if kind != "pairs":
        chosen = _some([texts[0] for texts in rows], MAX_TEXTS)
        return Texts(chosen, [name] * len(chosen), f"{role} texts of {first}{name}")
    pairs, prompts = _some(rows, MAX_PAIRS), source.prompts()
    labels = [settled.query] * len(pairs) + [settled.positive] * len(pairs)
    texts = [query for query, _ in pairs] + [positive for _, positive in pairs]
    instructions = (prompts.query or None, prompts.document or None)
    return Texts(texts, labels, f"{role} pairs of {first}{name}", True, instructions)


def _some(rows: list[Any], most: int) -> list[Any]:
    """At most `most` rows, drawn with a fixed seed, in their order."""
    if len(rows) <= most:
        return rows
    return [rows[at] for at in sorted(np.random.default_rng(0).choice(len(rows), most, replace=False))]
