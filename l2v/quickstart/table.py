"""The quickstart's table: printed row by row, and as Markdown for a README."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

HEADINGS = ("", "nDCG@10", "95% interval", "plain", "colloquial", "no shared word", "recall@1", "margin")
WIDTHS = (26, 7, 14, 5, 10, 14, 8, 6)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text; empty where a value does not apply."""
    interval = f"{row['ndcg_low']:.3f} to {row['ndcg_high']:.3f}"
    keys = ("ndcg_plain", "ndcg_colloquial", "ndcg_disjoint", "recall_at_1", "margin")
    return [row["name"], _number(row["ndcg_at_10"]), interval, *(_number(row.get(key)) for key in keys)]


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


class Printed:
    """The table on a console: its head once, then each row when its model is scored."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row."""
        if self.title:
            self._line(f"\n{self.title}")
            self._line(_aligned(HEADINGS))
            self.title = ""
        self._line(_aligned(cells(row)))

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _aligned(values: list[str] | tuple[str, ...]) -> str:
    first, *rest = zip(values, WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"  {value:>{width}}" for value, width in rest)


def markdown(report: Mapping[str, Any]) -> str:
    """The table for a README, with the notes below it."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|-|" + "-:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in report["rows"]]
    held_out = report["mntp_held_out"]
    if held_out:
        lines += ["", f"MNTP held-out cross-entropy: {held_out['before']:.2f} to {held_out['after']:.2f} nats."]
    for pair in report["paired"]:
        lines.append(
            f"{pair['better']} {_relation(pair)} {pair['than']}: {pair['difference']:+.3f} nDCG@10 "
            f"(paired bootstrap, 95%: {pair['low']:+.3f} to {pair['high']:+.3f})."
        )
    seconds, on = report["seconds"], report["machine"]
    where = f"{on['cores']} cores of {on['processor']}" if on["accelerator"] == "none" else on["accelerator"]
    lines.append(
        f"{seconds['all']:.0f} s in total, {seconds['training']:.0f} s of it training, on {where} in {on['precision']}."
    )
    return "\n".join(lines) + "\n"


def _relation(pair: Mapping[str, Any]) -> str:
    """Above or below only where the interval excludes 0."""
    return "above" if pair["low"] > 0 else "below" if pair["high"] < 0 else "level with"
