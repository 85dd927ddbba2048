"""A line to a row, and text to sentences by the rule of the Danish LLM2Vec work."""

from __future__ import annotations

import json
import re
from typing import Any

from l2v.errors import UserError

_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÆØÅ])")


def sentences(text: str, *, least: int = 5, most: int = 100) -> list[str]:
    """Split after `.`, `!` or `?` before an upper-case letter; keep sentences of `least` to `most` words."""
    parts = (part.strip() for part in _END.split(text))
    return [part for part in parts if least <= len(part.split()) <= most]


def parse(line: str, where: str) -> dict[str, Any]:
    """One JSON object; an error names its line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: malformed JSON ({error.msg} at column {error.colno}); each line is one object"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: each line is one JSON object; found {type(row).__name__}")
    return row
