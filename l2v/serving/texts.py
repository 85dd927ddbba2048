"""The 64 texts by which engines are compared: short, long, cut, Danish letters, emoji, digits, other scripts."""

from __future__ import annotations

from collections.abc import Callable

SAMPLE = [
    "Hvor ligger Skagen?",
    "Skagen er Danmarks nordligste by.",
    "rødgrød med fløde",
    "Ærø, Ålborg og Østerbro",
    "ÆØÅ æøå é ü ß",
    "3",
    "1.234,56 kr. den 5. maj 2024 kl. 13.45",
    "2 + 2 = 4",
    "🙂",
    "🇩🇰 Tillykke med fødselsdagen! 🎂🎉",
    "Forskeren 👩‍🔬 målte 12 °C",
    "a",
    "Å",
    "og",
    "...",
    "?!",
    "En to tre, fire fem seks: syv otte ni!",
    "HVAD ER KLOKKEN",
    "kan man få pengene tilbage hvis toget er forsinket",
    "Kan man få pengene tilbage, hvis toget er forsinket?",
    "Toget til Aarhus er 20 minutter forsinket på grund af signalfejl ved Ringsted.",
    "To linjer\nher er den anden",
    "Et afsnit.\n\nOg et til, efter en tom linje.",
    "Kolonne\tmed\ttabulator",
    "mange    mellemrum   i    midten",
    "def vektor(tekst):\n    return model.encode(tekst)",
    '{"navn": "Bo", "alder": 42}',
    "https://example.org/sti?søg=æble&side=2",
    "bo@example.org",
    "C++ & C#; 50 % rabat (kun i dag) [læs mere] <b>fed</b>",
    "“Citat” – og tankestreg … samt ’apostrof’",
    "你好，世界",
    "Привет, мир",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "こんにちは世界",
    "Où est la gare la plus proche ?",
    "The quick brown fox jumps over the lazy dog.",
    "Der Fluss fließt durch die Stadt.",
    "Bokmål og nynorsk er to skriftspråk.",
    "Speciallægepraksisplanlægningsstabiliseringsperiode",
    "i i i i i i i i i i i i",
    "e\u0301 og \u00e9 er skrevet på to måder",
    "bindestreg\u00adsord og hårdt\u00a0mellemrum",
    "null None NaN",
    "\\n er ikke et linjeskift",
    "$a^2 + b^2 = c^2$",
    "😀😀😀😀😀😀",
    "Vejret: sol, 21°, vind 5 m/s",
]
"""Short texts, without white space at their ends."""

PARAGRAPH = (
    "Biblioteket i Ærøskøbing låner både bøger, film og spil ud, og den som bor på øen kan også få dem sendt hjem. "
    "Åbningstiderne er længst om sommeren, når færgen sejler oftere og der kommer flere gæster. "
)
ASKED = "Find den tekst, der besvarer spørgsmålet:"
"""An instruction for encoders that were trained with several, or none."""

LONGEST = 4096
"""Tokens; longer texts would take minutes on a CPU."""


def long_texts(count: Callable[[str], int], length: int) -> list[str]:
    """Six texts of half a paragraph up to more than `length` tokens; the last two are cut.

    count: tokens of a text.
    """
    each = max(1, count(PARAGRAPH) - count("a"))
    limit = min(length, LONGEST)
    repeats = [max(1, round(share * limit / each)) for share in (0.1, 0.5, 0.9)]
    over = -(-limit // each) + 1
    return [PARAGRAPH[:90].strip(), *((PARAGRAPH * n).strip() for n in (*repeats, over, over + 3))]
