"""Danish instructions by kind of task: what `task: NAME` of a source puts before its texts. A leaf of the import tree."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from l2v.errors import RecipeError


@dataclass(frozen=True)
class Task:
    """Instruction of the query, instruction of the document (None for none), and whether the two may be exchanged."""

    query: str
    document: str | None = None
    symmetric: bool = False


# A document has no instruction: it is embedded once and compared with queries of every kind.
TASKS: dict[str, Task] = {
    "search-da": Task("Find tekster, der er relevante for søgningen:"),
    "question-da": Task("Find den tekst, der besvarer spørgsmålet:"),
    "keywords-da": Task("Find den tekst, som søgeordene peger på:"),
    "forum-da": Task("Find et godt svar på indlægget:"),
    "debate-da": Task("Find svaret på indlægget i debatten:"),
    "title-da": Task("Find den tekst, som overskriften hører til:"),
    "summary-da": Task("Find den tekst, som resuméet gengiver:"),
    "claim-da": Task("Find tekster, der be- eller afkræfter påstanden:"),
    "same-meaning-da": Task("Find en sætning med samme betydning:", symmetric=True),
    "same-question-da": Task("Find et spørgsmål, der spørger om det samme:", symmetric=True),
    "translation-da": Task("Find den samme sætning på et andet sprog:", symmetric=True),
    "same-topic-da": Task("Find en tekst om det samme emne:", symmetric=True),
    "same-sentiment-da": Task("Find en tekst med samme holdning:", symmetric=True),
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        RecipeError: if it does not exist; the message gives the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.6)
    raise RecipeError(
        f"no task '{name}'; " + (f"did you mean '{close[0]}'?" if close else f"known: {', '.join(TASKS)}")
    )
