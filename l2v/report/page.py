"""Writes the report: the HTML page, the Markdown, and the pictures next to the Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from l2v.errors import UserError
from l2v.files import replace_text
from l2v.report.pictures import Picture
from l2v.report.tables import OWN, Table


def write(facts: dict[str, Any], out: Path) -> list[Path]:
    """Write OUT.html, OUT.md and a folder OUT.pictures; returns the files, the page first.

    The page is self-contained: no script, font or picture is fetched. All text in it is escaped.

    Raises:
        UserError: if a file cannot be written.
    """
    beside, folder = out.with_suffix(".md"), out.with_suffix(".pictures")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, html(facts))
        shown = [
            picture
            for section in facts["sections"]
            for picture in (*section["own_pictures"], *section["curves"], section["map"])
            if picture
        ]
        for picture in shown:
            folder.mkdir(exist_ok=True)
            picture.png(folder / file_name(picture))
        replace_text(beside, markdown(facts, folder.name))
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: cannot be written: {error.strerror or error}; choose --out"
        ) from None
    return [out, beside]


def html(facts: dict[str, Any]) -> str:
    """The page."""
    return _environment(escape=True).get_template("page.html").render(facts, own=OWN)


def markdown(facts: dict[str, Any], pictures: str) -> str:
    """The same as Markdown; `pictures` is the folder of its pictures, relative to the file."""
    text = _environment(escape=False).get_template("page.md").render(facts, pictures=pictures)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def file_name(picture: Picture) -> str:
    """The file name of a picture next to the Markdown."""
    return re.sub(r"[^\w.-]+", "-", picture.name) + ".png"


def table_text(table: Table) -> str:
    """A table as Markdown; the marked rows and the best cells are bold, rows with their mark."""
    lines = [table.heads, ["-" if at < table.words else "-:" for at in range(len(table.heads))]]
    for row in table.rows:
        cells = [f"**{_cell(cell)}**" if at in row.best else _cell(cell) for at, cell in enumerate(row.cells)]
        if row.mark:
            cells[table.names] = f"**{cells[table.names]}** ({row.mark})"
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _environment(escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("l2v.report", "."), autoescape=escape, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"markdown": table_text, "file": file_name}
    return environment
