"""The language filter: lingua, whose models travel in its wheel.

Of the libraries that need no download it was chosen by a labelled set of Danish, Bokmål, Swedish and English sentences
(`tests/data/test_build_language.py`).
"""

from __future__ import annotations

from functools import cached_property

from l2v.data.build.config import Language
from l2v.errors import UserError

CODES = {
    "da": "DANISH", "nb": "BOKMAL", "nn": "NYNORSK", "sv": "SWEDISH", "is": "ICELANDIC", "en": "ENGLISH", "de": "GERMAN",
    "nl": "DUTCH", "fi": "FINNISH", "fr": "FRENCH", "es": "SPANISH", "pl": "POLISH",
}  # fmt: skip


class Detector:
    """Names the language of a text, or None where it is too short to tell."""

    def __init__(self, settings: Language, also: set[str] = frozenset()) -> None:
        self.settings = settings
        self.codes = sorted({*settings.keep, *settings.among, *also})

    @cached_property
    def _lingua(self):
        try:
            from lingua import Language as Known
            from lingua import LanguageDetectorBuilder
        except ImportError:
            raise UserError(
                "the language filter needs lingua: pip install 'l2v[data]', or set language: null"
            ) from None
        self._names = {getattr(Known, CODES[code]): code for code in self.codes}
        builder = LanguageDetectorBuilder.from_languages(*self._names)
        return (builder.with_low_accuracy_mode() if self.settings.accuracy == "low" else builder).build()

    def of(self, text: str) -> str | None:
        """The code of the likeliest language; None for fewer than `short` characters, or where no letter tells."""
        if len(text) < self.settings.short:
            return None
        detector = self._lingua
        return self._names.get(detector.detect_language_of(text[: self.settings.characters]))
