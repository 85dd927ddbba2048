"""What an export says about itself, and texts that show whether another runtime computes the same."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.errors import UserError
from l2v.model.export import ENCODER_FILE
from l2v.runs.source import Found, find

TEXTS = (
    "Hvor ligger Skagen?",
    "Blåbærgrød på en rød tallerken, æbler, øl og Ærø.",
    "ja",
    "Prisen er 1.234,50 kr. (inkl. moms) pr. 3/12-2025, klokken 8.15.",
    "🚲 København 🇩🇰 er fuld af cykler 👩‍👩‍👧!",
    "En linje\nog en til,\tmed  mellemrum  ",
    "The train to Aarhus leaves from platform 3.",
    "Straße, naïve, Łódź, Ελλάδα, Київ, 東京.",
    "Skagen er Danmarks nordligste by, og her mødes Skagerrak og Kattegat ved Grenen. " * 3,
)
"""Short and long, with Danish letters, emoji and other scripts. `Export.texts` adds one that is cut."""


@dataclass(frozen=True)
class Export:
    """A folder that `l2v export` wrote: what it says, and its tokenizer.

    Token ids are those of `Encoder`, with the number of tokens in front that are not pooled.
    """

    folder: Path
    found: Found
    tokenizer: TextTokenizer

    @classmethod
    def read(cls, folder: str | Path) -> Export:
        """Raises UserError: it is no export, or damaged."""
        folder = Path(folder)
        if not (folder / ENCODER_FILE).is_file():
            raise UserError(f"{folder}: not an export of l2v; write one with 'l2v export RUN {folder}'")
        found = find(str(folder))
        tokenizer = load_tokenizer(str(folder))
        return cls(
            folder, found, TextTokenizer(tokenizer, found.base.template, found.length or 512, pooled=found.pooled)
        )

    @property
    def config(self) -> dict[str, Any]:
        """The config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    def texts(self) -> list[str]:
        """Texts to compare runtimes with; the last one is longer than the export takes, so that it is cut to full length."""
        return [*TEXTS, TEXTS[0] + " " + TEXTS[8] * (1 + self.tokenizer.length // 20)]


def differences(got_NE: np.ndarray, want_NE: np.ndarray) -> tuple[float, float]:
    """(the largest difference of an entry, the largest 1 - cosine) of vectors [N, E], both scaled to length 1 first.

    NaN counts as infinitely far.
    """
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in map(np.float64, (got_NE, want_NE))]
    entry, cosine = np.abs(unit[0] - unit[1]).max(), (1 - (unit[0] * unit[1]).sum(1)).max()
    return tuple(float(np.nan_to_num(x, nan=np.inf)) for x in (entry, cosine))  # type: ignore[return-value]


def need(extra: str, *modules: str) -> None:
    """Raises UserError if a module of an extra is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"this needs the package {module}, which is not installed: pip install 'l2v[{extra}]'")
