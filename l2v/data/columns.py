"""Which column holds what: common English and Danish names, used where a recipe leaves a column at its default.

A column named in the recipe always wins. A column is guessed only if no row has the default name, and the guess is logged.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from l2v.data.reading import listed
from l2v.recipe.source import Source

# The first name found in the file is used, so names that can only be a query come before those that may be one (a title).
QUERIES = (
    "query", "anchor", "question", "sentence1", "search", "spørgsmål", "forespørgsel", "søgning", "søgetekst", "sætning1",
    "title", "heading", "headline", "titel", "overskrift", "emne",
)  # fmt: skip
POSITIVES = (
    "positive", "pos", "passage", "answer", "sentence2", "response", "positiv", "svar", "sætning2", "document", "dokument",
    "text", "tekst", "afsnit", "body", "brødtekst", "content", "indhold", "description", "beskrivelse", "abstract",
    "summary", "resumé",
)  # fmt: skip
TEXTS = (
    "text", "tekst", "sentence", "sætning", "content", "indhold", "body", "brødtekst", "document", "dokument", "passage",
    "afsnit", "paragraph", "description", "beskrivelse",
)  # fmt: skip
NEGATIVES = (
    "negatives", "negative", "hard_negatives", "hard_negative", "neg", "negativ", "negativer", "forkert", "forkert_svar",
)  # fmt: skip
SCORES = ("score", "label", "similarity", "similarity_score", "lighed", "relevance", "relevans")
LABELS = ("label", "category", "topic", "class", "kategori", "emne", "etiket", "klasse", "mærkat")
LOOKED_FOR = {
    "text": (*TEXTS, *POSITIVES), "query": QUERIES, "positive": POSITIVES, "negatives": NEGATIVES, "score": SCORES,
    "label": LABELS,
}  # fmt: skip
DEFAULTS = {f.name: f.default for f in fields(Source)}
_LETTERS = str.maketrans({"æ": "ae", "ø": "oe", "å": "aa", "é": "e"})


@dataclass(frozen=True)
class Choice:
    """A source with its columns resolved; `guessed` maps each key to a column whose name is not the default."""

    source: Source
    guessed: dict[str, str]

    def note(self, where: str | None = None) -> str | None:
        """The sentence to log about guessed columns; None if nothing was guessed. where: the file, default the source."""
        if not self.guessed:
            return None
        chosen = ", ".join(f"{key}: {column}" for key, column in self.guessed.items())
        return f"{where or self.source.path}: columns guessed by their names: {chosen} (a column that you name wins)"


def settle(source: Source, names: Sequence[str], kind: str) -> Choice:
    """The source with each default column that is missing from `names` replaced by a column with a common name.

    kind: documents, sentences or pairs. `names` are the file's columns.
    """
    keys = ("query", "positive", "negatives", "score") if kind == "pairs" else ("text",)
    chosen: dict[str, str] = {}
    for key in keys:
        current = getattr(source, key)
        if current != DEFAULTS[key] or current in names:
            continue
        taken = {chosen.get(other, getattr(source, other)) for other in keys if other != key}
        column = guess(key, [name for name in names if name not in taken])
        if column is not None:
            chosen[key] = column
    changes: dict[str, Any] = {**chosen}
    return Choice(replace(source, **changes), chosen)


def guess(key: str, names: Sequence[str]) -> str | None:
    """The column of `names` for a key (text, query, positive, negatives, score); None where no name is known.

    Case, spaces, `-` and `_` are ignored, and ae, oe, aa match æ, ø, å. For negatives the result may be a pattern,
    `negative_*`, which means numbered columns.
    """
    plain = {_plain(name): name for name in reversed(names)}  # of two equal names the first wins
    for wanted in LOOKED_FOR[key]:
        if _plain(wanted) in plain:
            return plain[_plain(wanted)]
    if key == "negatives":
        for name in names:
            match = re.fullmatch(r"(.*?)\d+", name)
            if match and _plain(match[1]) in map(_plain, NEGATIVES):
                return f"{match[1]}*"
    return None


def numbered(pattern: str, names: Iterable[str]) -> list[str]:
    """The columns of `negative_*`: negative_1, negative_2, ... in the order of their numbers; a name without `*` is kept."""
    if not pattern.endswith("*"):
        return [pattern]
    prefix = pattern[:-1]
    found = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
    return sorted((name for name, number in found.items() if number.isdecimal()), key=lambda name: int(found[name]))


def absent(where: str, column: str, names: Iterable[object]) -> str:
    """The error message for a column that is not found: the columns that exist and the closest name."""
    known = [str(name) for name in names]
    found = listed(known, 20) or "nothing"
    close = difflib.get_close_matches(_plain(column), {_plain(name): name for name in known}, n=1, cutoff=0.6)
    hint = next((f"; did you mean '{name}'?" for name in known if close and _plain(name) == close[0]), "")
    return f"{where}: the field '{column}' is absent; found {found}{hint}"


def _plain(name: str) -> str:
    composed = unicodedata.normalize("NFKC", name).casefold()  # macOS writes å as two characters
    return re.sub(r"[\s_\-]+", "", composed.translate(_LETTERS))
