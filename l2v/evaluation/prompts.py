"""Instructions by task and side: English and Danish tables for the Danish tasks, mteb's own for the rest, or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from l2v.errors import UserError, first_line

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

# Retrieval is asymmetric: the instruction describes the search, so it precedes queries only.
ASYMMETRIC = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")
SIDES = ("query", "document")

ENGLISH = {
    "AngryTweetsClassification": "Tell the sentiment of the Danish tweet: positive, neutral or negative",
    "BornholmBitextMining": "Find the sentence with the same meaning in Danish or in the dialect of Bornholm",
    "DKHateClassification": "Tell whether the Danish tweet is offensive or not",
    "DanishPoliticalCommentsClassification": "Tell the sentiment of the Danish political comment",
    "DanFeverRetrieval": "Given a claim in Danish, find the text that supports it",
    "LccSentimentClassification": "Tell the sentiment of the Danish text: positive, neutral or negative",
    "NordicLangClassification": "Tell in which Nordic language the text is written",
    "MassiveIntentClassification": "Tell what the speaker wants the voice assistant to do",
    "MassiveScenarioClassification": "Tell which scenario the request to the voice assistant belongs to",
    "ScalaClassification": "Tell whether the sentence is grammatically correct",
    "TV2Nordretrieval": "Given the summary of a Danish news article, find the article",
    "TwitterHjerneRetrieval": "Given a question from a Danish tweet, find tweets that answer it",
}
DANISH = {
    "AngryTweetsClassification": "Afgør, om tweetet er positivt, neutralt eller negativt",
    "BornholmBitextMining": "Find sætningen med samme betydning på dansk eller bornholmsk",
    "DKHateClassification": "Afgør, om tweetet er stødende eller ej",
    "DanishPoliticalCommentsClassification": "Afgør holdningen i den politiske kommentar",
    "DanFeverRetrieval": "Find den tekst, der støtter påstanden",
    "LccSentimentClassification": "Afgør, om teksten er positiv, neutral eller negativ",
    "NordicLangClassification": "Afgør, hvilket nordisk sprog teksten er skrevet på",
    "MassiveIntentClassification": "Afgør, hvad taleren vil have stemmeassistenten til at gøre",
    "MassiveScenarioClassification": "Afgør, hvilket emne henvendelsen til stemmeassistenten hører til",
    "ScalaClassification": "Afgør, om sætningen er grammatisk korrekt",
    "TV2Nordretrieval": "Find nyhedsartiklen, som resuméet handler om",
    "TwitterHjerneRetrieval": "Find de tweets, der besvarer spørgsmålet",
}
TABLES: dict[str, Mapping[str, Any]] = {"en": ENGLISH, "da": DANISH, "mteb": {}}


class Prompts:
    """Chooses the instruction of a text: `en`, `da`, `mteb` (mteb's own alone), `off`, or the user's YAML file.

    A file maps a task's name, or its type, to a text, or to {query: ..., document: ...}; an empty text means none.
    Tasks that it does not name use mteb's own. A task's name takes precedence over its type.
    """

    def __init__(self, choice: str = "en") -> None:
        self.choice = choice
        known = TABLES.get(choice) if choice != "off" else {}
        self.table: Mapping[str, Any] = _read(Path(choice)) if known is None else known

    def instruction(self, metadata: TaskMetadata, side: str | None) -> str | None:
        """The instruction for one side of a task (`query`, `document`, or None if both sides are the same)."""
        if self.choice == "off":
            return None
        for entry in (self.table.get(metadata.name), self.table.get(metadata.type), metadata.prompt):
            if entry is None:
                continue
            if isinstance(entry, str):
                return None if metadata.type in ASYMMETRIC and side == "document" else entry or None
            return entry.get(side or "query") or None
        return None


def _read(path: Path) -> dict[str, Any]:
    names = "en, da, mteb, off, or a YAML file"
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--prompts {path}: no such table or file; use {names}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {first_line(error)}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: must map task names or types to instructions")
    for task, entry in table.items():
        good = isinstance(entry, str) or (
            isinstance(entry, dict) and set(entry) <= set(SIDES) and all(isinstance(v, str) for v in entry.values())
        )
        if not good:
            raise UserError(f"{path}: {task} must be a text, or a mapping of query and document to texts")
    return table
