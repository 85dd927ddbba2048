"""Bytes to clean text: encodings, mojibake, Unicode form, control characters."""

from __future__ import annotations

import re
import unicodedata

from l2v.data.decoding import is_damaged_utf8, legacy_of

_MOJIBAKE = re.compile(r"Ã[\u0080-\u00bf¦¸¥†˜…™©‰¶¼„–œ ]|â€[\u0080-\u00bf™œ“”¦]|Â[\u00a0-\u00bf]")
_ESCAPED = re.compile(r"[\udc80-\udcff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2060\ufeff\ufffe\uffff]|\u00ad")
_SPACE = re.compile(r"[^\S\n]+")


def decode(data: bytes, encoding: str) -> tuple[str, bool]:
    """Text of bytes, and whether they were in another encoding although UTF-8 was expected.

    `auto` reads what is not UTF-8 in the encoding of Windows, DOS or the old Mac that fits Danish text best.

    Raises:
        UnicodeDecodeError: if the bytes are not in the encoding.
    """
    if encoding != "auto":
        return data.decode(encoding), False
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        if is_damaged_utf8(data):  # a letter was cut in half: its text would not be what was written
            raise
        return data.decode(legacy_of(data)), True


def restored(text: str) -> str:
    """The text with surrogates that stand for bytes decoded."""
    if not _ESCAPED.search(text):
        return text
    data = text.encode("utf-8", "surrogateescape")
    return data.decode("utf-8", "replace") if is_damaged_utf8(data) else decode(data, "auto")[0]


def mojibake(text: str) -> tuple[str, bool]:
    """UTF-8 that was once read as Windows-1252 ("blÃ¥bÃ¦r"), decoded correctly; and whether it was such text."""
    if not _MOJIBAKE.search(text):
        return text, False
    try:
        return text.encode("windows-1252").decode("utf-8"), True
    except UnicodeError:
        return text, False  # a mixture, or a text about encodings: left unchanged


def normal(text: str) -> str:
    """NFC, one kind of space, no control characters, no soft hyphens; line breaks are kept."""
    text = _CONTROL.sub("", unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")))
    lines = (_SPACE.sub(" ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def key(text: str) -> str:
    """A key that is equal for equal texts: words in lower case, compatibility forms unified, no punctuation."""
    return " ".join(words(text))


_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Words of a text for the search of duplicates and leaks: lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
