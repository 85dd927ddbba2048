"""The Danish prompts for the model, and what counts as an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

SYSTEM = (
    "Du skriver søgninger på dansk til en samling af tekster. Svar kun med selve søgningen på én linje, "
    "uden anførselstegn og uden forklaring."
)
LONGEST = 300
LABEL = re.compile(r"^(?:\d+[.)]|[-*•]|(?:spørgsmål|søgning|søgeord|svar|query)\s*:)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Style:
    """One style of query: the prompt for the model, and the task (`l2v.recipe.tasks`) of the resulting pairs."""

    prompt: str
    task: str


STYLES = {
    "question": Style(
        "Skriv ét spørgsmål, som teksten besvarer, og som nogen kunne stille uden at have læst den. "
        "Brug så vidt muligt andre ord end teksten.",
        "question-da",
    ),
    "short": Style("Skriv ét kort spørgsmål på højst otte ord, som teksten besvarer.", "question-da"),
    "keywords": Style(
        "Skriv to til fem søgeord, som man ville taste i en søgemaskine for at finde teksten, ikke en hel sætning.",
        "keywords-da",
    ),
}


@dataclass(frozen=True)
class Question:
    """One query to generate: its passage, its number, its style, and its sampling seed."""

    passage: int
    number: int
    style: str
    seed: int
    text: str

    @property
    def key(self) -> str:
        """Its key in the journal."""
        return f"{self.passage}.{self.number}"

    def messages(self) -> list[dict[str, str]]:
        """The messages for a chat model."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{STYLES[self.style].prompt}\n\nTekst:\n{self.text}"},
        ]


def question(passage: int, number: int, text: str, styles: tuple[str, ...], seed: int) -> Question:
    """The style depends on (seed, text, number) alone, not on the position of the passage."""
    from l2v.batch import mix  # imported here: the command line reads the styles without torch
    from l2v.data.tokens import text_key

    address = mix(seed, text_key(text))
    return Question(passage, number, styles[(address + number) % len(styles)], mix(address, number), text)


def query_of(answer: str | None, passage: str) -> str | None:
    """The query in a model's answer; None if it is not a valid query: empty, several lines, too long, or the passage itself."""
    lines = [line.strip() for line in (answer or "").splitlines() if line.strip()]
    if len(lines) != 1:
        return None
    text = LABEL.sub("", lines[0]).strip()
    while len(text) > 1 and (text[0], text[-1]) in {
        ('"', '"'),
        ("'", "'"),
        ("“", "”"),
        ("»", "«"),
        ("«", "»"),
        ("„", "“"),
    }:
        text = text[1:-1].strip()
    same = " ".join(text.casefold().split()) == " ".join(passage.casefold().split())
    return text if 2 <= len(text) <= LONGEST and any(c.isalpha() for c in text) and not same else None
