"""Check the user's own pairs or texts: counts, lengths, duplicates, several answers, leaks between splits, language."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from l2v.data.corpus import clean
from l2v.data.corpus.config import Language
from l2v.data.corpus.language import Detector
from l2v.data.find import find_files
from l2v.data.own import kind_of_data
from l2v.data.reading import SHOWN, Reading
from l2v.data.rows import Kind, read_source
from l2v.data.tokens import TextTokenizer, text_key
from l2v.errors import UserError
from l2v.recipe import Recipe, Source

BATCH = 512  # texts tokenised at a time
FEW = 500  # pairs or texts below which a stage learns little
SHOWN_TEXT = 70
FINDINGS = {
    "cut": "longer than the stage's length, so the end is cut off",
    "same twice": "the same text (or pair) as an earlier row",
    "several answers": "the question of an earlier row with another answer; they are not negatives of each other",
    "same on both sides": "query and positive are the same text",
    "negative is an answer": "a hard negative that is also a positive of the same question",
    "leaks": "also in another split, so its score there says little",
    "other language": "most likely not Danish",
}


@dataclass
class Findings:
    """How often each finding was made, and the first of each: where, and what."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, where: str, text: str) -> None:
        """Count a finding; `text` is shown shortened."""
        self.counts[what] += 1
        shown = self.first.setdefault(what, [])
        if len(shown) < SHOWN:
            flat = " ".join(text.split())
            shown.append(f"{where}: {flat[:SHOWN_TEXT]}{'…' if len(flat) > SHOWN_TEXT else ''}")


