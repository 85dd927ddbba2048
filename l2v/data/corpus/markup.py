"""Wiki markup to clean paragraphs: wikitext (by mwparserfromhell) and the markers of wiki40b."""

from __future__ import annotations

import re

from l2v.errors import UserError

NOT_ARTICLE = ("fil", "file", "billede", "image", "kategori", "category", "medie", "media")
END_MATTER = frozenset(
    ("referencer", "noter", "kilder", "fodnoter", "litteratur", "eksterne henvisninger", "eksterne links", "ekstern henvisning",
     "se også", "henvisninger", "kildehenvisninger", "galleri", "noter og referencer", "kilder og henvisninger")
)  # fmt: skip
"""Headings of sections with sources and links but no prose, as Danish Wikipedia names them."""
DROPPED_TAGS = frozenset(
    ("ref", "references", "table", "gallery", "math", "timeline", "score", "imagemap", "syntaxhighlight", "source", "pre",
     "code", "chem", "hiero", "mapframe", "graph", "templatestyles", "section")
)  # fmt: skip
_ITEM = re.compile(r"^[*#:;|!{}]")
_MAGIC = re.compile(r"__[A-ZÆØÅ]+__")
_LEFT = re.compile(r"\[\[|\]\]|\{\{|\}\}|'{2,}")
_EMPTY = re.compile(r"\(\s*[,;:]*\s*\)|\[\s*\]")
_INTERWIKI = re.compile(r"^[a-z]{2,3}(-[a-z]+)?:")


def wikitext(text: str) -> list[str]:
    """Paragraphs of prose: no templates, tables, references, files, categories, lists, headings or magic words.

    A link becomes its text. Sections of references and links (`END_MATTER`) are dropped with everything below them.
    """
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError("a MediaWiki dump needs mwparserfromhell: pip install 'l2v[data]'") from None
    code = mwparserfromhell.parse(_MAGIC.sub("", text), skip_style_tags=True)
    kept, dropped_below = [], None
    for section in code.get_sections(flat=True, include_lead=True):
        headings = section.filter_headings(recursive=False)
        if headings:
            level, name = headings[0].level, headings[0].title.strip_code().strip().casefold()
            if dropped_below is not None and level > dropped_below:
                continue
            dropped_below = level if name in END_MATTER else None
            if dropped_below is not None:
                continue
        kept += _paragraphs(_strip(section))
    return kept


def _strip(section) -> str:
    out = []
    for node in section.nodes:
        kind = type(node).__name__
        if kind == "Text":
            out.append(str(node))
        elif kind == "HTMLEntity":
            out.append(node.normalize())
        elif kind == "Wikilink":
            out.append(_link(node))
        elif kind == "ExternalLink":
            if node.title is not None:
                out.append(_strip(node.title))
        elif kind == "Tag":
            tag = str(node.tag).strip().casefold()
            if tag == "br":
                out.append(" ")
            elif node.wiki_markup in ("*", "#", ":", ";"):
                out.append(node.wiki_markup)  # _paragraphs recognises a list by it
            elif tag not in DROPPED_TAGS and node.contents is not None:
                out.append(_strip(node.contents))
    return "".join(out)


def _link(node) -> str:
    target = str(node.title).strip().casefold()
    prefix = target.partition(":")[0]
    if prefix in NOT_ARTICLE or (_INTERWIKI.match(target) and node.text is None):
        return ""
    if node.text is None:
        return str(node.title).lstrip(":")
    return _strip(node.text)


def _paragraphs(text: str) -> list[str]:
    """Runs of lines between blank lines, joined; list items and remains of tables are skipped."""
    out, lines = [], []
    for line in [*text.split("\n"), ""]:
        line = line.strip()
        if line and not _ITEM.match(line):
            lines.append(line)
        elif lines:
            joined = _EMPTY.sub("", _LEFT.sub("", " ".join(lines)))
            joined = re.sub(r"\s+([.,;:!?)])", r"\1", " ".join(joined.split()))
            if any(c.isalnum() for c in joined):
                out.append(joined)
            lines = []
    return out


def wiki40b(text: str) -> list[str]:
    """Paragraphs of a wiki40b text (Guo et al. 2020): article titles and section headings are dropped, `_NEWLINE_` splits."""
    if "_START_" not in text:
        return _plain(text)
    out, head = [], False
    for line in text.split("\n"):
        line = line.strip()
        if line in ("_START_ARTICLE_", "_START_SECTION_"):
            head = True
        elif line == "_START_PARAGRAPH_":
            head = False
        elif line and not head:
            out += [part.strip() for part in line.split("_NEWLINE_") if part.strip()]
        elif line:
            head = False
    return out


def wiki40b_title(text: str) -> str | None:
    """The title after `_START_ARTICLE_`, if there is one."""
    match = re.search(r"_START_ARTICLE_\s*\n\s*(.+)", text)
    return match.group(1).strip() if match else None


def _plain(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def plain(text: str) -> list[str]:
    """Lines of a text without markup."""
    return _plain(text)
