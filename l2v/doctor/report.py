"""The report of `l2v doctor`: sections of facts, as text for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from l2v import __version__
from l2v.errors import UserError

Rows = dict[str, Any]
MARKS = {True: ("yes", "32"), False: ("no", "33")}


def first_line(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass
class Report:
    """Sections of facts and the calibration; `problems` prevent training, `notes` do not."""

    sections: dict[str, Rows] = field(default_factory=dict)
    rates: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, title: str, look: Callable[[Report], Rows]) -> None:
        """Add a section. A check that raises becomes a line of the report, which must work on a broken machine too."""
        try:
            self.sections[title] = look(self)
        except Exception as error:
            self.sections[title] = {"": f"could not be determined: {first_line(error)}"}


def tree(report: Report) -> dict[str, Any]:
    """The report for JSON: (bool, text) rows as {"available", "text"}, and the calibration's rates as numbers."""

    def plain(value: Any) -> Any:
        return {"available": value[0], "text": value[1]} if isinstance(value, tuple) else value

    sections = {title: {key: plain(value) for key, value in rows.items()} for title, rows in report.sections.items()}
    return {"l2v": __version__, **sections, "rates": report.rates, "problems": report.problems, "notes": report.notes}


def render(report: Report, *, color: bool) -> str:
    """The report as aligned text. A row's value is text, or (bool, text): whether it is available, and why."""

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if color else text

    lines = [paint(f"l2v {__version__}", "1")]
    for title, rows in report.sections.items():
        lines += ["", paint(title, "1")]
        width = max(map(len, rows), default=0)
        for key, value in rows.items():
            if isinstance(value, tuple):
                mark, code = MARKS[value[0]]
                text = paint(f"{mark:<4}", code) + value[1]
            else:
                text = str(value)
            lines.append(f"  {key:<{width}}  {text}".rstrip())
    for title, sentences, code in (("notes", report.notes, "33"), ("problems", report.problems, "31")):
        if sentences:
            lines += ["", paint(title, "1"), *(f"  {paint('-', code)} {sentence}" for sentence in sentences)]
    verdict = "training cannot run here: see the problems above" if report.problems else "training can run here"
    return "\n".join([*lines, "", verdict])
