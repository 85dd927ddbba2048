"""Debian's package descriptions: Translation-da stanzas, joined with a Packages index and Translation-en.

Formats: deb-control(5) paragraphs; a description's first line is its title, " ." means an empty line, and lines
that begin with two spaces are lists or preformatted (Debian Policy 5.6.13).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from l2v.data.corpus.config import Input
from l2v.data.corpus.readers import Reader

_FIELD = re.compile(r"^([!-9;-~]+):[ \t]*(.*)$")


def stanza(text: str) -> dict[str, str]:
    """A paragraph's fields by lower-case name; a continuation line keeps its text after the first space.

    Raises:
        ValueError: where a line is neither a field nor a continuation.
    """
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line[:1] in (" ", "\t") and name:
            fields[name] += "\n" + line[1:]
        elif match := _FIELD.match(line):
            name = match.group(1).lower()
            fields[name] = match.group(2)
        elif line.strip():
            raise ValueError(f"the line '{line[:40]}' is neither a field nor its continuation")
    return fields


def description(value: str) -> tuple[str, list[str]]:
    """Title and paragraphs of a description; items of a list become lines of their paragraph."""
    title, _, rest = value.partition("\n")
    paragraphs: list[list[str]] = [[]]
    for line in rest.split("\n"):
        if line.strip() in ("", "."):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line.strip())
    return title.strip(), [" ".join(lines) for lines in paragraphs if lines]


@dataclass(frozen=True)
class Package:
    """A package's entry in an index: its source package, its section, and its English description."""

    source: str
    section: str
    english: str


class Index:
    """Packages by name, from Packages files and, for English texts, Translation-en files.

    Memory grows with the distribution (about 65,000 packages), not with the data set.
    """

    def __init__(self, packages: Sequence[str], english: Sequence[str], folder: str | None) -> None:
        texts: dict[tuple[str, str], str] = {}
        for fields in self._stanzas(english, folder):
            if "description-en" in fields:
                texts[fields.get("package", ""), fields.get("description-md5", "")] = fields["description-en"]
        self.known: dict[str, Package] = {}
        for fields in self._stanzas(packages, folder):
            name = fields.get("package", "")
            own = fields.get("source", name).partition(" ")[0]  # "source (version)"
            section = fields.get("section", "").rpartition("/")[2]
            text = texts.get((name, fields.get("description-md5", "")), fields.get("description", ""))
            self.known[name] = Package(own, section, text)
        self.texts = texts

    @staticmethod
    def _stanzas(paths: Sequence[str], folder: str | None):
        for path in paths:
            for _, payload in Reader(Input(path=path, licence="", format="debian"), folder):
                assert isinstance(payload, bytes)
                try:
                    yield stanza(payload.decode("utf-8", "replace"))
                except ValueError:
                    continue  # a malformed stanza of an index: its package gets no label

    def row(self, fields: dict[str, str], take: str, kind: str) -> dict[str, str]:
        """The columns of a Translation-da stanza for `take` and `kind`.

        Raises:
            KeyError: for a field that is absent.
        """
        name = fields["package"]
        title, paragraphs = description(fields["description-da"])
        known = self.known.get(name)
        row = {
            "id": f"{name}/{fields.get('description-md5', '')[:8]}".rstrip("/"),
            "document": name,
            "group": known.source if known else name,
            "section": known.section if known else "",
        }
        if kind != "pairs":
            return row | {"text": "\n".join([f"{title}." if title[-1:].isalnum() else title, *paragraphs])}
        body = " ".join(paragraphs)
        if take == "description":
            return row | {"query": title, "positive": body}
        text = self.texts.get((name, fields.get("description-md5", ""))) or (known.english if known else "")
        _, english = description(text)
        return row | {"query": body, "positive": " ".join(english)}
