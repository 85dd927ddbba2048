"""Word check of `make lint`: phrases that the field does not use, each with the term to write instead.

    python .ci/words.py [FILE ...]     default: every tracked Python, Markdown, YAML, TOML and HTML file

Prints file:line, the phrase and its replacement. Exit code 1 if any was found. CHANGELOG.md may quote the past.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html"}
SKIPPED = {"CHANGELOG.md", ".ci/words.py"}
RESULTS = "benchmarks/results/"  # written by runs; new words stand in them after the next one

WORDS = {
    "told against": "reported as a share of, logged",
    "made again": "recomputed, written again",
    "anew": "again, from scratch",
    "is|are|was|were not there": "does not exist, not found, missing",
    "go|goes|going|gone|went on where|after|from|with": "resumes, continues",
    "stand|stands|stood|standing still": "hangs",
    "noise with|has an address": "counter-based (Philox) dropout keyed by text, layer and position",
    "addressed dropout|noise": "counter-based (Philox) dropout keyed by text, layer and position",
    "passed over": "skipped",
    "mend|mends|mended|mending": "fix",
    "held against": "checked against",
    "take|takes|taken|took it|them up": "applies it",
    "not finite": "NaN or Inf",
    "matrix product|products": "matmul, GEMM",
}
"""Phrase to replacement. `a|b c|d` stands for a c, a d, b c and b d; only phrases without an ordinary use belong here."""


def compiled(phrase: str) -> re.Pattern[str]:
    """The phrase in any case, also across a line break and a comment sign."""
    gap = r"(?:[ \t]+|[ \t]*\n[ \t>#]*)"
    return re.compile(rf"\b{gap.join(f'(?:{word})' for word in phrase.split())}\b", re.IGNORECASE)


def examples(phrase: str) -> list[str]:
    """Every wording that a phrase stands for."""
    wordings = [""]
    for slot in phrase.split():
        wordings = [f"{before} {word}".strip() for before in wordings for word in slot.split("|")]
    return wordings


RULES = [(compiled(phrase), instead) for phrase, instead in WORDS.items()]
HEADING = re.compile(r"^[ \t]*Errors:", re.MULTILINE)


def check(text: str, *, python: bool = False) -> list[tuple[int, str, str]]:
    """(line, what is written, what to write instead) of every phrase in a text, in the order of lines."""
    found = [(match, instead) for pattern, instead in RULES for match in pattern.finditer(text)]
    if python:
        found += [(match, "Raises:") for match in HEADING.finditer(text)]
    return sorted((text.count("\n", 0, match.start()) + 1, _plain(match[0]), instead) for match, instead in found)


def _plain(written: str) -> str:
    return " ".join(re.split(r"[\s>#]+", written.strip()))


def tracked() -> list[str]:
    """The files of the repository, as git names them."""
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return out.split("\0")


def main(names: Iterable[str]) -> int:
    """Check the files that are named, or all."""
    count = 0
    for name in list(names) or tracked():
        path = ROOT / name
        if path.suffix not in SUFFIXES or name in SKIPPED or name.startswith(RESULTS) or not path.is_file():
            continue
        for line, phrase, instead in check(path.read_text(encoding="utf-8"), python=path.suffix == ".py"):
            print(f"{name}:{line}: '{phrase}'; write: {instead}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
