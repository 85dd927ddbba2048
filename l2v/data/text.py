"""Text to sentences, by the rule of the Danish LLM2Vec work."""

from __future__ import annotations

import re

_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÆØÅ])")


def sentences(text: str, *, least: int = 5, most: int = 100) -> list[str]:
    """Split after `.`, `!` or `?` before an upper-case letter; keep sentences of `least` to `most` words."""
    parts = (part.strip() for part in _END.split(text))
    return [part for part in parts if least <= len(part.split()) <= most]
