"""Synthetic Danish documents with planted duplicates, near-duplicates and leaks, and what must become of each.

Every document is a pure function of its number, so that a million of them need no memory and no file but their own.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from l2v.data import sample
from l2v.data.corpus import clean
from l2v.data.corpus.config import Language
from l2v.data.corpus.language import Detector

GROUP_SIZE = 25
"""In each group of this size one document is an exact copy and one a near copy; in every tenth group, one is a leak."""
WORDS = 40
EVALUATION_TEXTS = 400
WORDS_CHANGED = {"0.97": 0, "0.85": 1, "0.81": 2, "0.73": 4}
"""Similarity of a near copy: of 38 word trigrams, one more word makes 38 of 39 equal, and n neighbouring words changed make
36 - n of 40 + n."""


def vocabulary() -> list[str]:
    """Words of the Danish sample, lower case, sorted."""
    return sorted({w for p in sample.passages().values() for w in clean.words(p.text) if w.isalpha()})


def kind_of(number: int) -> str:
    """What document `number` is."""
    place = number % GROUP_SIZE
    if place == 10 and number // GROUP_SIZE % 10 == 0:
        return "leak"
    if place == 21:
        return f"near {list(WORDS_CHANGED)[number // GROUP_SIZE % len(WORDS_CHANGED)]}"
    return "copy" if place == 20 else "own"


class Corpus:
    """Documents 0 up to `count`, and the evaluation texts that some of them hold."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed, self.words = count, seed, vocabulary()
        self.held = [
            " ".join(random.Random(f"{seed} held {i}").choices(self.words, k=30)) for i in range(EVALUATION_TEXTS)
        ]

    def own(self, number: int) -> list[str]:
        """The words that document `number` has, or would have if nothing were planted."""
        return random.Random(f"{self.seed} {number}").choices(self.words, k=WORDS)

    def text(self, number: int) -> str:
        """The text of document `number`."""
        kind = kind_of(number)
        if kind == "copy":
            words = self.own(self.earlier(number))
            return " ".join(words).upper() + "!"  # the same words to whom case and punctuation are nothing
        if kind.startswith("near"):
            words, changed = self.own(self.earlier(number)), WORDS_CHANGED[kind.removeprefix("near ")]
            at = random.Random(f"{self.seed} near {number}").randrange(5, WORDS - 5)
            words[at : at + changed] = [f"{w}et" for w in words[at : at + changed]]
            return self._sentence(words if changed else [*words, "altså"])
        words = self.own(number)
        if kind == "leak":
            which = random.Random(f"{self.seed} leak {number}")
            held = which.choice(self.held).split()
            first = which.randrange(len(held) - 13)
            part = held if which.random() < 0.3 else held[first : first + 13]
            words[10:10] = [w.title() for w in part]
        return self._sentence(words)

    def earlier(self, number: int) -> int:
        """The document that a copy is of: an own one, near by or long ago, and no other copy's."""
        base = number - number % GROUP_SIZE
        far = random.Random(f"{self.seed} far {number}").randrange(base // GROUP_SIZE + 1)
        return (far if number % 2 else base // GROUP_SIZE) * GROUP_SIZE + number % GROUP_SIZE % 10

    @staticmethod
    def _sentence(words: list[str]) -> str:
        return f"{words[0].capitalize()} {' '.join(words[1:20])}. {words[20].capitalize()} {' '.join(words[21:])}."

    def write(self, folder: Path) -> None:
        """documents.jsonl and held.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
            for number in range(self.count):
                file.write(json.dumps({"id": str(number), "text": self.text(number)}, ensure_ascii=False) + "\n")
        rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in self.held)
        (folder / "held.jsonl").write_text("".join(rows), encoding="utf-8")

    def config(self, folder: Path, **keys: object) -> Path:
        """A configuration of these documents, as build.yaml in `folder`."""
        import yaml

        tree = {
            "name": "synthetic",
            "kind": "documents",
            "folder": str(folder),
            "sources": [{"path": "documents.jsonl", "label": "synthetic", "licence": "cc0-1.0"}],
            "decontaminate": {"sources": [{"path": "held.jsonl", "columns": ["text"]}]},
            "splits": {"train": 0.98, "dev": 0.02},
            **keys,
        }
        path = folder / "build.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
        return path


@dataclass
class Verdict:
    """What became of the planted documents; of copies, those whose original was kept."""

    planted: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    twice: int = 0
    gone: Counter[str] = field(default_factory=Counter)
    """Every document that was dropped, by reason: `leak`, `copy` (another copy, or the original, was kept), `language` (the
    filter, asked again, refuses it), and `lost`, without any reason."""

    def dropped(self, kind: str) -> float:
        """The share of a kind that is gone."""
        return 1 - self.left[kind] / max(1, self.planted[kind])


def judge(corpus: Corpus, out: Path, language: Language | None = None) -> Verdict:
    """Read the shards in `out`: every id at most once, of each kind how many are left, and a reason for each that is gone."""
    verdict = Verdict()
    seen = bytearray(corpus.count)
    for number in ids(out):
        verdict.twice += seen[number]
        seen[number] = 1
    for number in range(corpus.count):
        kind = kind_of(number)
        if kind in ("own", "leak") or seen[corpus.earlier(number)]:
            verdict.planted[kind] += 1
            verdict.left[kind] += seen[number]
    _explain(corpus, seen, verdict, Detector(language) if language else None)
    return verdict


def _explain(corpus: Corpus, seen: bytearray, verdict: Verdict, detector: Detector | None) -> None:
    alike = bytearray(corpus.count)  # by original: whether it or a copy was kept

    def original(number: int) -> int:
        return corpus.earlier(number) if kind_of(number).startswith(("copy", "near")) else number

    for number in range(corpus.count):
        if seen[number]:
            alike[original(number)] = 1
    for number in range(corpus.count):
        if seen[number]:
            continue
        if kind_of(number) == "leak":
            why = "leak"
        elif alike[original(number)]:
            why = "copy"
        else:
            why = "language" if detector and detector.of(corpus.text(number)) not in detector.settings.keep else "lost"
        verdict.gone[why] += 1


def ids(out: Path) -> Iterator[int]:
    """Numbers of the documents that were kept, shard by shard."""
    for path in sorted(out.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(columns=["id"]):
            for value in batch.column(0).to_pylist():
                yield int(value.rpartition("/")[2])