@dataclass
class SplitReport:
    """One split of the data: what was read, lengths in tokens by column, languages, findings."""

    name: str
    kind: Kind
    reading: Reading
    rows: int = 0
    negatives: int = 0
    lengths: dict[str, list[int]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    path: str = ""

    def lines(self) -> Iterator[str]:
        """The report as text."""
        unit = ("pair" if self.kind == "pairs" else "text") + "s" * (self.rows != 1)
        negatives = f", {self.negatives:,} hard negatives" if self.negatives else ""
        yield f"{self.name}: {self.rows:,} {unit}{negatives}"
        for column, lengths in self.lengths.items():
            middle, most, longest = (int(x) for x in np.percentile(lengths, [50, 95, 100]))
            yield f"  tokens of {column}: half have at most {middle:,}, 95% at most {most:,}, the longest {longest:,}"
        if total := self.languages.total():
            shares = ", ".join(f"{code} {100 * n / total:.0f}%" for code, n in self.languages.most_common(4))
            yield f"  languages: {shares}"
        for note in self.reading.sentences(self.path):
            yield f"  {note}"
        for example in [*self.reading.examples.get("lost", [])[1:], *self.reading.examples.get("files", [])[1:]]:
            yield f"    {example}"
        for what, meaning in FINDINGS.items():
            if count := self.findings.counts[what]:
                yield f"  {what}: {count:,} ({meaning})"
                yield from (f"    {line}" for line in self.findings.first[what])
        if self.rows < FEW:
            yield f"  few: {self.rows:,} {unit}; below about {FEW} a stage learns little, and TF-IDF may do better"


class OwnCheck:
    """Checks the splits of one data set together, in order; a text is a leak in every split after its first."""

    def __init__(self, texts: TextTokenizer, *, keep_going: bool = False) -> None:
        self.texts, self.keep_going = texts, keep_going
        self.seen: dict[int, str] = {}  # by text: the split that it was first in
        self.language = _detector()
        self.notes = (
            [] if self.language else ["languages were not checked; that needs py3langid: pip install 'l2v[data]'"]
        )

    def split(self, name: str, sources: Iterable[Source], kind: Kind) -> SplitReport:
        """Read all rows of a split.

        Raises:
            UserError: nothing can be read, or (unless `keep_going`) more than half of a source is lost.
        """
        report = SplitReport(name, kind, Reading(keep_going=True))
        pairs: dict[int, str] = {}
        answers: dict[int, set[int]] = {}
        own: set[int] = set()
        for source in sources:
            report.path = source.path
            reading = Reading(keep_going=True)
            waiting: list[tuple[str, dict[str, Any]]] = []
            for where, several in read_source(replace(source, skip_bad=True), kind, reading):
                for row in several:
                    report.rows += 1
                    self._row(report, where, row, pairs, answers, own)
                    waiting.append((where, row))
                if len(waiting) >= BATCH:
                    self._lengths(report, waiting)
                    waiting.clear()
            self._lengths(report, waiting)
            if not self.keep_going:
                reading.check(source.path)
            report.reading.merge(reading)
        if not report.rows:
            raise UserError(f"{', '.join(s.path for s in sources)}: no row is left; {_first(report.reading)}")
        for key in own:
            self.seen.setdefault(key, name)
        return report

    def _row(
        self, report: SplitReport, where: str, row: dict[str, Any], pairs: dict[int, str],
        answers: dict[int, set[int]], own: set[int],
    ) -> None:  # fmt: skip
        found = report.findings
        query, text = row.get("query"), row.get("positive") or row["text"]
        key = text_key(clean.key(text))
        own.add(key)
        whole = key if query is None else text_key(f"{clean.key(query)}\n{key}")
        if whole in pairs:
            found.add("same twice", f"{where} and {pairs[whole]}", query or text)
        pairs.setdefault(whole, where)
        if self.seen.get(key, report.name) != report.name:
            found.add("leaks", f"{where} (also in {self.seen[key]})", text)
        if self.language and (code := self.language.of(f"{query or ''} {text}".strip())):
            report.languages[code] += 1
            if code not in ("da", "no", "nn"):
                found.add("other language", f"{where} ({code})", text)
        if query is None:
            return
        question = text_key(clean.key(query))
        known = answers.setdefault(question, set())
        if known and key not in known:
            found.add("several answers", where, query)
        known.add(key)
        if question == key:
            found.add("same on both sides", where, query)
        report.negatives += len(row["negatives"])
        for negative in row["negatives"]:
            if text_key(clean.key(negative)) in known:
                found.add("negative is an answer", where, negative)

    def _lengths(self, report: SplitReport, rows: list[tuple[str, dict[str, Any]]]) -> None:
        """Lengths in tokens of a batch of rows, and which texts are longer than the stage's length."""
        for column in ("query", "positive", "text"):
            own = [(where, row[column]) for where, row in rows if column in row]
            if not own:
                continue
            overhead = self.texts.overhead() if report.kind != "documents" else 0
            counts = [len(ids) + overhead for ids in self.texts.plain([text for _, text in own])]
            report.lengths.setdefault(column, []).extend(counts)
            for (where, text), count in zip(own, counts, strict=True):
                if count > self.texts.length and report.kind != "documents":  # documents are cut into blocks, not off
                    report.findings.add("cut", f"{where} ({count} of {self.texts.length} tokens)", text)


def check_own(path: str, texts: TextTokenizer, *, keep_going: bool = False) -> list[str]:
    """Check a file, a folder or a glob; returns the report's lines. Files called train, dev, test, ... are splits."""
    check = OwnCheck(texts, keep_going=keep_going)
    lines: list[str] = []
    splits = _splits([str(file) for file in find_files(path)], path)
    for name, sources in splits.items():
        pairs = all(kind_of_data(source.path)[1] == "pairs" for source in sources)
        lines += check.split(name, sources, "pairs" if pairs else "sentences").lines()
    return lines + check.notes


def check_recipe(recipe: Recipe, tokenizer: TextTokenizer, *, keep_going: bool = False) -> list[str]:
    """Check the data of every stage of a recipe, and that none of a stage's held-out texts is trained on."""
    lines: list[str] = []
    notes: list[str] = []
    kinds: dict[str, Kind] = {"mntp": "documents", "simcse": "sentences", "supervised": "pairs"}
    for name, stage in recipe.stages.items():
        check = OwnCheck(replace_length(tokenizer, stage.length), keep_going=keep_going)
        kind = kinds[stage.objective]
        files = [source for source in stage.data if ":" not in source.path.partition("/")[0]]
        held = [source for source in stage.eval_data if ":" not in source.path.partition("/")[0]]
        for source in [*stage.data, *stage.eval_data]:
            if source not in (*files, *held):
                notes.append(f"{source.path}: not a file on this machine, so not checked")
        if files:
            lines += check.split(f"stage {name}", files, kind).lines()
        if held:
            lines += check.split(f"stage {name}, held out", held, kind).lines()
        notes += check.notes
    return lines + list(dict.fromkeys(notes))


def replace_length(texts: TextTokenizer, length: int) -> TextTokenizer:
    """The same tokenizer for another length."""
    return TextTokenizer(texts.tokenizer, texts.template, length, pooled=texts.pooled)


def _splits(files: list[str], path: str) -> dict[str, list[Source]]:
    """The files by split, where their names tell several; else all together under the path."""
    found: dict[str, list[Source]] = {}
    for file in files:
        words = re.findall(r"[a-zæøå]+", file.rsplit("/", 1)[-1].lower())
        split = next((SPLITS[word] for word in words if word in SPLITS), "other files")
        found.setdefault(split, []).append(Source(file))
    order = [*dict.fromkeys(SPLITS.values()), "other files"]  # so that a text of train and test is a leak of the test
    return {name: found[name] for name in order if name in found} if len(found) > 1 else {path: [Source(path)]}


SPLITS = {
    "train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev",
    "test": "test", "heldout": "test", "eval": "test",
}  # fmt: skip


def _first(reading: Reading) -> str:
    examples = [example for kind in ("lost", "files", "empty") for example in reading.examples.get(kind, [])]
    return f"the first: {examples[0]}" if examples else "the files hold no row"


def _detector() -> Any:
    detector = Detector(Language())
    try:
        detector.of("Det er en sætning på dansk.")
    except UserError:
        return None
    return detector
