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


def crops(text: str) -> list[tuple[str, str]]:
    """Pairs of a sentence and the rest of its text, without a label: the inverse cloze task (Lee et al. 2019, arXiv 1906.00300),
    one of the ways to crop pairs that Contriever compares (Izacard et al. 2021, arXiv 2112.09118).

    None of a text with fewer than two sentences.
    """
    parts = [part.strip() for part in _END.split(text.strip()) if part.strip()]
    kept = set(sentences(text))
    rests = (" ".join(parts[:at] + parts[at + 1 :]) for at in range(len(parts)))
    return [(part, rest) for part, rest in zip(parts, rests, strict=True) if part in kept and rest]


def parse(line: str, where: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: the line is not one, or a text in it is no valid text; the message names the line.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: malformed JSON ({error.msg} at column {error.colno}); each line is one object"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: not readable as JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply; each line is one object of fields") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: each line is one JSON object; found {type(row).__name__}")
    if "\\u" in line:
        check_text(row, where)
    return row


def check_text(row: dict[str, Any], where: str) -> None:
    r"""Check that every text in a row of JSON can be encoded: an escape such as \ud83d alone is valid JSON and no text.

    Raises:
        UserError: half of a surrogate pair; the message names the field.
    """
    for key, value in row.items():
        try:
            json.dumps([key, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: '{ascii(key)[1:-1]}' holds half of a surrogate pair, which is no text") from None
